"""How the tasks agree on one weight.

An arbiter reduces the tasks' percentiles of a weight to one *agreement score*; the weights with the lowest agreement
scores are pruned. It is a function of a tensor whose first axis is the tasks, in [0, 1], with NaN where a task does not
reach the weight.

==================  ==========================  =============================================================
name                agreement score             a weight is removed first if
==================  ==========================  =============================================================
``unanimous``       largest percentile          *all* tasks rank it low (DiSparse)
``majority``        median percentile           half of the tasks rank it low
``mean``            mean percentile             the tasks rank it low on average (Borda count)
``any``             smallest percentile         *one* task ranks it low
``at_least(k)``     k-th largest percentile     fewer than k tasks rank it high
``sum``             sum of shares / tasks       the tasks that use it have little of their layers in it
==================  ==========================  =============================================================

The first five compare tasks by percentiles, which are free of the scale of any loss. So are *shares*, on which ``sum``
works: of all that a task scores in one tensor, what this weight and those above it have (LAMP;
:func:`disparse_plugin.criteria.lamp_scores`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from .errors import did_you_mean, wrong
from .kinds import check_flag, check_kind, whole_number

Arbiter: TypeAlias = Callable[[Tensor], Tensor]

_ARBITERS: dict[str, Arbiter] = {}
_ON_SHARES: list[Arbiter] = []
_BUILT_IN: frozenset[str] = frozenset()  # filled at the end of this file


def register(
    name: str, *, scale: Literal["percentile", "share"] = "percentile", replace: bool = False
) -> Callable[[Arbiter], Arbiter]:
    """Make a function available as ``arbiter="name"``.

    Args:
        name: The name.
        scale: What the function is given of each task: percentiles or shares.
        replace: Whether it may take the place of an arbiter of this package.

    Raises:
        TypeError: If ``name`` is no str, or ``replace`` no bool.
        ValueError: If the name is one of this package's, unless ``replace``.

    Example:
        >>> @register("first_task")
        ... def first_task(percentiles):
        ...     return percentiles[0].nan_to_num(0.0)
        >>> resolve("first_task") is first_task
        True
    """
    check_kind("name", name, str, "a str")
    check_flag("replace", replace)
    if name in _BUILT_IN and not replace:
        raise ValueError(f"name: must not be one of this package's, found {name!r}; choose another, or replace=True")

    def add(function: Arbiter) -> Arbiter:
        _ARBITERS[name] = function
        if scale == "share":
            _ON_SHARES.append(function)
        return function

    return add


@register("unanimous")
def unanimous(percentiles: Tensor) -> Tensor:
    """Take the largest percentile: removed only if every task that reaches the weight ranks it low.

    Cutting the lowest values keeps the union of the tasks' own top sets at one common keep ratio, which is the arbiter
    of DiSparse (Sun et al., CVPR 2022, figure 2).

    Example:
        >>> unanimous(torch.tensor([[0.2, 0.9], [0.3, float("nan")]]))
        tensor([0.3000, 0.9000])
    """
    return percentiles.nan_to_num(nan=-torch.inf).amax(0)


@register("any")
def any_task(percentiles: Tensor) -> Tensor:
    """Take the smallest percentile: removed as soon as one task ranks the weight low.

    The intersection of the tasks' own top sets, the opposite of :func:`unanimous`.

    Example:
        >>> any_task(torch.tensor([[0.2, 0.9], [0.3, float("nan")]]))
        tensor([0.2000, 0.9000])
    """
    return percentiles.nan_to_num(nan=torch.inf).amin(0)


@register("mean")
def mean(percentiles: Tensor) -> Tensor:
    """Take the mean percentile over the tasks that reach the weight (Borda count).

    Example:
        >>> mean(torch.tensor([[0.2, 0.9], [0.4, float("nan")]]))
        tensor([0.3000, 0.9000])
    """
    reaching = (~percentiles.isnan()).sum(0)
    return _added(percentiles.nan_to_num(nan=0.0)) / reaching


@register("majority")
def majority(percentiles: Tensor) -> Tensor:
    """Take the median percentile over the tasks that reach the weight; of an even number, the mean of the middle two.

    Example:
        >>> majority(torch.tensor([[0.1], [0.9], [0.4]]))
        tensor([0.4000])
    """
    ordered = percentiles.sort(dim=0).values
    reaching = (~percentiles.isnan()).sum(0, keepdim=True)
    lower = ordered.gather(0, ((reaching - 1) // 2).clamp_min(0))
    upper = ordered.gather(0, reaching // 2)
    return ((lower + upper) / 2).squeeze(0)


@register("sum", scale="share")
def sum_of_shares(shares: Tensor) -> Tensor:
    """Add up the shares of the tasks that reach the weight, divided by the number of all tasks.

    A weight counts once for each task that it serves: what many tasks reach goes later. With ``criterion="lamp"``,
    which needs no labels, it is LAMP times the number of tasks that reach the weight.

    Example:
        >>> sum_of_shares(torch.tensor([[0.2, 0.9], [0.4, float("nan")]]))
        tensor([0.3000, 0.4500])
    """
    total = _added(shares.nan_to_num(nan=0.0))
    # By a number CUDA multiplies with its reciprocal, which differs in the last bit from what a CPU divides.
    return total / torch.full_like(total[:1], len(shares))


def _added(rows: Tensor) -> Tensor:
    """Add up from the smallest to the largest: the same to the last bit in any order of tasks and on any device."""
    ordered = rows if len(rows) < 3 else rows.sort(dim=0).values
    total = ordered[0].clone()
    for row in ordered[1:]:
        total += row
    return total


@dataclasses.dataclass(frozen=True)
class AtLeast:
    """The arbiter made by :func:`at_least`."""

    k: int

    @property
    def __name__(self) -> str:
        return f"at_least({self.k})"

    def __call__(self, percentiles: Tensor) -> Tensor:
        """Take the k-th largest percentile, or the smallest where fewer than k tasks reach the weight."""
        ordered = percentiles.nan_to_num(nan=-torch.inf).sort(dim=0, descending=True).values
        reaching = (~percentiles.isnan()).sum(0, keepdim=True)
        return ordered.gather(0, (reaching.clamp(1, self.k) - 1)).squeeze(0)


def at_least(k: int) -> AtLeast:
    """Protect a weight only if at least ``k`` tasks rank it high: the k-th largest percentile.

    ``at_least(1)`` is ``"unanimous"``; ``at_least(2)`` is the consensus of TALL-masks (Wang et al., ICML 2024). Where
    fewer than ``k`` tasks reach a weight, all of those have to.

    Raises:
        TypeError: If ``k`` is not an int.
        ValueError: If ``k`` is below 1.

    Example:
        >>> at_least(2)(torch.tensor([[0.1], [0.9], [0.4]]))
        tensor([0.4000])
    """
    return AtLeast(whole_number("k", k, least=1))


def resolve(arbiter: str | Arbiter, argument: str = "arbiter") -> Arbiter:
    """Turn what a user passes as an arbiter into a function of the tasks' percentiles.

    Args:
        arbiter: A name, as reports print it (``"at_least(2)"`` too), or the function itself.
        argument: What errors call it.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If it is neither a name nor a callable.

    Example:
        >>> resolve("unanimous") is unanimous, resolve("at_least(2)") == at_least(2)
        (True, True)
    """
    if isinstance(arbiter, str):
        if arbiter in _ARBITERS:
            return _ARBITERS[arbiter]
        if (count := re.fullmatch(r"at_least\(\s*(\d+)\s*\)", arbiter)) is not None:
            return at_least(int(count[1]))
        hint = did_you_mean(arbiter, _ARBITERS)
        if arbiter.startswith("at_least"):
            hint = "; write how many tasks must want a weight, e.g. 'at_least(2)'"
        raise ValueError(
            f"{argument}: must be one of {', '.join(sorted(_ARBITERS))}, at_least(k) or a callable over the task axis, "
            f"found {arbiter!r}{hint}"
        )
    given: object = arbiter
    if given is at_least:
        raise TypeError(f"{argument}: at_least needs the number of tasks, found the function itself; pass at_least(2)")
    if not callable(arbiter) or isinstance(arbiter, type):
        raise TypeError(f"{argument}: must be a name or a callable over the task axis, found {wrong(arbiter)}")
    return arbiter


def scale_of(arbiter: Arbiter) -> Literal["percentile", "share"]:
    """Tell what an arbiter is given of each task.

    Example:
        >>> scale_of(unanimous), scale_of(sum_of_shares)
        ('percentile', 'share')
    """
    return "share" if any(arbiter is known for known in _ON_SHARES) else "percentile"


def ignores_absent_tasks(arbiter: Arbiter) -> bool:
    """Tell whether leaving out the rows of tasks that do not reach a weight gives the same result as NaN in them."""
    return is_order_statistic(arbiter) or arbiter is mean or arbiter is majority


def stays_in_range(arbiter: Arbiter) -> bool:
    """Tell whether an arbiter is known to turn percentiles into values in [0, 1].

    Example:
        >>> stays_in_range(unanimous), stays_in_range(lambda percentiles: percentiles.sum(0))
        (True, False)
    """
    return ignores_absent_tasks(arbiter)


def is_order_statistic(arbiter: Arbiter) -> bool:
    """Tell whether an arbiter always returns one of the percentiles, chosen by their order alone.

    Such an arbiter commutes with every increasing map of the percentiles, which :mod:`disparse_plugin.agreement.cut`
    uses.
    """
    return arbiter is unanimous or arbiter is any_task or isinstance(arbiter, AtLeast)


_BUILT_IN = frozenset(_ARBITERS)
