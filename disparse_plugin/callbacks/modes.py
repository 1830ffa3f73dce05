"""The modes of the callbacks: which options each has, and what each makes of them. No Lightning here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, get_args

from .. import arbiters, criteria
from ..agreement.amounts import check_amount
from ..agreement.budgets import check_budget
from ..arbiters import Arbiter
from ..criteria import Criterion, ScoreFunction
from ..sparse_training.gradual import GradualPruning
from ..sparse_training.scheduler import RANDOM, DiSparseScheduler
from ..sparse_training.step_scores import check_growth_criterion
from .base import PruningInFit
from .one_shot import OneShot
from .scheduled import Scheduled

Mode: TypeAlias = Literal["static", "pretrained", "gradual", "dynamic"]

_DEFAULT_CRITERIA = {"static": "snip", "pretrained": "taylor", "gradual": "taylor", "dynamic": "gradient"}
_OPTIONS = {
    "static": ("min_keep", "num_batches"),
    "pretrained": ("min_keep", "num_batches", "start_at"),
    "gradual": ("min_keep", "start_at", "update_every", "stop_at"),
    "dynamic": ("update_every", "stop_at", "distribution", "drop_fraction", "exempt", "regrow_dropped", "seed"),
}


def maker(
    mode: Mode,
    amount: float,
    criterion: str | Criterion | ScoreFunction | None,
    arbiter: str | Arbiter,
    given: Mapping[str, Any],
) -> Callable[[], PruningInFit]:
    """Check the options, and return what makes a fresh object of the mode.

    Args:
        mode: The mode.
        amount: How much is pruned.
        criterion: Its name, or itself; None for that of the mode.
        arbiter: Its name, or itself.
        given: Options by name; None where the user gave none.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a value is out of range, a name is unknown, or an option is of another mode.
    """
    check_amount(amount)
    options = _of_mode(mode, given)
    check_budget(0, options.get("min_keep", 0))
    name = _DEFAULT_CRITERIA[mode] if criterion is None else criterion
    judge = arbiters.resolve(arbiter)
    if mode in ("static", "pretrained"):
        return functools.partial(OneShot, amount, criteria.resolve(name), judge, **options)
    fixed = {"amount": amount, "arbiter": judge}
    if mode == "gradual":
        return functools.partial(Scheduled, GradualPruning, {**options, **fixed, "criterion": criteria.resolve(name)})
    growth: str | Criterion = RANDOM if name == RANDOM else check_growth_criterion(criteria.resolve(name))
    options = {"distribution": "erk", **options, **fixed, "criterion": growth}
    return functools.partial(Scheduled, DiSparseScheduler, options)


def _of_mode(mode: str, given: Mapping[str, Any]) -> dict[str, Any]:
    if mode not in get_args(Mode):
        raise ValueError(f"mode: must be one of {', '.join(get_args(Mode))}, found {mode!r}")
    options = {name: value for name, value in given.items() if value is not None}
    foreign = [name for name in options if name not in _OPTIONS[mode]]
    if foreign:
        raise ValueError(
            f"{foreign[0]}: must be left out with mode={mode!r}, found {options[foreign[0]]!r}; the options of this "
            f"mode are {', '.join(_OPTIONS[mode])}"
        )
    return options
