"""Validate fields against a model, naming every invalid one, and merge overrides into fields."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from compressor.core.errors import CompressorError

Model = TypeVar("Model", bound=BaseModel)


def validated(kind: type[Model], fields: Mapping[str, Any], source: str) -> Model:
    """Return a recipe, or a part of one, with these fields.

    Raises:
        CompressorError: Names every invalid field with `source`, the value and what was expected.
    """
    try:
        return kind.model_validate(dict(fields))
    except ValidationError as error:
        problems = "; ".join(_explained(kind, problem) for problem in error.errors())
        raise CompressorError(
            f"{source}: {problems}.", "The fields are listed by: compress recipes --schema"
        ) from None


def merged(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields with some replaced; nested ones are merged field by field."""
    fields = dict(base)
    for key, value in overrides.items():
        inside = fields.get(key)
        fields[key] = (
            merged(inside, value) if isinstance(value, Mapping) and isinstance(inside, Mapping) else value
        )
    return fields


def _explained(kind: type[BaseModel], problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(
            str(problem["loc"][-1]), _field_names(kind, problem["loc"][:-1]), n=3, cutoff=0.5
        )
        return f"unknown field {where!r}" + (f" (did you mean {' or '.join(near)}?)" if near else "")
    if problem["type"] == "missing":
        return f"field {where!r} is missing"
    return f"field {where!r} is {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _field_names(part: type[BaseModel], location: Iterable[Any]) -> list[str]:
    for name in location:
        annotation = part.model_fields[str(name)].annotation if str(name) in part.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        part = annotation
    return list(part.model_fields)
