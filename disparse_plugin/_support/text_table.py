"""Plain tables for reports: as text no wider than the terminal, as HTML for notebooks, as rows for pandas."""

from __future__ import annotations

import abc
import dataclasses
import html
import importlib
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

Row = Sequence[str]

_FALLBACK = (120, 24)  # where there is no terminal, as in a file or a pipe
_SHORTEST = 16  # letters that are left of a name, at least


@dataclasses.dataclass(frozen=True)
class Table:
    """A table with a header, and what is said before and after it.

    Attributes:
        rows: The cells, row by row; the first row is the header.
        left: How many columns, from the first, are aligned to the left; the others to the right.
        rule_before: Draw a rule before this row, or none.
        before: Lines above.
        after: Lines below.
    """

    rows: Sequence[Row]
    left: int = 1
    rule_before: int | None = None
    before: Sequence[str] = ()
    after: Sequence[str] = ()

    def text(self, width: int | None = None) -> str:
        """Draw it as text.

        Args:
            width: The most letters in a line; by default what the terminal shows.

        Example:
            >>> print(Table([("layer", "alive"), ("trunk", "12")], before=["Alive:"]).text())
            Alive:
            layer  alive
            trunk     12
        """
        width = shutil.get_terminal_size(_FALLBACK).columns if width is None else width
        above, below = (_wrapped(lines, width) for lines in (self.before, self.after))
        return "\n".join([*above, draw(self.rows, left=self.left, rule_before=self.rule_before, width=width), *below])

    def html(self) -> str:
        """Return it as a piece of HTML, for notebooks and reports.

        Example:
            >>> Table([("layer",), ("a < b",)]).html()  # doctest: +ELLIPSIS
            '<div style="overflow-x:auto"><table>...<td style="text-align:left">a &lt; b</td>...</table></div>'
        """
        header, *rows = self.rows
        head = f"<thead><tr>{self._cells(header, 'th')}</tr></thead>"
        body = "".join(f"<tr>{self._cells(row, 'td')}</tr>" for row in rows)
        above, below = ("".join(f"<p>{escaped(line)}</p>" for line in lines) for lines in (self.before, self.after))
        return f'{above}<div style="overflow-x:auto"><table>{head}<tbody>{body}</tbody></table></div>{below}'

    def _cells(self, row: Row, tag: str) -> str:
        sides = ["left" if place < self.left else "right" for place in range(len(row))]
        return "".join(
            f'<{tag} style="text-align:{side}">{escaped(cell)}</{tag}>' for cell, side in zip(row, sides, strict=True)
        )


class Tabular(abc.ABC):
    """A report that is a table: printed, shown in a notebook, or taken into pandas."""

    @abc.abstractmethod
    def rows(self) -> list[dict[str, Any]]:
        """Return flat rows of plain values."""

    @abc.abstractmethod
    def _table(self) -> Table:
        """Return the table to be shown."""

    def to_dataframe(self) -> Any:
        """Return :meth:`rows` as a ``pandas.DataFrame``.

        Raises:
            ImportError: If pandas is not installed.
        """
        try:
            pandas = importlib.import_module("pandas")
        except ImportError as error:
            raise ImportError("to_dataframe needs pandas: pip install pandas") from error
        return pandas.DataFrame(self.rows())

    def __str__(self) -> str:
        """Return the table as text, no wider than the terminal."""
        return self._table().text()

    def _repr_html_(self) -> str:
        """Return the table as notebooks show it."""
        return self._table().html()


def draw(rows: Sequence[Row], *, left: int = 1, rule_before: int | None = None, width: int | None = None) -> str:
    """Align the columns of a table.

    Args:
        rows: The cells, row by row; the header is a row like the others.
        left: How many columns, from the first, are aligned to the left; the others to the right.
        rule_before: Draw a rule before this row, or none.
        width: The most letters in a line: names are cut in the middle, and columns that still find no place follow in a
            second table below, beside the first column. None for no limit.

    Returns:
        The lines, joined; none ends in a space.

    Example:
        >>> print(draw([("layer", "alive"), ("trunk", "12"), ("all", "112")], rule_before=2))
        layer  alive
        trunk     12
        ------------
        all      112
        >>> print(draw([("layer", "alive", "of"), ("trunk", "12", "16")], width=14))
        layer  alive
        trunk     12
        <BLANKLINE>
        layer  of
        trunk  16
    """
    cells = [[readable(cell, 10_000) for cell in row] for row in rows]
    if width is not None:
        cells = _cut(cells, left, width)
    blocks = []
    for columns in _blocks(_widths(cells), left, width):
        block = [[row[place] for place in columns] for row in cells]
        widths, named = _widths(block), sum(place < left for place in columns)
        lines = ["  ".join(_aligned(row, widths, named)).rstrip() for row in block]
        if rule_before is not None:
            lines.insert(rule_before, "-" * max(map(len, lines)))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def readable(name: str, limit: int = 60) -> str:
    r"""Return a name as one line that can be drawn and encoded: nothing unprintable, long ones cut in the middle.

    Example:
        >>> readable("depth\n\ud800"), readable("encoder.layer1.conv1.weight", 12)
        ('depth??', 'encod…weight')
    """
    clean = "".join(letter if letter.isprintable() else "?" for letter in name)
    if len(clean) <= limit:
        return clean
    tail = limit // 2
    return f"{clean[: limit - tail - 1]}…{clean[-tail:]}"


def escaped(text: str) -> str:
    """Return a text as HTML shows it unchanged."""
    return html.escape(readable(text, 10_000))


def _widths(rows: Sequence[Row]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _cut(rows: list[list[str]], left: int, width: int) -> list[list[str]]:
    """Cut names where the table stands out beyond the width, the longest first.

    The first column keeps half the width, unless not even one other column finds place beside it: two names that are
    cut to the same are worse than a second table below.
    """
    widths = _widths(rows)
    limits, others = widths[:left], widths[left:]
    between = 2 * (len(widths) - 1)
    for floor, needed in ((width // 2, sum(others) + between), (_SHORTEST, max(others, default=0) + 2 * left)):
        floors = [floor, *[_SHORTEST] * (left - 1)]
        while sum(limits) + needed > width and (longest := _longest(limits, floors)) is not None:
            limits[longest] -= 1
    return [[*(readable(cell, limit) for cell, limit in zip(row, limits, strict=False)), *row[left:]] for row in rows]


def _longest(limits: Sequence[int], floors: Sequence[int]) -> int | None:
    """Return the place of the largest limit that is above its floor, or None."""
    above = [place for place, limit in enumerate(limits) if limit > floors[place]]
    return max(above, key=lambda place: limits[place], default=None)


def _blocks(widths: Sequence[int], left: int, width: int | None) -> list[list[int]]:
    """Share out the columns to tables that find place side by side with the first column; at least one each."""
    blocks, used = [list(range(left))], sum(widths[:left]) + 2 * (left - 1)
    for place in range(left, len(widths)):
        used += 2 + widths[place]
        if width is not None and used > width and (len(blocks) > 1 or len(blocks[0]) > left):
            blocks.append([0])
            used = widths[0] + 2 + widths[place]
        blocks[-1].append(place)
    return blocks


def _aligned(row: Row, widths: Sequence[int], left: int) -> list[str]:
    return [
        cell.ljust(width) if place < left else cell.rjust(width)
        for place, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]


def _wrapped(lines: Sequence[str], width: int) -> list[str]:
    clean = (readable(line, 100_000) for line in lines)
    return [part for line in clean for part in textwrap.wrap(line, width, subsequent_indent="  ") or [""]]
