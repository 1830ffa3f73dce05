"""Plain tables for reports: the first columns to the left, numbers to the right."""

from __future__ import annotations

from collections.abc import Sequence


def draw(rows: Sequence[Sequence[str]], *, left: int = 1, rule_before: int | None = None) -> str:
    """Align the columns of a table.

    Args:
        rows: The cells, row by row; the header is a row like the others.
        left: How many columns, from the first, are aligned to the left; the others to the right.
        rule_before: Draw a rule before this row, or none.

    Returns:
        The lines, joined; none ends in a space.

    Example:
        >>> print(draw([("layer", "alive"), ("trunk", "12"), ("all", "112")], rule_before=2))
        layer  alive
        trunk     12
        ------------
        all      112
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(_aligned(row, widths, left)).rstrip() for row in rows]
    if rule_before is not None:
        lines.insert(rule_before, "-" * max(map(len, lines)))
    return "\n".join(lines)


def _aligned(row: Sequence[str], widths: Sequence[int], left: int) -> list[str]:
    return [
        cell.ljust(width) if place < left else cell.rjust(width)
        for place, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]


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
