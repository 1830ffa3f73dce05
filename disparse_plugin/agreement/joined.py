"""Neighbouring parameters taken as one: an accelerator works on few long tensors faster than on many short ones.

Nothing is held twice: what is joined is joined whenever it is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .candidates import Candidates

# Entries of neighbours that are taken together.
TOGETHER = 2**24


def join_neighbours(candidates: Candidates, apart: Sequence[int]) -> tuple[Candidates, list[list[int]]]:
    """Join parameters that follow each other and that the same tasks reach, up to ``TOGETHER`` entries.

    Args:
        candidates: What is ranked.
        apart: Indices of parameters that are not to be joined with others than these.

    Returns:
        The same candidates, joined, and which parameters each of the joined ones is made of.

    Example:
        >>> pair = Candidates([{"a": torch.tensor([3.0])}, {"a": torch.tensor([1.0, 2.0])}])
        >>> joined, groups = join_neighbours(pair, [0, 1])
        >>> joined.scores[0]["a"], groups
        (tensor([3., 1., 2.]), [[0, 1]])
    """
    those = set(apart)
    kinds = [(tuple(rows), index in those) for index, rows in enumerate(candidates.scores)]
    groups: list[list[int]] = []
    entries = 0
    for index, size in enumerate(candidates.sizes):
        if groups and kinds[index] == kinds[groups[-1][-1]] and entries + size <= TOGETHER:
            groups[-1].append(index)
            entries += size
        else:
            groups.append([index])
            entries = size
    magnitudes = candidates.magnitudes
    return Candidates(
        [_Rows([candidates.scores[index] for index in group]) for group in groups],
        None if magnitudes is None else _Parts(magnitudes, groups),
        candidates.shares,
    ), groups


class _Rows(Mapping[str, Tensor]):
    """The scores of some parameters by task, joined when a task is asked for."""

    def __init__(self, rows: Sequence[Mapping[str, Tensor]]) -> None:
        self._rows = rows

    def __getitem__(self, task: str) -> Tensor:
        return _joined([rows[task] for rows in self._rows])

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows[0])

    def __len__(self) -> int:
        return len(self._rows[0])


class _Parts(Sequence[Tensor]):
    """One tensor for each group of parameters, joined when it is asked for."""

    def __init__(self, parts: Sequence[Tensor], groups: Sequence[Sequence[int]]) -> None:
        self._parts, self._groups = parts, groups

    def __getitem__(self, place: int) -> Tensor:  # type: ignore[override]
        return _joined([self._parts[index] for index in self._groups[place]])

    def __len__(self) -> int:
        return len(self._groups)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
