"""Read and write YAML of recipes and `--set`: plain data of bounded size, without YAML 1.1's special cases.

`no`, `off`, dates, `1:30`, `010` and `1_000` are strings here, as in YAML 1.2; `1e-4` is a number. Each field then
interprets its string: a whole number is read from "1_000", and a boolean from "no".
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from compressor.core.errors import CompressorError
from export.text import short

if TYPE_CHECKING:
    from yaml import MappingNode, Node, SafeLoader

LARGEST_TEXT = 1 << 18
"""Maximum number of characters of a recipe; the shipped ones have a few thousand."""

DEEPEST = 32
"""Maximum nesting of lists and mappings; a recipe has three levels."""

MOST_VALUES = 10_000
"""Maximum number of values in a text, each counted as often as aliases repeat it."""

LONGEST_INTEGER = 20
"""Maximum number of digits of an integer; no field accepts one that long."""

_TAG = "tag:yaml.org,2002:"
_RESOLVERS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("merge", r"<<", "<"),
)
"""YAML 1.2's core schema (10.3.2) without octal and hexadecimal integers, and merge keys: kind, text, first letters."""


def read_yaml(text: str, source: str) -> Any:
    """Return the value of a YAML text.

    Args:
        text: One document.
        source: Name in messages, such as "The recipe net.yaml".

    Raises:
        CompressorError: It is not YAML, too large, too deep, repeats too much, gives a field twice, or names a type.
    """
    import yaml

    if len(text) > LARGEST_TEXT:
        raise CompressorError(
            f"{source} has {len(text):,} characters; at most {LARGEST_TEXT:,} are read.", "Is it a recipe?"
        )
    loader = None
    try:
        loader = _loader()(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_expanding(node)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or " ".join(str(error).split())
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        syntax = isinstance(error, (yaml.scanner.ScannerError, yaml.parser.ParserError))
        raise CompressorError(
            f"{source} cannot be read as YAML: {short(what, 200)}{where}.",
            "Put text with special characters in quotes." if syntax else "",
        ) from None
    finally:
        if loader is not None:
            loader.dispose()


def write_yaml(fields: dict[str, Any]) -> str:
    """Return plain data as YAML that `read_yaml`, and any other YAML reader, reads back unchanged."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes strings that either version of YAML would read as another type."""

    for kind, pattern, first in _RESOLVERS:
        Dumper.add_implicit_resolver(_TAG + kind, re.compile(f"(?:{pattern})$"), _first(first))
    return yaml.dump(fields, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def _first(characters: str) -> list[str]:
    return ["" if char == "\0" else char for char in characters]


@functools.cache
def _loader() -> type[SafeLoader]:
    """Return a loader of plain data; created on first use, so that `compress --help` does not import PyYAML."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012
        yaml_constructors: ClassVar[dict[Any, Any]] = {
            **{_TAG + kind: _scalar for kind in ("null", "bool", "int", "float", "str")},
            f"{_TAG}seq": yaml.SafeLoader.construct_yaml_seq,
            f"{_TAG}map": _mapping,
            None: yaml.SafeLoader.construct_undefined,
        }
        depth = values = 0

        def compose_node(self, parent: Node | None, index: int) -> Node | None:
            self.depth, self.values = self.depth + 1, self.values + 1
            if self.depth > DEEPEST or self.values > MOST_VALUES:
                what = f"{DEEPEST} levels" if self.depth > DEEPEST else f"{MOST_VALUES:,} values"
                _refuse(f"it has more than {what}", self.peek_event())  # type: ignore[no-untyped-call]
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    for kind, pattern, first in _RESOLVERS:
        Loader.add_implicit_resolver(_TAG + kind, re.compile(f"(?:{pattern})$"), _first(first))
    return Loader


def _refuse(what: str, place: Any) -> NoReturn:
    """Raise the error for a node or an event."""
    import yaml

    raise yaml.MarkedYAMLError(None, None, what, place.start_mark)


def _scalar(loader: SafeLoader, node: Any) -> bool | int | float | str | None:
    kind, text = node.tag.removeprefix(_TAG), str(loader.construct_scalar(node))
    if kind == "str":
        if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
            _refuse("a text with a NUL or half of a surrogate pair", node)
        return text
    if not any(re.fullmatch(pattern, text) for name, pattern, _ in _RESOLVERS if name == kind):
        _refuse(f"{text!r} is no {kind}", node)
    if kind == "int":
        if len(text) > LONGEST_INTEGER:
            _refuse(f"an integer of {len(text):,} digits", node)
        return int(text)
    if kind == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return None if kind == "null" else text.lower() == "true"


def _mapping(loader: SafeLoader, node: MappingNode) -> Iterator[dict[Any, Any]]:
    seen = set()
    for key, _ in node.value:
        if key.tag == f"{_TAG}str" and key.value in seen:
            _refuse(f"{key.value!r} is given twice", key)
        seen.add(str(key.value))
    made: dict[Any, Any] = {}
    yield made
    made.update(loader.construct_mapping(node, deep=True))


def _refuse_expanding(root: Node) -> None:
    """Reject a graph of nodes that aliases make endless or too large: a few lines can stand for millions of values."""
    import yaml

    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: Node) -> int:
        if id(node) in open_nodes:
            _refuse("an alias within what it names", node)
        if id(node) not in sizes:
            open_nodes.add(id(node))
            if isinstance(node, yaml.MappingNode):
                parts = [part for pair in node.value for part in pair]
            else:
                parts = node.value if isinstance(node, yaml.SequenceNode) else []
            sizes[id(node)] = 1 + sum(size(part) for part in parts)
            open_nodes.remove(id(node))
        if sizes[id(node)] > MOST_VALUES:
            _refuse(f"it has more than {MOST_VALUES:,} values, counting aliases", node)
        return sizes[id(node)]

    size(root)
