"""Budgets: how many units go from which part of the network, and how many stay in every tensor.

One total amount lets the scores decide where the weights go. At extreme sparsity that can empty a layer, which cuts the
network in two, or starve the heads to spare the trunk. Two options prevent it, both off by default and both exact:

* ``min_keep``: of every tensor, the ``min_keep`` entries with the highest agreement scores are protected. What is
  removed are the lowest of the others, still exactly as many as asked for.
* an amount for each *part*: ``"shared"`` is what two or more tasks reach, a task's name what that task alone reaches.
  The agreement scores are as ever (percentiles among all that a task reaches), but every part has a cut of its own.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

from ..errors import wrong
from .amounts import check_amount, count_to_prune, warn_of_percentage
from .candidates import Candidates

# How much is pruned: of everything, or of each part by its name.
Amount: TypeAlias = float | Mapping[str, float]

SHARED = "shared"


@dataclasses.dataclass(frozen=True)
class Quota:
    """How many units go from which tensors.

    Attributes:
        tensors: Indices of the tensors that are cut together.
        count: How many of their alive units go.
        part: What the user calls them; empty where it is everything.
    """

    tensors: tuple[int, ...]
    count: int
    part: str = ""


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much is removed and what stays in any case, checked; wherever an ``amount`` goes, this goes too.

    Attributes:
        amount: A fraction of what is alive (float in [0, 1]), a count (int), or one of these for each part; None where
            a pattern says it.
        min_keep: How many units of every tensor stay at least (int), or which fraction of it (float in (0, 1)).

    Raises:
        TypeError: If an amount or ``min_keep`` is not a number, or a part's name is not a string.
        ValueError: If one is out of range, or there is no part.

    Example:
        >>> Budget({"shared": 0.9, "depth": 100}, min_keep=8).min_keep
        8
        >>> Budget(0.9, min_keep=1.0)
        Traceback (most recent call last):
        ValueError: min_keep: a float must be a fraction above 0 and below 1, found 1.0; a count is an int, 0 is off
    """

    amount: Amount | None = None
    min_keep: float = 0

    def __post_init__(self) -> None:
        if isinstance(self.amount, Mapping):
            _check_part_amounts(self.amount)
            object.__setattr__(self, "amount", MappingProxyType(dict(self.amount)))
        elif self.amount is not None:
            check_amount(self.amount)
        _check_min_keep(self.min_keep)

    def __reduce__(self) -> tuple[type[Budget], tuple[Amount | None, float]]:
        """Make it anew: a read-only mapping can be neither pickled nor copied."""
        amount = dict(self.amount) if isinstance(self.amount, Mapping) else self.amount
        return type(self), (amount, self.min_keep)

    @classmethod
    def of(cls, amount: Amount | Budget | None, min_keep: float = 0) -> Budget:
        """Take what a caller has: an amount and ``min_keep``, or a budget made of them before.

        Raises:
            TypeError: As the class.
            ValueError: As the class, or if ``min_keep`` comes beside a budget.
        """
        if not isinstance(amount, Budget):
            return cls(amount, min_keep)
        if min_keep:
            raise ValueError(f"min_keep: must be left out beside a Budget, found {min_keep}; it holds its own")
        return amount

    def kept_of(self, weights: int, alive: int) -> int:
        """Return how many units of one tensor stay at least.

        A count is taken as it is. A fraction is one of all the tensor's units, pruned ones included, so that it does
        not shrink when pruning is repeated: ``round(min_keep * weights)``, but at least 1. More than what is alive
        cannot stay.

        Args:
            weights: How many units the tensor has.
            alive: How many of them are not pruned yet.

        Example:
            >>> [Budget(min_keep=8).kept_of(100, 100), Budget(min_keep=8).kept_of(100, 5)]
            [8, 5]
            >>> [Budget(min_keep=0.02).kept_of(100, 50), Budget(min_keep=0.02).kept_of(9, 9)]
            [2, 1]
        """
        if isinstance(self.min_keep, numbers.Integral):
            return min(int(self.min_keep), alive)
        return min(max(1, round(float(self.min_keep) * weights)), alive)

    def required_amount(self) -> Amount:
        """Return the amount.

        Raises:
            TypeError: If there is none.
        """
        if self.amount is None:
            raise TypeError("amount: must be a float (fraction) or an int (count), found NoneType; 90 % is amount=0.9")
        return self.amount

    def quotas(self, candidates: Candidates, tasks: Sequence[str], floors: Sequence[int]) -> list[Quota]:
        """Turn the amounts into exact counts, and check that they can be met.

        Args:
            candidates: What is ranked.
            tasks: All task names.
            floors: How many units of each parameter stay at least, by :meth:`kept_of`.

        Returns:
            One quota for everything, or one for each part that has units.

        Raises:
            TypeError: If there is no amount.
            ValueError: If a part with units is not named, a name is unknown or ambiguous, a count is larger than what
                is alive, or less may go than is to go.
        """
        sizes = candidates.sizes
        amount = self.required_amount()
        if isinstance(amount, Mapping):
            quotas = _quotas_of_parts(amount, candidates, tasks)
        else:
            quotas = [Quota(tuple(range(len(sizes))), count_to_prune(amount, sum(sizes)))]
        for quota in quotas:
            own = sum(sizes[i] for i in quota.tensors)
            check_room(quota.count, own, sum(floors[i] for i in quota.tensors), quota.part)
        return [quota for quota in quotas if quota.tensors]


