"""Budgets: how many weights go from which part of the network, and how many stay in every tensor.

One total amount lets the scores decide where the weights go. At extreme sparsity that can empty a layer, which cuts the
network in two, or starve the heads to spare the trunk. Two options prevent it, both off by default and both exact:

* ``min_keep``: of every tensor, the ``min_keep`` entries with the highest agreement scores are protected. What is
  removed are the lowest of the others, still exactly as many as asked for.
* an amount for each *part*: ``"shared"`` is what two or more tasks reach, a task's name what that task alone reaches.
  The agreement scores are as ever (percentiles among all that a task reaches), but every part has a cut of its own.

The tie rule is that of :mod:`disparse_plugin.agreement.ranking`: of two equal scores the one that comes first goes
first, so the protected one is the later.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import numbers
from collections.abc import Collection, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ..arbiters import Arbiter, ignores_absent_tasks
from .amounts import check_amount, count_to_prune
from .cut import lowest_by_agreement
from .percentiles import AliveScores, agreement
from .ranking import count_true, highest, lowest

# How much is pruned: of everything, or of each part by its name.
Amount: TypeAlias = float | Mapping[str, float]

SHARED = "shared"


@dataclasses.dataclass(frozen=True)
class Cut:
    """How many entries go from which tensors.

    Attributes:
        tensors: Indices of the tensors that are cut together.
        count: How many of their alive entries go.
        part: What the user calls them; empty where it is everything.
    """

    tensors: tuple[int, ...]
    count: int
    part: str = ""


def check_budget(amount: Amount, min_keep: float = 0) -> None:
    """Check a budget as far as that is possible without scores.

    Args:
        amount: As in :meth:`disparse_plugin.TaskScores.masks`.
        min_keep: As in :meth:`disparse_plugin.TaskScores.masks`.

    Raises:
        TypeError: If an amount or ``min_keep`` is not a number, or a part's name is not a string.
        ValueError: If one is out of range, or there is no part.

    Example:
        >>> check_budget({"shared": 0.9, "depth": 100}, min_keep=8)
        >>> check_budget(0.9, min_keep=1.0)
        Traceback (most recent call last):
        ValueError: min_keep: a float must be a fraction above 0 and below 1, found 1.0; a count is an int, 0 is off
    """
    if isinstance(amount, Mapping):
        if not amount:
            raise ValueError(f"amount: at least one part is needed, found none; e.g. {{{SHARED!r}: 0.9, 'task': 0.5}}")
        for part, value in amount.items():
            if not isinstance(part, str):
                raise TypeError(f"amount: a part must be a string, found {type(part).__name__}: {part!r}")
            check_amount(value, _called(part))
    else:
        check_amount(amount)
    if isinstance(min_keep, bool) or not isinstance(min_keep, numbers.Real):
        raise TypeError(
            f"min_keep: must be an int (weights per tensor) or a float (fraction of each tensor), found "
            f"{type(min_keep).__name__}: {min_keep!r}"
        )
    if isinstance(min_keep, numbers.Integral):
        if min_keep < 0:
            raise ValueError(f"min_keep: an int must be a count of at least 0, found {min_keep}; 0 is off")
    elif not 0.0 < float(min_keep) < 1.0:
        raise ValueError(
            f"min_keep: a float must be a fraction above 0 and below 1, found {min_keep}; a count is an int, 0 is off"
        )


def kept_at_least(min_keep: float, weights: int, alive: int) -> int:
    """Turn ``min_keep`` into the number of entries of one tensor that stay.

    A count is taken as it is. A fraction is one of all the tensor's weights, pruned ones included, so that it does not
    shrink when pruning is repeated: ``round(min_keep * weights)``, but at least 1. More than what is alive cannot stay.

    Args:
        min_keep: A count (int) or a fraction (float in (0, 1)).
        weights: Size of the tensor.
        alive: How many of its entries are not pruned yet.

    Example:
        >>> [kept_at_least(8, 100, 100), kept_at_least(8, 100, 5), kept_at_least(0.02, 100, 50)]
        [8, 5, 2]
        >>> kept_at_least(0.02, 9, 9)
        1
    """
    count = int(min_keep) if isinstance(min_keep, numbers.Integral) else max(1, round(float(min_keep) * weights))
    return min(count, alive)


def part_of(reaching: Collection[str]) -> str:
    """Name the part of a parameter that the given tasks reach.

    Example:
        >>> part_of({"depth"}), part_of({"depth", "normals"})
        ('depth', 'shared')
    """
    return next(iter(reaching)) if len(reaching) == 1 else SHARED


def plan(amount: Amount, scores: AliveScores, tasks: Sequence[str], floors: Sequence[int]) -> list[Cut]:
    """Turn a budget into exact counts, and check that they can be met.

    Args:
        amount: One amount for everything, or one for each part.
        scores: The alive scores of each parameter.
        tasks: All task names.
        floors: How many entries of each parameter stay at least.

    Returns:
        One cut for everything, or one for each part that has weights.

    Raises:
        ValueError: If a part with weights is not named, a name is unknown or ambiguous, a count is larger than what is
            alive, or less may go than is to go.
    """
    sizes = [_only(rows).numel() for rows in scores]
    if isinstance(amount, Mapping):
        parts = [part_of(rows) for rows in scores]
        _check_parts(amount, parts, sizes, tasks)
        members = {part: tuple(i for i, found in enumerate(parts) if found == part) for part in amount}
        cuts = [
            Cut(own, count_to_prune(amount[part], sum(sizes[i] for i in own), _called(part)), part)
            for part, own in members.items()
        ]
    else:
        cuts = [Cut(tuple(range(len(sizes))), count_to_prune(amount, sum(sizes)))]
    for cut in cuts:
        check_room(cut.count, sum(sizes[i] for i in cut.tensors), sum(floors[i] for i in cut.tensors), cut.part)
    return [cut for cut in cuts if cut.tensors]


def check_room(count: int, alive: int, protected: int, part: str = "") -> None:
    """Check that what is to go is not protected.

    Raises:
        ValueError: If fewer than ``count`` of the alive entries are not protected.

    Example:
        >>> check_room(95, alive=100, protected=10)
        Traceback (most recent call last):
        ValueError: min_keep: must leave enough to prune, found 95 of 100 to prune and 10 protected; lower either
    """
    if count > alive - protected:
        where = f" (part {part!r})" if part else ""
        raise ValueError(
            f"min_keep: must leave enough to prune, found {count} of {alive}{where} to prune and {protected} "
            "protected; lower either"
        )


def lowest_in_budget(
    scores: AliveScores, tasks: Sequence[str], arbiter: Arbiter, cuts: Sequence[Cut], floors: Sequence[int]
) -> list[Tensor]:
    """Mark what goes: of each cut's tensors the lowest agreement scores that are not protected.

    Args:
        scores: The alive scores of each parameter.
        tasks: All task names.
        arbiter: The reduction over tasks.
        cuts: As made by :func:`plan`.
        floors: How many entries of each parameter stay at least.

    Returns:
        bool, 1-D, one per parameter, on its device; of each cut's tensors exactly ``count`` are True.
    """
    ranked = functools.cache(lambda: agreement(scores, tasks, arbiter))
    marks: dict[int, Tensor] = {}
    for cut in cuts:
        own = [floors[index] for index in cut.tensors]
        rows = [scores[index] for index in cut.tensors]
        # Where one task alone decides, its percentiles are in the order of its scores.
        alone = len({*itertools.chain(*rows)}) == 1 and ignores_absent_tasks(arbiter)
        chosen = None if alone and cut.part else lowest_by_agreement(scores, tasks, arbiter, cut.count, cut.tensors)
        if chosen is None or _protected_went(chosen, own):
            values = [_only(row) for row in rows] if alone else [ranked()[index] for index in cut.tensors]
            chosen = _lowest(values, cut.count, own)
        marks.update(zip(cut.tensors, chosen, strict=True))
    return [marks[index] for index in range(len(scores))]


def _protected_went(chosen: Sequence[Tensor], floors: Sequence[int]) -> bool:
    """Tell whether a cut that knew no protection took of it: where enough is left in a tensor, its highest are."""
    return any(mark.numel() - count_true(mark) < floor for mark, floor in zip(chosen, floors, strict=True) if floor)


def _lowest(values: Sequence[Tensor], count: int, floors: Sequence[int]) -> list[Tensor]:
    """Mark the lowest entries of several tensors that are not among the highest of their own."""
    home = values[0].device
    free = []
    for value, floor in zip(values, floors, strict=True):
        if floor:
            value = value.clone()
            value[highest(value, floor)] = torch.inf
        free.append(value.to(home))
    split = lowest(torch.cat(free), count).split([value.numel() for value in values])
    return [mark.to(value.device) for mark, value in zip(split, values, strict=True)]


def lift(values: Sequence[Tensor], floors: Sequence[int]) -> list[Tensor]:
    """Put the highest entries of each tensor above all other entries of all tensors.

    Args:
        values: Agreement scores of each parameter: 1-D, float64, in [0, 1].
        floors: How many entries of each parameter to lift.

    Returns:
        New tensors in [0, 1]: ``q / 4`` for what is not protected, which changes no order (a power of two is exact),
        and ``(3 + q) / 4`` for what is. Without anything to protect, ``values`` as they are.

    Example:
        >>> lift([torch.tensor([0.5, 0.25]), torch.tensor([1.0, 0.75])], [1, 1])
        [tensor([0.8750, 0.0625]), tensor([1.0000, 0.1875])]
    """
    if not any(floors):
        return list(values)
    lifted = []
    for value, floor in zip(values, floors, strict=True):
        result = value / 4
        result[highest(value, floor)] += 0.75
        lifted.append(result)
    return lifted


def _only(rows: Mapping[str, Tensor]) -> Tensor:
    return next(iter(rows.values()))


def _called(part: str) -> str:
    return f"amount[{part!r}]"


def _check_parts(amount: Mapping[str, float], parts: Sequence[str], sizes: Sequence[int], tasks: Sequence[str]) -> None:
    if SHARED in tasks:
        raise ValueError(
            f"amount: with amounts per part no task may be called {SHARED!r}, found one; that is the name of what two "
            "or more tasks reach: rename the task, or pass one amount"
        )
    known = [SHARED, *tasks]
    for part in amount:
        if part not in known:
            raise ValueError(f"amount: a part must be one of {', '.join(known)}, found {part!r}")
    missing = [part for part in known if part in parts and part not in amount]
    if missing:
        found = ", ".join(
            f"{part} ({sum(size for size, own in zip(sizes, parts, strict=True) if own == part)} weights)"
            for part in missing
        )
        raise ValueError(
            f"amount: every part that has weights must be named, found none for {found}; 0 leaves it whole"
        )
