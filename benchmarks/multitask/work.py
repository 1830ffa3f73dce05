"""What there is to do in the long regime, in pieces, the most valuable first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from .data.splits import InMemory
from .problem.problem import Problem
from .pruning.methods import DENSE, METHODS, TUNED_AT, WINDOWS
from .runs import TUNING_SEED, rates_key
from .settings import SETTINGS, prolonged, weighted
from .training.bench import Setting

UNEQUAL = tuple(f"fashion+mnist-adam:1,{ratio}" for ratio in (20, 100))
WANTED = ("trunk", "questions", "multifashion", "multimnist", UNEQUAL[1], "fashion+mnist", UNEQUAL[0], "yeast")
WINDOWED = ("fashion+mnist", UNEQUAL[0], "yeast")  # where validation chooses when to cut
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
ON_THE_WAY = tuple(f"{rule}, {window}" for window in WINDOWS for rule in ("magnitude", "shares, damped 0.25"))
AMOUNTS, HIGH = (0.9, 0.95, 0.98, 0.99), 0.985  # the highest come last
CHOICES = tuple(name for name in ONE_SHOT if name.startswith(("DiSparse damped", "shares, damped")))
QUICK = 64  # samples of a split, to see that everything runs
T = TypeVar("T")


@dataclass(frozen=True)
class Size:
    """How a setting is divided into pieces that many processes can do at the same time on one card."""

    most: int = 160  # networks side by side in a process
    at_once: int = 100  # processes
    methods: int = 100  # whose learning rates are chosen in a piece
    first: int = 100  # seeds that come before other things
    by_amount: bool = False  # runs of a seed are a piece per amount, the amount that rates are chosen at first


SIZES = {"trunk": Size(most=6, at_once=6, methods=3, first=3, by_amount=True)}  # half a GB of memory per network


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


@dataclass(frozen=True)
class Known:
    """What earlier calls left of a setting.

    The runs of a seed are compared with its dense network: where that is gone, none that starts from it is added.
    """

    rates: frozenset[str] = frozenset()  # learning rates, by key
    closed: frozenset[int] = frozenset()  # seeds whose dense network is gone


def chosen_setting(name: str, *, quick: bool) -> Setting:
    """Return a setting in the long regime; ``fashion+mnist-adam:1,20`` has these loss weights."""
    base, _, weights = name.partition(":")
    setting = SETTINGS[base]
    if weights:
        setting = weighted(setting, [float(weight) for weight in weights.split(",")])
    setting = prolonged(setting)
    return _quick(setting) if quick else setting


def _quick(setting: Setting) -> Setting:
    def load(root: Path) -> Problem:
        problem, splits = setting.load(root), {}
        for name in ("train", "validation", "test"):
            split = getattr(problem, name)
            splits[name] = split.first(QUICK) if isinstance(split, InMemory) else split
        return replace(problem, **splits)

    return replace(setting, load=load, budget=setting.budget.quick())


def groups(things: Sequence[T], size: int) -> list[tuple[T, ...]]:
    """Divide into groups of a size, the last of what is left.

    Example:
        >>> groups("abcde", 2)
        [('a', 'b'), ('c', 'd'), ('e',)]
    """
    return [tuple(things[start : start + size]) for start in range(0, len(things), size)]


def queue(
    settings: Sequence[str],
    seeds: Sequence[int],
    most: int,
    *,
    amounts: Sequence[float] = AMOUNTS,
    rates_at: Sequence[float] = (TUNED_AT,),
    known: Mapping[str, Known] | None = None,
) -> list[Unit]:
    """List all work, the most valuable first.

    ``rates_at`` are the amounts that learning rates are chosen at; at others, that of 98 % serves. Seeds that are not
    to be reported are run with what is to be chosen from, at 98 %.
    """
    reported = max(seeds) < TUNING_SEED
    planned = _Queue(settings, seeds, most, rates_at, known or {}, ONE_SHOT if reported else CHOICES)
    early, high = (tuple(a for a in amounts if (a < HIGH) == low) for low in (True, False))
    if not reported:
        early, high = (TUNED_AT,), ()
    planned.dense()
    planned.one_shot(early, first=True)
    if reported:
        planned.on_the_way()
    planned.one_shot(early, first=False)
    if reported:
        planned.at_the_start(early)
    for first in (True, False):
        planned.one_shot(high, first=first)
    if reported:
        planned.at_the_start(high)
    return planned.needed()


class _Queue:
    """Lists units; what one needs is listed before it."""

    def __init__(
        self,
        settings: Sequence[str],
        seeds: Sequence[int],
        most: int,
        rates_at: Sequence[float],
        known: Mapping[str, Known],
        one_shot: tuple[str, ...],
    ) -> None:
        self.settings, self.seeds, self.most, self.rates_at = settings, tuple(seeds), most, rates_at
        self.known = {setting: known.get(setting, Known()) for setting in settings}
        self.sizes = {setting: SIZES.get(setting, Size(most=most)) for setting in settings}
        self.methods = one_shot
        self.units: list[Unit] = []
        self._tuning: dict[str, Unit] = {}  # makes the dense network of the tuning seed
        self._dense: dict[tuple[str, int], Unit] = {}
        self._with_dense: set[tuple[str, int]] = set()  # seeds whose runs have begun with the dense network's own

    def dense(self) -> None:
        """Add the dense networks: first of the settings that have no rate for them."""
        for setting in self.settings:
            if DENSE.name not in self.known[setting].rates:
                self._tuning[setting] = self._add("rates of dense", setting)
        for setting in self.settings:
            seeds = self._open(setting, first=True)
            if setting not in self._tuning:
                self._tuning[setting] = self._train(setting, tuple(dict.fromkeys((*seeds, TUNING_SEED))))
            elif seeds:
                self._train(setting, seeds, self._tuning[setting])

    def one_shot(self, amounts: tuple[float, ...], *, first: bool) -> None:
        """Add what starts from the dense networks, seed by seed in all settings alike."""
        seeds = {setting: self._open(setting, first=first) for setting in self.settings}
        for setting, lacking in seeds.items():
            if lacking and (setting, lacking[0]) not in self._dense:
                self._train(setting, lacking, self._tuning[setting])
        rates = {setting: self._rates(setting, self.methods, amounts) for setting in self.settings if seeds[setting]}
        for place in range(max(map(len, seeds.values()))):
            for setting, which in seeds.items():
                if place < len(which):
                    self._seed(setting, which[place], amounts, rates[setting])

    def _seed(self, setting: str, seed: int, amounts: tuple[float, ...], rates: Sequence[Unit]) -> None:
        apart = self.sizes[setting].by_amount
        parts = groups(sorted(amounts, key=lambda amount: amount != TUNED_AT), 1) if apart else [amounts]
        for part in filter(None, parts):
            own = () if (setting, seed) in self._with_dense else (DENSE.name,)
            self._with_dense.add((setting, seed))
            needs = (self._dense[setting, seed], *rates)
            self._add("runs", setting, *needs, seeds=(seed,), methods=(*own, *self.methods), amounts=part)

    def on_the_way(self) -> None:
        """Add what is cut while it is trained, where validation chooses when to."""
        settings = [setting for setting in self.settings if setting in WINDOWED]
        rates = {setting: self._rates(setting, ON_THE_WAY, (TUNED_AT,), together=2) for setting in settings}
        for which in groups(self.seeds, 2):
            for setting in settings:
                facts: dict[str, Any] = {"seeds": which, "methods": ON_THE_WAY, "amounts": (TUNED_AT,)}
                self._add("runs", setting, *rates[setting], **facts)

    def at_the_start(self, amounts: tuple[float, ...]) -> None:
        """Add what is cut before it is trained: where it is not trained already."""
        settings = [name for name in self.settings if not SETTINGS[name.partition(":")[0]].trained and amounts]
        rates = {setting: self._rates(setting, AT_START, amounts) for setting in settings}
        for which in groups(self.seeds, 3):
            for setting in settings:
                self._add("runs", setting, *rates[setting], seeds=which, methods=AT_START, amounts=amounts)

    def _rates(
        self, setting: str, methods: tuple[str, ...], amounts: Sequence[float], together: int = 100
    ) -> list[Unit]:
        """Add the choice of those learning rates that no earlier call has chosen."""
        found: list[Unit] = []
        for amount in [each for each in self.rates_at if each in amounts] or [TUNED_AT]:
            lacking = [m for m in methods if rates_key(METHODS[m], amount) not in self.known[setting].rates]
            parts = groups(lacking, min(together, self.sizes[setting].methods))
            tuning, facts = self._tuning[setting], {"amounts": (amount,)}
            found += [self._add("rates", setting, tuning, methods=part, **facts) for part in parts]
        return found

    def needed(self) -> list[Unit]:
        """Return all units but dense networks that nothing is made from or compared with."""
        asked = {name for unit in self.units for name in unit.needs}
        return [unit for unit in self.units if unit.kind != "dense" or unit.name in asked]

    def _train(self, setting: str, seeds: tuple[int, ...], *needs: Unit) -> Unit:
        unit = self._add("dense", setting, *needs, seeds=seeds)
        self._dense.update({(setting, seed): unit for seed in seeds})
        return unit

    def _open(self, setting: str, *, first: bool) -> tuple[int, ...]:
        seeds = [seed for seed in self.seeds if seed not in self.known[setting].closed]
        count = self.sizes[setting].first
        return tuple(seeds[:count] if first else seeds[count:])

    def _add(self, kind: str, setting: str, *needs: Unit, **facts: Any) -> Unit:
        unit = Unit(kind, setting, needs=tuple(need.name for need in needs), most=self.sizes[setting].most, **facts)
        if unit not in self.units:
            self.units.append(unit)
        return unit
