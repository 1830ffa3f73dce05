"""Labels of positions, and which of them are one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

# One label for each position along a dimension.
Row: TypeAlias = npt.NDArray[np.int64]
# The dimensions of a tensor: labels, or None for a dimension that no channel lies in.
Rows: TypeAlias = tuple[Row | None, ...]


class Labels:
    """Sets of labels that are united again and again; label 0 stands for positions that must stay.

    Example:
        >>> labels = Labels()
        >>> one, other = labels.fresh(3), labels.fresh(3)
        >>> labels.unite(one, other[::-1])
        >>> labels.freeze(other[:1])
        >>> labels.classes(one).tolist(), labels.classes(other).tolist()
        ([1, 2, 0], [0, 2, 1])
    """

    def __init__(self) -> None:
        self._parent: Row = np.zeros(1024, dtype=np.int64)
        self._count = 1

    def fresh(self, count: int) -> Row:
        """Return new labels, each alone in its set."""
        new = np.arange(self._count, self._count + count, dtype=np.int64)
        self._count += count
        while self._count > len(self._parent):
            self._parent = np.concatenate([self._parent, np.zeros_like(self._parent)])
        self._parent[new] = new
        return new

    def classes(self, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the least label of the set of each label."""
        found = self._parent[labels]
        while not np.array_equal(above := self._parent[found], found):
            found = above
        self._parent[labels] = found
        return found

    def unite(self, first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> None:
        """Unite labels pair by pair; arrays of one shape, or such that broadcast."""
        first, second = np.broadcast_arrays(first, second)
        one, other = self.classes(first.ravel()), self.classes(second.ravel())
        unequal = one != other
        for a, b in np.unique(np.stack([one[unequal], other[unequal]], 1), axis=0).tolist():
            a, b = self._top(a), self._top(b)
            self._parent[max(a, b)] = min(a, b)

    def _top(self, label: int) -> int:
        while self._parent[label] != label:
            label = int(self._parent[label])
        return label

    def freeze(self, *rows: Row | None) -> None:
        """Let positions stay."""
        for row in rows:
            if row is not None:
                self.unite(row, np.zeros_like(row))

    def merged(self, rows: Sequence[Row | None]) -> Row | None:
        """Unite the labels of one dimension of several tensors; those that meet a dimension without labels stay."""
        known = [row for row in rows if row is not None]
        if len(known) < len(rows):
            self.freeze(*known)
            return None
        for row in known[1:]:
            self.unite(known[0], row)
        return known[0] if known else None

    def reshaped(self, rows: Rows, old: Sequence[int], new: Sequence[int], whole: bool) -> Rows:
        """Carry labels through a change of shape.

        Where a dimension with labels is cut into several, one of them can shrink: labels are united along the others.

        Args:
            rows: Labels of each dimension before.
            old: The shape before.
            new: The shape after, of as many entries.
            whole: Whether of several dimensions the second largest shrinks (whole heads), and not the largest (the
                width of heads).
        """
        found: list[Row | None] = []
        for first, last, sizes in _blocks(old, new):
            found += self._block(rows[first:last], old[first:last], sizes, whole)
        return tuple(found)

    def _block(self, rows: Rows, old: Sequence[int], new: Sequence[int], whole: bool) -> list[Row | None]:
        known = [n for n, row in enumerate(rows) if row is not None]
        if not known:
            return [None] * len(new)
        main = max(known, key=lambda n: old[n])
        self.freeze(*(rows[n] for n in known if n != main))
        row = rows[main]
        assert row is not None
        along = row.reshape([-1 if n == main else 1 for n in range(len(old))])
        grid = np.broadcast_to(along, old).reshape(new)
        wide = [n for n, size in enumerate(new) if size > 1]
        if not wide:
            self.freeze(row)
            return [None] * len(new)
        exact = [n for n in wide if bool((grid == grid.take([0], n)).all()) is False and _constant_but(grid, n)]
        place = exact[0] if exact else self._shrinking(grid, wide, whole)
        turned = np.moveaxis(grid, place, 0).reshape(new[place], -1)
        self.unite(turned[:, :1], turned)
        result: list[Row | None] = [None] * len(new)
        result[place] = turned[:, 0].copy()
        return result

    @staticmethod
    def _shrinking(grid: Any, wide: Sequence[int], whole: bool) -> int:
        counts = {n: len(np.unique(np.moveaxis(grid, n, 0).reshape(grid.shape[n], -1)[:, 0])) for n in wide}
        order = sorted(wide, key=lambda n: (counts[n], n), reverse=True)
        return order[1] if whole and len(order) > 1 else order[0]


def _constant_but(grid: Any, place: int) -> bool:
    turned = np.moveaxis(grid, place, 0).reshape(grid.shape[place], -1)
    return bool((turned == turned[:, :1]).all())


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[int, int, list[int]]]:
    """Pair the smallest runs of dimensions of equal products: first and last of the old ones, sizes of the new."""
    found, i, j = list[tuple[int, int, list[int]]](), 0, 0
    while i < len(old) or j < len(new):
        start, first = i, j
        one, other = (old[i], 0) if i < len(old) else (1, 0)
        i = min(i + 1, len(old))
        other = new[j] if j < len(new) else 1
        j = min(j + 1, len(new))
        while one != other:
            if one < other:
                one, i = one * old[i], i + 1
            else:
                other, j = other * new[j], j + 1
        while i < len(old) and old[i] == 1 and (j >= len(new) or new[j] != 1):
            i += 1
        while j < len(new) and new[j] == 1 and (i >= len(old) or old[i] != 1):
            j += 1
        found.append((start, i, list(new[first:j])))
    return found
