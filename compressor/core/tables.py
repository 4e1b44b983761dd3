"""A table for people and programs: aligned rows of text that are never broken, and the same as records."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple


class Cell(NamedTuple):
    """A value with the text that shows it."""

    value: Any
    text: str


class Table:
    """Rows under named columns.

    Args:
        columns: Names of the columns.
        right: Those that are aligned to the right.
    """

    def __init__(self, *columns: str, right: tuple[str, ...] = ()) -> None:
        self.columns = columns
        self._right = tuple(name in right for name in columns)
        self._rows: list[tuple[Cell, ...]] = []

    def add(self, *values: Any) -> None:
        """Add a row: a value for each column, or a `Cell`; the text of None is empty."""
        if len(values) != len(self.columns):
            raise ValueError(f"expected {len(self.columns)} values, got {len(values)}")
        cells = (each if isinstance(each, Cell) else Cell(each, "" if each is None else str(each)) for each in values)
        self._rows.append(tuple(cells))

    def __len__(self) -> int:
        return len(self._rows)

    def records(self) -> list[dict[str, Any]]:
        """Return the values of each row by the names of the columns."""
        return [dict(zip(self.columns, (cell.value for cell in row), strict=True)) for row in self._rows]

    def lines(self) -> Iterator[str]:
        """Yield the names of the columns and each row, two blanks between columns.

        >>> table = Table("name", "ms", right=("ms",))
        >>> table.add("conv1", 0.5); table.add("fc", 12); list(table.lines())
        ['name    ms', 'conv1  0.5', 'fc      12']
        """
        rows = [self.columns, *(tuple(cell.text for cell in row) for row in self._rows)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = zip(row, widths, self._right, strict=True)
            yield "  ".join(text.rjust(wide) if right else text.ljust(wide) for text, wide, right in cells).rstrip()
