"""A table: `console.print(table)` draws it, `markdown()` writes it into a document, `text()` where there is no rich."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # an extra of the command's
    from rich.table import Table as RichTable

Row = Sequence[Any]  # of str, or of rich's Text where a cell has a style


@dataclass(frozen=True)
class Table:
    """The first `left` columns are words, aligned to the left; the others are numbers. Headings that are all empty are
    not shown. An empty row is a gap, where the table is drawn."""

    headings: Sequence[str]
    rows: Sequence[Row]
    title: str = ""
    left: int = 1

    def __rich__(self) -> RichTable:
        from rich import box, table
        from rich.text import Text

        drawn = table.Table(
            title=Text(self.title) if self.title else None, title_justify="left", title_style="bold",
            box=box.SIMPLE_HEAD, show_header=any(self.headings),
        )  # fmt: skip
        for i, heading in enumerate(self.headings):
            drawn.add_column(Text(heading), justify="left" if i < self.left else "right", no_wrap=i == 0)
        for row in self.rows:
            if row:
                drawn.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
            else:
                drawn.add_section()
        return drawn

    def markdown(self) -> str:
        """Padded, so that it reads as well in a terminal."""
        widths = self._widths()
        rule = [("-" * (width - 1) + ":") if i >= self.left else "-" * width for i, width in enumerate(widths)]
        lines = [*self._padded([self.headings], widths), rule, *self._padded(self.rows, widths)]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

    def text(self) -> str:
        """Title and rows."""
        lines = ["  " + "  ".join(cells).rstrip() for cells in self._padded(self.rows, self._widths())]
        return "\n".join([self.title, *lines])

    def _widths(self) -> list[int]:
        columns = zip(self.headings, *filter(None, self.rows), strict=True)
        return [max(len(str(cell)) for cell in column) for column in columns]

    def _padded(self, rows: Sequence[Row], widths: Sequence[int]) -> Iterator[list[str]]:
        for row in filter(None, rows):
            cells = zip(map(str, row), widths, strict=True)
            yield [c.ljust(width) if i < self.left else c.rjust(width) for i, (c, width) in enumerate(cells)]
