"""The ways to one and the same cut: which is taken where."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..arbiters import Arbiter, ignores_absent_tasks, is_order_statistic, sum_of_shares
from .band import lowest_in_band, pays
from .by_sums import lowest_by_sums
from .candidates import Candidates, first_of, joined_on_one_device
from .counting import lowest_by_counting
from .joined import join_neighbours
from .percentiles import agreement
from .ranking import lowest

# Up to so many entries a CPU ranks them all, and up to so many an accelerator, where counting has to wait for it.
COUNTED = 2**15
COUNTED_THERE = 2**22


def lowest_by_agreement(
    candidates: Candidates,
    tasks: Sequence[str],
    arbiter: Arbiter,
    count: int,
    within: Sequence[int] | None = None,
) -> list[Tensor]:
    """Mark the ``count`` units with the lowest agreement scores.

    Args:
        candidates: What is ranked.
        tasks: All task names.
        arbiter: The reduction over tasks.
        count: How many units to mark, over all parameters that are cut.
        within: Indices of the parameters that are cut, in ascending order; by default all. Agreement scores are those
            among all parameters in any case.

    Returns:
        bool, 1-D, one per parameter that is cut, on its device; exactly ``count`` are True. Ties as in
        :mod:`disparse_plugin.agreement.ranking`.
    """
    within = range(len(candidates.scores)) if within is None else within
    if 0 in candidates.sizes:
        return _without_empty(candidates, tasks, arbiter, count, within)
    total = sum(candidates.sizes[index] for index in within)
    on_cpu = candidates.devices == {torch.device("cpu")}
    if 0 < count < total and len(candidates.devices) == 1:
        way = _lowest if on_cpu else _lowest_of_neighbours
        if total > (COUNTED if on_cpu else COUNTED_THERE):
            marks = way(candidates, tasks, arbiter, count, within)
            if marks is not None:
                return marks
    every = agreement(candidates, tasks, arbiter)
    return lowest_of([every[index] for index in within], count, candidates.magnitudes_of(within))


def _without_empty(
    candidates: Candidates, tasks: Sequence[str], arbiter: Arbiter, count: int, within: Sequence[int]
) -> list[Tensor]:
    """Leave out the parameters of which nothing is alive: they may be all that a task reaches."""
    places = {index: place for place, index in enumerate(i for i, size in enumerate(candidates.sizes) if size)}
    scores = [candidates.scores[index] for index in places]
    inner = dataclasses.replace(candidates, scores=scores, magnitudes=candidates.magnitudes_of(places))
    cut = [places[index] for index in within if index in places]
    marks = iter(lowest_by_agreement(inner, tasks, arbiter, count, cut) if cut else ())
    none = [torch.zeros(0, dtype=torch.bool, device=first_of(rows).device) for rows in candidates.scores]
    return [next(marks) if index in places else none[index] for index in within]


def _lowest_of_neighbours(
    candidates: Candidates, tasks: Sequence[str], arbiter: Arbiter, count: int, within: Sequence[int]
) -> list[Tensor] | None:
    joined, groups = join_neighbours(candidates, within)
    those = set(within)
    cut = [place for place, group in enumerate(groups) if group[0] in those]
    marks = _lowest(joined, tasks, arbiter, count, cut)
    if marks is None:
        return None
    sizes = [[candidates.sizes[index] for index in groups[place]] for place in cut]
    return [part for mark, own in zip(marks, sizes, strict=True) for part in mark.split(own)]


def _lowest(
    candidates: Candidates, tasks: Sequence[str], arbiter: Arbiter, count: int, within: Sequence[int]
) -> list[Tensor] | None:
    """Look near the cut alone, where a sample tells where it is; else count; None where neither can be done."""
    if arbiter is sum_of_shares:
        return lowest_by_sums(candidates, tasks, count, within) if candidates.shares else None
    if not ignores_absent_tasks(arbiter):
        return None
    marks = None
    tasks = [task for task, total in candidates.totals(tasks).items() if total]  # all that one reaches may be pruned
    if is_order_statistic(arbiter) and pays(sum(candidates.sizes[index] for index in within), len(tasks)):
        marks = lowest_in_band(candidates, tasks, arbiter, count, within)
    return lowest_by_counting(candidates, tasks, arbiter, count, within) if marks is None else marks


def lowest_of(values: Sequence[Tensor], count: int, magnitudes: Sequence[Tensor] | None) -> list[Tensor]:
    """Mark the lowest entries of several tensors together; bool, one for each, on its device."""
    joined = None if magnitudes is None else joined_on_one_device(magnitudes)
    marked = lowest(joined_on_one_device(values), count, joined)
    split = marked.split([value.numel() for value in values])
    return [part.to(value.device) for part, value in zip(split, values, strict=True)]
