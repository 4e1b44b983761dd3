"""Validate fields against a model, naming every invalid one, and merge overrides into fields."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from compressor.core.agents import registry
from compressor.core.errors import CompressorError

Model = TypeVar("Model", bound=BaseModel)


def validated(kind: type[Model], fields: Mapping[str, Any], source: str) -> Model:
    """Return a recipe, or a part of one, with these fields.

    Raises:
        CompressorError: Names every invalid field with `source`, the value and what was expected.
    """
    try:
        return kind.model_validate(dict(fields))
    except CompressorError as error:  # of the agent's settings
        raise CompressorError(f"{source}: {error.message}", error.hint) from None
    except ValidationError as error:
        found: dict[tuple[Any, ...], list[Any]] = {}
        for problem in error.errors():
            found.setdefault(_place(kind, problem["loc"]), []).append(problem)
        problems = "; ".join(_explained(kind, place, each) for place, each in found.items())
        raise CompressorError(
            f"{source}: {problems}.", "The fields are listed by: compress recipes --schema"
        ) from None


def dotted(fields: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the fields of a recipe and of its parts, with their dotted names."""
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            yield from dotted(value, f"{within}{name}.")
        else:
            yield within + name, value


def merged(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields with some replaced; nested ones are merged field by field."""
    fields = dict(base)
    for key, value in overrides.items():
        inside = fields.get(key)
        fields[key] = (
            merged(inside, value) if isinstance(value, Mapping) and isinstance(inside, Mapping) else value
        )
    return fields


def _place(kind: type[BaseModel], location: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a problem's location without pydantic's name for one of the types that a field may have."""
    part = kind
    for depth, name in enumerate(location, start=1):
        annotation = part.model_fields[str(name)].annotation if str(name) in part.model_fields else None
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            part = annotation
        else:
            kinds = [each for each in get_args(annotation) if each is not type(None)]
            several = get_origin(annotation) in (Union, UnionType) and len(kinds) > 1
            return location[:depth] if several else location
    return location


def _explained(kind: type[BaseModel], place: tuple[Any, ...], problems: list[Any]) -> str:
    """Describe what is wrong at a place; a field of several types has a problem with each of them."""
    where, problem = ".".join(map(str, place)), problems[0]
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(
            str(problem["loc"][-1]), _field_names(kind, problem["loc"][:-1]), n=3, cutoff=0.5
        )
        return f"unknown field {where!r}" + (f" (did you mean {' or '.join(near)}?)" if near else "")
    if problem["type"] == "missing":
        return f"field {where!r} is missing"
    messages = dict.fromkeys(map(_in_words, problems))
    if any(each["type"] == "string_pattern_mismatch" for each in problems) and (forms := _described(kind, place)):
        messages = {f"expected {forms}": None}  # a regular expression helps few
    if problem["type"] == "value_error" and next(iter(messages)).startswith(f"{where}."):  # it names its field
        return next(iter(messages))
    return f"field {where!r} is {problem['input']!r}: {'; or '.join(messages)}"


def _in_words(problem: Any) -> str:
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return f"{problem['msg'][0].lower()}{problem['msg'][1:]}"


def _described(part: type[BaseModel], place: tuple[Any, ...]) -> str:
    """Return the first clause of a field's description; empty for a place that is no field."""
    for name in place[:-1]:
        annotation = part.model_fields[str(name)].annotation if str(name) in part.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return ""
        part = annotation
    field = part.model_fields.get(str(place[-1]))
    text = re.split(r"; |\.( |$)", (field.description if field else "") or "")[0]
    return f"{text[:1].lower()}{text[1:]}"


def _field_names(part: type[BaseModel], location: Iterable[Any]) -> list[str]:
    for name in location:
        annotation = part.model_fields[str(name)].annotation if str(name) in part.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        part = annotation
    return list(part.model_fields)


def setting_error(kind: type[BaseModel], values: Mapping[str, Any], error: ValidationError) -> CompressorError:
    """Return the error of an agent's settings: the first invalid one, its value and what was expected."""
    problem = error.errors()[0]
    name, what, value = str(problem["loc"][0]), problem["type"], problem["input"]
    if what == "extra_forbidden":
        agents = [name for name, agent in registry.classes.items() if agent.Settings is kind]
        which = f"The agent {agents[0]}" if len(agents) == 1 else "The agent"
        known = ", ".join(sorted(kind.model_fields)) or "none"
        return CompressorError(f"{which} has no setting {name!r}.", f"Its settings are: {known}.")
    field = kind.model_fields[name]
    expected = _choices_or_range(field)
    if what.endswith("_type") and get_origin(field.annotation) is not Literal:
        kinds: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
        expected = f"{kinds.get(field.annotation, 'a list')}, such as {field.default!r}"
    if len(problem["loc"]) > 1:  # within a list
        value, message = values[name], problem["msg"]
        expected = f"a list such as {field.default!r}: {message[0].lower()}{message[1:]}"
    return CompressorError(f"The setting {name} is {value!r}, expected {expected}.")


def _choices_or_range(field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return " or ".join(map(repr, get_args(field.annotation)))
    names = ("ge", "gt", "le", "lt")
    bounds = {name: getattr(each, name) for each in field.metadata for name in names if hasattr(each, name)}
    low = f"{bounds['ge']:g}" if "ge" in bounds else f"more than {bounds['gt']:g}" if "gt" in bounds else ""
    if "le" in bounds:
        return f"{low} to {bounds['le']:g}" if "ge" in bounds else f"{low} and at most {bounds['le']:g}"
    low += " or more" if "ge" in bounds else ""
    return f"{low} and less than {bounds['lt']:g}" if "lt" in bounds else low
