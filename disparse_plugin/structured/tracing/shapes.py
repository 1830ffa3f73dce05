"""What operations that move, cut and join dimensions do with the labels of their inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .labels import Row, Rows
from .noted import Noted, broadcast, tensors_in


def same(noted: Noted, args: Sequence[Any], _: dict[str, Any], out: Any) -> list[Rows]:
    """Keep the labels of the first input where the size stays: copies, pooling, softmax."""
    rows, old = noted.rows(args[0]), args[0].shape
    results = []
    for result in tensors_in(out):
        if result.dim() != len(rows):
            noted.labels.freeze(*rows)
            return [(None,) * t.dim() for t in tensors_in(out)]
        stays = [old[d] == result.shape[d] for d in range(len(rows))]
        noted.labels.freeze(*(row for row, stay in zip(rows, stays, strict=True) if not stay))
        results.append(tuple(row if stay else None for row, stay in zip(rows, stays, strict=True)))
    return results


def across(noted: Noted, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> list[Rows]:
    """Work across some dimensions, which must stay: zeros have their part in a softmax, and places in an order."""
    wanted, rows = (args[1] if len(args) > 1 else kwargs.get("dim", -1)), list(noted.rows(args[0]))
    for dim in [wanted] if isinstance(wanted, int) else wanted:
        noted.labels.freeze(rows[dim])
        rows[dim] = None
    return [tuple(rows)] * len(list(tensors_in(out)))


def reduced(noted: Noted, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> list[Rows]:
    """Drop the dimensions that are summed up; their positions may go, as they are zero where they are masked."""
    rows = noted.rows(args[0])
    wanted = args[1] if len(args) > 1 else kwargs.get("dim")
    if isinstance(wanted, bool) or not isinstance(wanted, int | list | tuple) or wanted == []:
        wanted = range(len(rows))
    gone = {d % max(1, len(rows)) for d in ([wanted] if isinstance(wanted, int) else wanted)}
    results = []
    for result in tensors_in(out):
        if result.dim() == len(rows):
            results.append(tuple(None if d in gone else row for d, row in enumerate(rows)))
        else:
            results.append(tuple(row for d, row in enumerate(rows) if d not in gone))
    return results


def norm(noted: Noted, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> list[Rows]:
    """Drop the dimensions over which a norm goes; its order comes before them."""
    return reduced(noted, [args[0], *args[2:]], kwargs, out)


def reshaped(noted: Noted, args: Sequence[Any], _: dict[str, Any], out: Any) -> list[Rows]:
    """Carry labels through a change of shape."""
    return [noted.labels.reshaped(noted.rows(args[0]), args[0].shape, out.shape, noted.whole)]


def restrided(noted: Noted, args: Sequence[Any], _: dict[str, Any], out: Tensor) -> list[Rows]:
    """Change the layout in memory; the shape stays, or all must."""
    rows = noted.rows(args[0])
    if len(rows) == out.dim() and list(args[1]) == list(out.shape):
        return [rows]
    noted.labels.freeze(*rows)
    return [(None,) * out.dim()]


def permuted(noted: Noted, args: Sequence[Any], _: dict[str, Any], __: Any) -> list[Rows]:
    """Reorder the dimensions."""
    rows = noted.rows(args[0])
    return [tuple(rows[d] for d in args[1])]


def transposed(noted: Noted, args: Sequence[Any], _: dict[str, Any], __: Any) -> list[Rows]:
    """Swap two dimensions."""
    rows = list(noted.rows(args[0]))
    if len(rows) > 1:
        one, other = (args[1], args[2]) if len(args) > 2 else (0, 1)
        rows[one], rows[other] = rows[other], rows[one]
    return [tuple(rows)]


def expanded(noted: Noted, args: Sequence[Any], _: dict[str, Any], out: Tensor) -> list[Rows]:
    """Repeat dimensions of size one."""
    old, rows = args[0].shape, noted.rows(args[0])
    extra = out.dim() - len(old)
    return [(None,) * extra + tuple(rows[d] if old[d] == out.shape[extra + d] else None for d in range(len(old)))]


def repeated(noted: Noted, args: Sequence[Any], _: dict[str, Any], out: Tensor) -> list[Rows]:
    """Lay copies side by side."""
    extra = out.dim() - args[0].dim()
    tiled = [
        None if row is None else np.tile(row, count)
        for row, count in zip(noted.rows(args[0]), args[1][extra:], strict=True)
    ]
    return [(None,) * extra + tuple(tiled)]


def sliced(noted: Noted, args: Sequence[Any], _: dict[str, Any], out: Tensor) -> list[Rows]:
    """Take a range of one dimension; where that is one position, as by :func:`selected`, all must stay."""
    missing: list[Any] = [0, None, None, 1]
    dim, start, end, step = [*args[1:], *missing[len(args) - 1 :]]
    rows = list(noted.rows(args[0]))
    row = rows[dim]
    if row is not None and out.shape[dim] == 1:
        noted.labels.freeze(row)
        row = None
    rows[dim] = None if row is None else row[start:end:step]
    return [tuple(rows)]


def selected(noted: Noted, args: Sequence[Any], _: dict[str, Any], __: Tensor) -> list[Rows]:
    """Take one position of a dimension, which must stay."""
    rows = list(noted.rows(args[0]))
    noted.labels.freeze(rows.pop(args[1]))
    return [tuple(rows)]


def unbound(noted: Noted, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> list[Rows]:
    """Take every position of a dimension, which must stay."""
    rows = list(noted.rows(args[0]))
    noted.labels.freeze(rows.pop(args[1] if len(args) > 1 else kwargs.get("dim", 0)))
    return [tuple(rows)] * len(out)


def split(noted: Noted, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> list[Rows]:
    """Cut a dimension into pieces. Equal ones lose the same, so that they stay equal."""
    rows, dim = noted.rows(args[0]), args[2] if len(args) > 2 else kwargs.get("dim", 0)
    row = rows[dim]
    if row is None:
        return [rows] * len(out)
    pieces = np.split(row, np.cumsum([piece.shape[dim] for piece in out])[:-1])
    if len({len(piece) for piece in pieces}) == 1:
        noted.labels.merged(pieces)
    dim %= len(rows)
    return [(*rows[:dim], piece, *rows[dim + 1 :]) for piece in pieces]


def gated(noted: Noted, args: Sequence[Any], _: dict[str, Any], __: Tensor) -> list[Rows]:
    """Multiply one half of a dimension by a function of the other."""
    rows, dim = list(noted.rows(args[0])), args[1] if len(args) > 1 else -1
    row = rows[dim]
    if row is not None:
        rows[dim] = noted.labels.merged(np.split(row, 2))
    return [tuple(rows)]


def concatenated(noted: Noted, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> list[Rows]:
    """Join labels along one dimension, and unite them along the others."""
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    inputs = [t for t in args[0] if t.dim() == out.dim()]
    found: list[Row | None] = []
    for d in range(out.dim()):
        own = [noted.rows(t)[d] for t in inputs]
        if d != dim:
            found.append(noted.labels.merged(own) if out.shape[d] > 1 else None)
        elif all(row is None for row in own):
            found.append(None)
        else:
            zeros = (np.zeros(t.shape[d], dtype=np.int64) for t in inputs)
            found.append(np.concatenate([z if row is None else row for z, row in zip(zeros, own, strict=True)]))
    return [tuple(found)]


def stacked(noted: Noted, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> list[Rows]:
    """Lay tensors along a new dimension."""
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    rows = list(broadcast(noted, args[0], args[0][0].shape))
    return [(*rows[:dim], None, *rows[dim:])]


def rolled(noted: Noted, args: Sequence[Any], _: dict[str, Any], __: Tensor) -> list[Rows]:
    """Move positions along some dimensions, which must stay."""
    rows = list(noted.rows(args[0]))
    for dim in args[-1]:
        noted.labels.freeze(rows[dim])
        rows[dim] = None
    return [tuple(rows)]


def shuffled(noted: Noted, args: Sequence[Any], _: dict[str, Any], out: Tensor) -> list[Rows]:
    """Turn blocks of channels into pixels."""
    *batch, channels, _h, _w = noted.rows(args[0])
    if channels is None:
        return [(None,) * out.dim()]
    blocks = channels.reshape(-1, args[1] ** 2)
    noted.labels.unite(blocks[:, :1], blocks)
    return [(*batch, blocks[:, 0], None, None)]


def unshuffled(noted: Noted, args: Sequence[Any], _: dict[str, Any], __: Tensor) -> list[Rows]:
    """Turn pixels into blocks of channels."""
    *batch, channels, _h, _w = noted.rows(args[0])
    return [(*batch, None if channels is None else channels.repeat(args[1] ** 2), None, None)]


def embedded(noted: Noted, args: Sequence[Any], _: dict[str, Any], out: Tensor) -> list[Rows]:
    """Look rows up: there must be all of them."""
    rows = noted.rows(args[0])
    noted.labels.freeze(rows[0])
    return [(None,) * (out.dim() - 1) + (rows[1],)]


def indexed(noted: Noted, args: Sequence[Any], _: dict[str, Any], out: Tensor) -> list[Rows]:
    """Look positions up along some dimensions, which must stay."""
    rows, places = noted.rows(args[0]), [n for n, index in enumerate(args[1]) if index is not None]
    noted.labels.freeze(*(rows[n] for n in places))
    if places != list(range(places[0], places[-1] + 1)):
        noted.labels.freeze(*rows)
        return [(None,) * out.dim()]
    new = out.dim() - (len(rows) - len(places))
    return [(*rows[: places[0]], *(None,) * new, *rows[places[-1] + 1 :])]


def along(noted: Noted, args: Sequence[Any], _: dict[str, Any], __: Tensor) -> list[Rows]:
    """Look positions up along one dimension, which must stay."""
    rows = list(noted.rows(args[0]))
    noted.labels.freeze(rows[args[1]])
    rows[args[1]] = None
    return [tuple(rows)]
