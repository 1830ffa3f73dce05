"""A sample of what is ranked: every stride-th entry, and what it tells of where the others lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .candidates import Candidates
from .ranking import kth_lowest

# Of how many entries one is looked at to guess where the cut lies, and how many at most.
EVERY, MOST = 8, 2**19
# How many standard errors of a quantile in the middle the guess lies off the cut, to both sides.
ERRORS = 7


def guessed(
    candidates: Candidates,
    within: Sequence[int],
    count: int,
    bounds: Callable[[Candidates], tuple[Tensor, Tensor]],
) -> tuple[float, float]:
    """Guess two agreement scores between which the ``count``-th lowest lies.

    Args:
        candidates: What is ranked.
        within: Indices of the parameters that are cut.
        count: How many units go.
        bounds: From a sample to the least and the largest agreement score that each of its units can have.
    """
    total = sum(candidates.sizes[index] for index in within)
    entries = min(MOST, max(1, total // EVERY))
    least, most = bounds(sampled(candidates, within, entries))
    share, off = count / total, ERRORS / 2 / math.sqrt(entries)
    return value_at(least, share - off), value_at(most, share + off)


def sampled(candidates: Candidates, within: Sequence[int], entries: int) -> Candidates:
    """Take about so many of the entries of some parameters, evenly spaced.

    Args:
        candidates: What is ranked.
        within: Indices of the parameters.
        entries: How many.
    """
    stride = max(1, sum(candidates.sizes[index] for index in within) // entries)
    while stride % 2 == 0 or stride % 3 == 0 or stride % 5 == 0 or stride % 7 == 0:
        stride += 1  # kernels have 9, 25 or 49 places; a stride that divides them would see only some
    rows = [{task: row[::stride] for task, row in candidates.scores[index].items()} for index in within]
    return Candidates(rows, shares=candidates.shares)


def value_at(values: Tensor, share: float) -> float:
    """Return the value at a quantile; infinite beyond the ends.

    Example:
        >>> value_at(torch.arange(101.0), 0.375), value_at(torch.arange(101.0), -0.25)
        (37.0, -inf)
    """
    last = values.numel() - 1
    place = math.floor(share * last)
    if 0 <= place <= last:
        return kth_lowest(values, place + 1)
    return math.copysign(torch.inf, place)
