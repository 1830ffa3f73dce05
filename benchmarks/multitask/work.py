"""What there is to do in the long regime, in pieces, the most valuable first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .pruning.methods import DENSE, TUNED_AT, WINDOWS
from .runs import TUNING_SEED
from .settings import SETTINGS, prolonged, weighted
from .training.bench import Setting

UNEQUAL = tuple(f"fashion+mnist-adam:1,{ratio}" for ratio in (20, 100))
WANTED = ("fashion+mnist", UNEQUAL[0], "yeast", "multimnist", UNEQUAL[1], "questions", "multifashion")
ONE_SHOT = (
    "magnitude",
    "LAMP",
    "LAMP with reach",
    "adaptive Taylor, joint",
    "DiSparse Taylor",
    "DiSparse adaptive",
    "damped 0.5, joint",
    *(f"DiSparse damped {e}" for e in (0.25, 0.5)),
    *(f"shares, damped {e}" for e in (0.25, 0.5)),
)
AT_START = ("SNIP",)
ON_THE_WAY = tuple(f"{rule}, {window}" for rule in ("magnitude", "DiSparse damped 0.5") for window in WINDOWS)
AMOUNTS, HIGH = (0.9, 0.95, 0.98, 0.99), 0.985  # the highest come last
CHOICES = tuple(name for name in ONE_SHOT if name.startswith(("DiSparse damped", "shares, damped")))


@dataclass(frozen=True)
class Unit:
    """A piece of work for one process, and the pieces that must be done before."""

    kind: str  # "rates of dense", "dense", "rates", "runs"
    setting: str
    seeds: tuple[int, ...] = ()
    methods: tuple[str, ...] = ()
    amounts: tuple[float, ...] = ()
    needs: tuple[str, ...] = ()  # names of units
    most: int = field(default=160, compare=False)  # networks side by side

    @property
    def name(self) -> str:
        """What others need it by."""
        return " ".join([self.kind, self.setting, *map(str, self.seeds), *self.methods, *map(str, self.amounts)])


def chosen_setting(name: str, *, quick: bool) -> Setting:
    """Return a setting in the long regime; ``fashion+mnist-adam:1,20`` has these loss weights."""
    base, _, weights = name.partition(":")
    setting = SETTINGS[base]
    if weights:
        setting = weighted(setting, [float(weight) for weight in weights.split(",")])
    setting = prolonged(setting)
    return replace(setting, budget=setting.budget.quick()) if quick else setting


def queue(
    settings: Sequence[str],
    seeds: Sequence[int],
    most: int,
    *,
    amounts: Sequence[float] = AMOUNTS,
    rates_at: Sequence[float] = (TUNED_AT,),
) -> list[Unit]:
    """List all work, the most valuable first.

    ``rates_at`` are the amounts that learning rates are chosen at; at others, that of 98 % serves. Seeds that are not
    to be reported are run with what is to be chosen from, at 98 %.
    """
    everything: list[Unit] = []
    reported = max(seeds) < TUNING_SEED
    one_shot, amounts = (ONE_SHOT, amounts) if reported else (CHOICES, (TUNED_AT,))

    def add(kind: str, setting: str, *needs: Unit, **facts: Any) -> Unit:
        unit = Unit(kind, setting, needs=tuple(need.name for need in needs), most=most, **facts)
        everything.append(unit)
        return unit

    def choose(setting: str, methods: tuple[str, ...], at: Sequence[float]) -> list[Unit]:
        known = [amount for amount in rates_at if amount in at] or [TUNED_AT]
        return [add("rates", setting, dense_rate[setting], methods=methods, amounts=(amount,)) for amount in known]

    dense_rate = {setting: add("rates of dense", setting) for setting in settings}
    dense, rates = {}, {}
    for setting in settings:
        dense[setting] = add("dense", setting, dense_rate[setting], seeds=tuple(seeds))
        rates[setting] = choose(setting, one_shot, amounts)
    pairs = [tuple(seeds[first : first + 2]) for first in range(0, len(seeds), 2)]
    for part in filter(None, (tuple(a for a in amounts if (a < HIGH) == early) for early in (True, False))):
        for which in pairs:
            for setting in settings:
                ready = (dense[setting], *rates[setting])
                add("runs", setting, *ready, seeds=which, methods=(DENSE.name, *one_shot), amounts=part)
    for setting in settings if reported else ():
        ready = (dense[setting], *choose(setting, AT_START, amounts))
        add("runs", setting, *ready, seeds=tuple(seeds), methods=AT_START, amounts=tuple(amounts))
    for setting in settings if reported else ():
        ready = (dense[setting], *choose(setting, ON_THE_WAY, (TUNED_AT,)))
        for which in pairs:
            add("runs", setting, *ready, seeds=which, methods=ON_THE_WAY, amounts=(TUNED_AT,))
    return everything
