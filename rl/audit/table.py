"""A table as the audit's page, a terminal and JSON files show it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """R rows of C cells, such as Table("Suspects", ["suspect"], [["linear ran on torch"]], "The likeliest first.")."""

    title: str
    columns: Sequence[str]  # [C]
    rows: Sequence[Sequence[Cell]]  # [R][C]
    note: str = ""

    def text(self) -> str:
        """For a terminal, columns aligned."""
        rows = [self.columns, *([_text(cell) for cell in row] for row in self.rows)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.columns))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([self.title, *lines, self.note])


def _text(cell: Cell) -> str:
    return f"{cell:.3g}" if isinstance(cell, float) else f"{cell:,}" if isinstance(cell, int) else str(cell)
