"""A sample of what is ranked: every stride-th entry, and what it tells of where the others lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .candidates import Candidates
from .ranking import kth_lowest


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


def values_around(values: Tensor, share: float, half_width: float) -> tuple[float, float]:
    """Return the values at the quantiles ``share - half_width`` and ``share + half_width``; infinite beyond the ends.

    Example:
        >>> values_around(torch.arange(101.0), 0.5, 0.125)
        (37.0, 62.0)
        >>> values_around(torch.arange(101.0), 0.5, 0.75)
        (-inf, inf)
    """
    last = values.numel() - 1
    low, high = (int((share + shift) * last) for shift in (-half_width, half_width))
    return (
        kth_lowest(values, low + 1) if low >= 0 else -torch.inf,
        kth_lowest(values, high + 1) if high <= last else torch.inf,
    )
