"""The cut: in each quota the lowest agreement scores, without what a floor protects."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..arbiters import Arbiter, ignores_absent_tasks
from .budgets import Quota
from .candidates import Candidates, first_of
from .percentiles import agreement
from .ranking import highest
from .tallies import counts_true
from .ways import lowest_by_agreement, lowest_of


def lowest_in_budget(
    candidates: Candidates, tasks: Sequence[str], arbiter: Arbiter, quotas: Sequence[Quota], floors: Sequence[int]
) -> list[Tensor]:
    """Mark what goes: of each quota's tensors the lowest agreement scores that are not protected.

    Args:
        candidates: What is ranked.
        tasks: All task names.
        arbiter: The reduction over tasks.
        quotas: As made by :meth:`Budget.quotas`.
        floors: How many units of each parameter stay at least.

    Returns:
        bool, 1-D, one per parameter, on its device; of each quota's tensors exactly ``count`` are True.
    """
    ranked = functools.cache(lambda: agreement(candidates, tasks, arbiter))
    marks: dict[int, Tensor] = {}
    for quota in quotas:
        own = [floors[index] for index in quota.tensors]
        rows = [candidates.scores[index] for index in quota.tensors]
        # Where one task alone decides, its percentiles are in the order of its scores.
        alone = len({*itertools.chain(*rows)}) == 1 and ignores_absent_tasks(arbiter)
        chosen = None
        if not (alone and quota.part):
            chosen = lowest_by_agreement(candidates, tasks, arbiter, quota.count, quota.tensors)
        if chosen is None or _protected_went(chosen, own):
            values = [first_of(row) for row in rows] if alone else [ranked()[index] for index in quota.tensors]
            chosen = _lowest(values, quota.count, own, candidates.magnitudes_of(quota.tensors))
        marks.update(zip(quota.tensors, chosen, strict=True))
    return [marks[index] for index in range(len(candidates.scores))]


def _protected_went(chosen: Sequence[Tensor], floors: Sequence[int]) -> bool:
    """Tell whether a cut that knew no protection took of it: where enough is left in a tensor, its highest are."""
    if not any(floors):
        return False
    gone = counts_true(chosen)
    return any(mark.numel() - went < floor for mark, went, floor in zip(chosen, gone, floors, strict=True) if floor)


def _lowest(
    values: Sequence[Tensor], count: int, floors: Sequence[int], magnitudes: Sequence[Tensor] | None
) -> list[Tensor]:
    """Mark the lowest units of several tensors that are not among the highest of their own."""
    free = []
    for place, (value, floor) in enumerate(zip(values, floors, strict=True)):
        if floor:
            value = value.clone()
            value[highest(value, floor, None if magnitudes is None else magnitudes[place])] = torch.inf
        free.append(value)
    return lowest_of(free, count, magnitudes)


def lift(values: Sequence[Tensor], floors: Sequence[int], magnitudes: Sequence[Tensor] | None) -> list[Tensor]:
    """Put the highest entries of each tensor above all other entries of all tensors.

    Args:
        values: Agreement scores of each parameter: 1-D, float64, in [0, 1].
        floors: How many entries of each parameter to lift.
        magnitudes: Of equal values the larger magnitude is lifted first; or None.

    Returns:
        New tensors in [0, 1]: ``q / 4`` for what is not protected, which changes no order (a power of two is exact),
        and ``(3 + q) / 4`` for what is. Without anything to protect, ``values`` as they are.

    Example:
        >>> lift([torch.tensor([0.5, 0.25]), torch.tensor([1.0, 0.75])], [1, 1], None)
        [tensor([0.8750, 0.0625]), tensor([1.0000, 0.1875])]
    """
    if not any(floors):
        return list(values)
    lifted = []
    for place, (value, floor) in enumerate(zip(values, floors, strict=True)):
        result = value / 4
        result[highest(value, floor, None if magnitudes is None else magnitudes[place])] += 0.75
        lifted.append(result)
    return lifted
