"""The messages that docs/guide/troubleshooting.md quotes are those of the sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "guide" / "troubleshooting.md"
QUOTES = re.findall(r"\*\*`(.+?)`\*\*", PAGE.read_text(encoding="utf-8"))
_PLACEHOLDER = re.compile(r"\.\.\.|(?<![\w-])[A-Z]{1,}(?![\w-])|(?<!\w)\d+(?!\w)")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """All texts in the sources, scripts line by line; a value within one is a gap."""

    def found() -> Iterator[str]:
        for folder in ("compressor", "export"):
            for path in (ROOT / folder).rglob("*.sh"):
                yield from path.read_text(encoding="utf-8").splitlines()
            for path in (ROOT / folder).rglob("*.py"):
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                    if isinstance(node, ast.JoinedStr):
                        yield "\0".join(part.value for part in node.values if isinstance(part, ast.Constant))
                    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                        yield node.value

    return list(found())


def test_the_page_quotes_messages() -> None:
    assert len(QUOTES) > 25


@pytest.mark.parametrize("quote", QUOTES)
def test_a_quoted_message_is_in_the_sources(quote: str, texts: list[str]) -> None:
    fixed = [part for part in map(str.strip, _PLACEHOLDER.split(quote)) if re.search(r"\w{3}", part)]
    assert fixed
    assert any(all(part in text for part in fixed) for text in texts), f"no message has {fixed}"