def _quotas_of_parts(amount: Mapping[str, float], candidates: Candidates, tasks: Sequence[str]) -> list[Quota]:
    sizes, parts = candidates.sizes, [part_of(rows) for rows in candidates.scores]
    _check_parts(amount, parts, sizes, tasks)
    members = {part: tuple(i for i, found in enumerate(parts) if found == part) for part in amount}
    return [
        Quota(own, count_to_prune(amount[part], sum(sizes[i] for i in own), _called(part)), part)
        for part, own in members.items()
    ]


def part_of(reaching: Collection[str]) -> str:
    """Name the part of a parameter that the given tasks reach.

    Example:
        >>> part_of({"depth"}), part_of({"depth", "normals"})
        ('depth', 'shared')
    """
    return next(iter(reaching)) if len(reaching) == 1 else SHARED


def warn_of_percentages(amount: object, candidates: Candidates, unit: str = "weights") -> None:
    """Warn of counts that may be meant as percentages, of everything or of a part.

    Args:
        amount: What the user passed; a :class:`Budget` is made by code, which has counted.
        candidates: What is ranked.
        unit: What is counted.
    """
    if isinstance(amount, Mapping):
        parts = [part_of(rows) for rows in candidates.scores]
        for part, value in amount.items():
            own = sum(size for size, found in zip(candidates.sizes, parts, strict=True) if found == part)
            warn_of_percentage(value, own, _called(part), unit)
    elif not isinstance(amount, Budget):
        warn_of_percentage(amount, sum(candidates.sizes), unit=unit)


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


def _check_part_amounts(amount: Mapping[str, float]) -> None:
    if not amount:
        raise ValueError(f"amount: at least one part is needed, found none; e.g. {{{SHARED!r}: 0.9, 'task': 0.5}}")
    for part, value in amount.items():
        if not isinstance(part, str):
            raise TypeError(f"amount: a part must be a string, found {wrong(part)}")
        check_amount(value, _called(part))


def _check_min_keep(min_keep: float) -> None:
    if isinstance(min_keep, bool) or not isinstance(min_keep, numbers.Real):
        raise TypeError(
            "min_keep: must be an int (weights per tensor) or a float (fraction of each tensor), found "
            f"{wrong(min_keep)}"
        )
    if isinstance(min_keep, numbers.Integral):
        if min_keep < 0:
            raise ValueError(f"min_keep: an int must be a count of at least 0, found {min_keep}; 0 is off")
    elif not 0.0 < float(min_keep) < 1.0:
        raise ValueError(
            f"min_keep: a float must be a fraction above 0 and below 1, found {min_keep}; a count is an int, 0 is off"
        )


def _called(part: str) -> str:
    return f"amount[{part!r}]"


def check_task_names(tasks: Sequence[str]) -> None:
    """Check that no task has the name of the part that several reach.

    Raises:
        ValueError: If one has.
    """
    if SHARED in tasks:
        raise ValueError(
            f"amount: with amounts per part no task may be called {SHARED!r}, found one; that is the name of what two "
            "or more tasks reach: rename the task, or pass one amount"
        )


def _check_parts(amount: Mapping[str, float], parts: Sequence[str], sizes: Sequence[int], tasks: Sequence[str]) -> None:
    check_task_names(tasks)
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
