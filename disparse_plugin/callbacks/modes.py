"""The modes of the callbacks: which options each has, and what each makes of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

from .. import arbiters, criteria, damped_shares
from ..agreement import patterns
from ..agreement.budgets import Budget
from ..agreement.patterns import Pattern
from ..arbiters import Arbiter
from ..criteria import Criterion, ScoreFunction
from ..kinds import check_flag, whole_number
from ..parameters import Exclude, listed
from ..sparse_training.gradual import GradualPruning
from ..sparse_training.initial_masks import check_exchangeable
from ..sparse_training.scheduler import RANDOM, DiSparseScheduler
from ..sparse_training.schedules import PRUNED_AFTER, STOP_AFTER, check_drop_fraction, check_steps, check_when, describe
from ..sparse_training.step_scores import check_growth_criterion
from .base import PruningInFit
from .one_shot import OneShot
from .scheduled import Scheduled

Mode: TypeAlias = Literal["static", "pretrained", "gradual", "dynamic"]

_CRITERIA = {
    "static": "snip",
    "pretrained": damped_shares.CRITERION,
    "gradual": damped_shares.CRITERION,
    "dynamic": "gradient",
}
_OF_ALL = ("mode", "amount", "criterion", "arbiter", "pattern", "exclude", "fold")
_OF_MODE = {
    "static": ("min_keep", "num_batches"),
    "pretrained": ("min_keep", "num_batches", "start_at"),
    "gradual": ("min_keep", "start_at", "update_every", "stop_at"),
    "dynamic": ("update_every", "stop_at", "distribution", "drop_fraction", "exempt", "regrow_dropped", "seed"),
}

_COUNTS = ("num_batches", "update_every")
_TIMES = {"start_at": 0, "stop_at": 1}  # the least step of each


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Options:
    """What the user of a callback chose; None leaves it to the mode.

    :class:`disparse_plugin.lightning.DiSparsePruning` explains each.
    """

    mode: Mode
    amount: float | None = None
    criterion: str | Criterion | ScoreFunction | None = None
    arbiter: str | Arbiter | None = None
    pattern: str | Pattern = "weights"
    exclude: Exclude = ()
    fold: bool = False
    min_keep: float | None = None
    num_batches: int | None = None
    start_at: float | None = None
    update_every: int | None = None
    stop_at: float | None = None
    distribution: str | Mapping[str, float] | None = None
    drop_fraction: float | None = None
    exempt: Sequence[str] | None = None
    regrow_dropped: bool | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        """Read what can be read only once: the options are used at the begin of every fit."""
        for name in ("exclude", "exempt"):
            if isinstance(entries := getattr(self, name), Iterator):
                object.__setattr__(self, name, tuple(entries))

    def __str__(self) -> str:
        """List what differs from the default, as the arguments of a call."""
        given = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        plain = (str, int, float, list, tuple, dict)
        return ", ".join(f"{k}={v!r}" if isinstance(v, plain) else f"{k}={describe(v)}" for k, v in given.items())

    def maker(self) -> Callable[[], PruningInFit]:
        """Check the options, and return what makes a fresh object of the mode.

        Raises:
            TypeError: If an argument is of the wrong type.
            ValueError: If a value is out of range, a name is unknown, or an option is of another mode.
        """
        options = self._of_mode()
        self._check_kinds(options)
        form = patterns.resolve(self.pattern)
        form.check_budget(Budget(self._amount_for(options), options.get("min_keep", 0)))
        name = _CRITERIA[self.mode] if self.criterion is None else self.criterion
        rule = damped_shares.arbiter_for(name, self.arbiter) if self.mode in ("pretrained", "gradual") else self.arbiter
        arbiter = "unanimous" if rule is None else rule
        arbiters.resolve(arbiter)
        if self.mode in ("static", "pretrained"):
            return functools.partial(OneShot, self.amount, criteria.resolve(name), arbiter, form, **options)
        kind = GradualPruning if self.mode == "gradual" else DiSparseScheduler
        if self.mode == "gradual":
            options = {"stop_at": PRUNED_AFTER, **options}
            criterion: str | Criterion = criteria.resolve(name)
        else:
            check_exchangeable(form)
            options = {"stop_at": STOP_AFTER, "distribution": None, **options}
            criterion = RANDOM if name == RANDOM else check_growth_criterion(criteria.resolve(name))
        options |= {"amount": self.amount, "arbiter": arbiter, "criterion": criterion, "pattern": form}
        return functools.partial(Scheduled, kind, options)

    def _check_kinds(self, options: Mapping[str, Any]) -> None:
        """Check what needs no model, so that it does not wait for the fit."""
        listed("exclude", self.exclude)
        check_flag("fold", self.fold)
        for argument in _COUNTS:
            check_steps(argument, options.get(argument, 1))
        for argument, least in _TIMES.items():
            check_when(argument, options.get(argument, least), least)
        check_drop_fraction(options.get("drop_fraction", 0.0))
        listed("exempt", options.get("exempt", ()))
        check_flag("regrow_dropped", options.get("regrow_dropped", False))
        whole_number("seed", options.get("seed", 0))

    def _amount_for(self, options: Mapping[str, Any]) -> float | None:
        """Return what is checked: densities for all layers, or masks that are there, say the amount as well."""
        return 0 if self.amount is None and options.get("distribution") is not None else self.amount

    def _of_mode(self) -> dict[str, Any]:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode: must be one of {', '.join(get_args(Mode))}, found {self.mode!r}")
        names = [field.name for field in dataclasses.fields(self) if field.name not in _OF_ALL]
        options = {name: value for name in names if (value := getattr(self, name)) is not None}
        foreign = [name for name in options if name not in _OF_MODE[self.mode]]
        if foreign:
            raise ValueError(
                f"{foreign[0]}: must be left out with mode={self.mode!r}, found {options[foreign[0]]!r}; the options "
                f"of this mode are {', '.join(_OF_MODE[self.mode])}"
            )
        return options
