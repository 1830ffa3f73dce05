"""The exact cut by sums of shares: what a weight's agreement score is can be said of it alone, without a rank.

A sample tells two sums between which the cut lies. The shares are added up piece by piece, in their own precision: what
is surely under both goes, what is surely over both stays, and only of what lies between, a few of a hundred, the exact
sums are made. The result is the very mask that all exact sums give, or None when the sample misled.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..arbiters import sum_of_shares
from ..sorting import over, positions, taken, under
from .candidates import Candidates, first_of
from .counting import magnitudes_at, pieces
from .percentiles import agreement
from .ranking import kth_lowest, lowest
from .sample import guessed
from .tallies import counts_true, extremes

# For each task, what rounding may add to a sum, in shares of it, and more.
SLACK = 2**-22
# What lies between is looked at one by one up to this share of all.
MOST_BETWEEN = 1 / 4


def lowest_by_sums(
    candidates: Candidates, tasks: Sequence[str], count: int, within: Sequence[int]
) -> list[Tensor] | None:
    """Mark the ``count`` units with the lowest sums of shares.

    Args:
        candidates: What is ranked, by shares; on one device.
        tasks: All task names.
        count: How many units to mark: more than none, fewer than all.
        within: Indices of the parameters that are cut.

    Returns:
        As :func:`disparse_plugin.agreement.ways.lowest_by_agreement`; None if the sample misled.

    Example:
        >>> shares = Candidates([{"a": torch.linspace(0, 1, 2**15), "b": torch.zeros(2**15)}], shares=True)
        >>> [mark.nonzero().flatten().tolist() for mark in lowest_by_sums(shares, ["a", "b"], 3, [0])]
        [[0, 1, 2]]
    """
    rows = [candidates.scores[index] for index in within]
    if not _are_shares(rows):
        return None  # whoever looks at all of them says which are not
    total = sum(candidates.sizes[index] for index in within)
    limits = guessed(candidates, within, count, functools.partial(_sums_twice, tasks=tasks))
    marks, between = _sides(rows, limits, len(tasks))
    left = count - sum(counts_true(marks))
    if not 0 < left <= sum(map(len, between)) <= MOST_BETWEEN * total:
        return None
    near = [{task: taken(row, places) for task, row in own.items()} for own, places in zip(rows, between, strict=True)]
    sums = torch.cat(agreement(Candidates(near, shares=True), tasks, sum_of_shares))
    if not limits[0] <= kth_lowest(sums, left) <= limits[1]:
        return None  # where what is marked and what lies between can overlap by rounding
    last = lowest(sums, left, magnitudes_at(candidates, dict(zip(within, between, strict=True))))
    for mark, places, part in zip(marks, between, last.split([len(p) for p in between]), strict=True):
        mark.index_fill_(0, taken(places, positions(part)), True)
    return marks


def _are_shares(rows: Sequence[Mapping[str, Tensor]]) -> bool:
    ends = torch.stack([extremes(row).float() for own in rows for row in own.values() if row.numel()])
    return bool((ends.min() >= 0) & (ends.max() <= 1))


def _sums_twice(sample: Candidates, tasks: Sequence[str]) -> tuple[Tensor, Tensor]:
    sums = torch.cat(agreement(sample, tasks, sum_of_shares))
    return sums, sums


def _sides(
    rows: Sequence[Mapping[str, Tensor]], limits: tuple[float, float], tasks: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Mark what is surely under the limits, and return where what is neither surely under nor over them lies."""
    low, high = limits[0] * tasks * (1 - tasks * SLACK), limits[1] * tasks * (1 + tasks * SLACK)
    marks, between = [], []
    for own in rows:
        first = first_of(own)
        marks.append(torch.empty(first.shape, dtype=torch.bool, device=first.device))
        found = [torch.zeros(0, dtype=torch.int64, device=first.device)]
        for piece in pieces(first.numel(), first.device):
            sums = functools.reduce(torch.add, (row[piece] for row in own.values()))
            decided = under(sums, low, out=marks[-1][piece]) | over(sums, high)
            found.append(positions(~decided) + piece.start)
        between.append(torch.cat(found))
    return marks, between
