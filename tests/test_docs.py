"""The pages: their Python can be copied, and their tables are whole."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^    .*\n|^\n(?=    ))+", re.MULTILINE)
PYTHON = re.compile(r"^(?:def|class|import|from|@\w|# \w+\.py)\b", re.MULTILINE)


def code(page: str) -> Iterator[str]:
    """Yield the page's blocks of Python: those with a fence that says so, and indented ones that begin like it."""
    yield from (text for language, text in FENCED.findall(page) if language == "python")
    for block in INDENTED.findall(FENCED.sub("", page)):
        for part in re.split(r"\n(?=compress )", textwrap.dedent(block)):
            if PYTHON.match(part.lstrip()):
                yield part


def cells(line: str) -> int:
    """Return the number of cells in a row of a table."""
    return len(re.findall(r"(?<!\\)\|", line)) - 1


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_page_is_whole(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    for block in code(page):
        ast.parse(block)
    width = 0
    for line in FENCED.sub("", page).splitlines():
        if re.match(r"^\|", line):
            assert line.rstrip().endswith("|"), line
            assert width in (0, cells(line)), line
            width = cells(line)
        else:
            width = 0


def test_code_is_found() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    assert sum("sum(plan.widths.values())" in block for block in code(page)) == 1
