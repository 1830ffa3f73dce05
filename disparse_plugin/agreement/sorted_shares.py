"""Values of all ranks in one order, while each rank holds its share: a sample sort, there and back.

Every rank sorts what it has, and hands each other rank one range of values, such that all have about as many. There
they are put in order, so that a place is known among all values, and what was found for a value goes back to where it
came from. A rank holds its own values and about as many of the others, never all.

What several ranks hold (replicated weights) is sent by each, and counts at its owner only; the others learn the same.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from .._support.distributed import gathered, handed_out, several_ranks, this_rank
from ..sorting import stable_order

_Found = TypeVar("_Found")

# Samples of a rank for each rank: ranges differ by at most this part of a share.
_SAMPLES = 16


@dataclasses.dataclass(frozen=True)
class Sorted:
    """One range of all values, in order.

    Attributes:
        values: 1-D, ascending.
        counts: bool: whether an entry counts; of several that hold the same entry the one that counts comes last.
    """

    values: Tensor
    counts: Tensor

    def ranks(self) -> Tensor:
        """Return how many of all values that count come before each; int64."""
        counted = self.counts.long()
        return counted.cumsum(0) - counted + sum(self.lower(int(counted.sum())))

    def of_all(self, found: _Found) -> list[_Found]:
        """Return what each range has found, from the lowest to the highest."""
        return gathered(found)

    def lower(self, found: _Found) -> list[_Found]:
        """Return what the lower ranges have found."""
        return gathered(found)[: this_rank()]

    def higher(self, found: _Found) -> list[_Found]:
        """Return what the higher ranges have found."""
        return gathered(found)[this_rank() + 1 :]


def ranks_among_all(values: Tensor, turns: Tensor, owned: Tensor) -> Tensor:
    """Rank each entry among those of all ranks, from 0 (lowest); equal values by their turns.

    Args:
        values: What is here: 1-D, floating point, no NaN.
        turns: int64, not negative, no two of all equal.
        owned: bool: which of them count here.

    Returns:
        int64, same shape and device.

    Example:
        >>> ranks_among_all(torch.tensor([0.5, 0.1, 0.5]), torch.tensor([1, 2, 0]), torch.ones(3, dtype=torch.bool))
        tensor([2, 0, 1])
    """
    return in_order(values, turns, owned, Sorted.ranks)


def in_order(values: Tensor, turns: Tensor, owned: Tensor, function: Callable[[Sorted], Tensor]) -> Tensor:
    """Let a function see the values of all ranks in order, each rank one range, and hand back what it finds for each.

    All ranks must call it; the function may communicate.

    Args:
        values: As in :func:`ranks_among_all`.
        turns: As there; entries that are the same in value and turn go to one rank.
        owned: As there.
        function: From a range to one result for each of its entries.

    Returns:
        What the function found for each of ``values``.
    """
    values, ties = values + 0.0, 2 * turns + owned
    order = _order(values, ties)
    values, ties = values[order], ties[order]
    sizes = _range_sizes(values, ties)
    got, received = handed_out(values, sizes)
    got_ties, _ = handed_out(ties, sizes, received)
    inner = _order(got, got_ties)
    counts = (got_ties[inner] & 1).bool()
    found = function(Sorted(got[inner], counts))
    back = torch.empty_like(found)
    back[inner] = found
    returned, _ = handed_out(back, received, sizes)
    result = torch.empty_like(returned)
    result[order] = returned
    return result


def _order(values: Tensor, ties: Tensor) -> Tensor:
    first = ties.argsort()
    return first[stable_order(values[first])]


def _range_sizes(values: Tensor, ties: Tensor) -> list[int]:
    """Choose the ranges from samples of all ranks; return how many of the sorted entries here are in each."""
    if not several_ranks():
        return [values.numel()]
    sizes = gathered(values.numel())
    stride = max(1, sum(sizes) // (_SAMPLES * len(sizes) ** 2))
    sample = list(zip(values[stride // 2 :: stride].tolist(), ties[stride // 2 :: stride].tolist(), strict=True))
    every = sorted(pair for of_rank in gathered(sample) for pair in of_rank)
    borders = [0]
    for number in range(1, len(sizes)):
        place = number * len(every) // len(sizes)
        borders.append(_lower(values, ties, *every[place]) if every else 0)
    borders.append(values.numel())
    return [high - low for low, high in itertools.pairwise(borders)]


def _lower(values: Tensor, ties: Tensor, value: float, tie: int) -> int:
    """Count the sorted entries that come before a pair; those that are the same but for who owns them do not."""
    limit = torch.tensor(value, dtype=values.dtype, device=values.device)
    low = int(torch.searchsorted(values, limit))
    high = int(torch.searchsorted(values, limit, right=True))
    return low + int((ties[low:high] < tie - tie % 2).sum())
