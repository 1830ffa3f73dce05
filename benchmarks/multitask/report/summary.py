"""What the runs of a setting say: changes relative to the dense network, paired over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from ..problem.relative import Interval, Judged, changes
from ..pruning.methods import DENSE, METHODS, Method
from ..runs import Run

Split = str  # "validation" or "test"


@dataclass(frozen=True)
class Change:
    """What one run changed, in per cent of the dense network of the same seed; negative is worse."""

    by_task: Mapping[str, float]

    @property
    def mean(self) -> float:
        """Delta_m."""
        return mean(self.by_task.values())

    @property
    def worst(self) -> float:
        """The change of the task that lost most."""
        return min(self.by_task.values())


class Summary:
    """Runs of one setting, by method and amount."""

    def __init__(self, runs: Iterable[Run], tasks: Sequence[Judged]) -> None:
        self.tasks = tasks
        self.runs = {run.key: run for run in runs}
        self.amounts = sorted({run.amount for run in self.runs.values() if run.method != DENSE.name})
        ran = {run.method for run in self.runs.values()}
        self.methods = [method for method in METHODS.values() if method.name in ran and method is not DENSE]
        self.dense = {seed: run for (name, _, seed), run in self.runs.items() if name == DENSE.name}
        self.seeds = sorted(self.dense)

    def changes(self, method: str, amount: float, split: Split = "test") -> dict[int, Change]:
        """Return the changes of a method at an amount, by seed."""
        return {
            seed: Change(changes(self.tasks, getattr(self.runs[method, amount, seed], split), getattr(dense, split)))
            for seed, dense in self.dense.items()
            if (method, amount, seed) in self.runs
        }

    def interval(self, method: str, amount: float, what: str) -> Interval | None:
        """Return the mean of ``"mean"`` or ``"worst"`` over the seeds; None where nothing was run."""
        values = [getattr(change, what) for change in self.changes(method, amount).values()]
        return Interval(values) if values else None

    def intervals(self, amount: float, what: str) -> dict[str, Interval]:
        """Return that of every method that ran at an amount, by its name."""
        found = {method.name: self.interval(method.name, amount, what) for method in self.methods}
        return {name: interval for name, interval in found.items() if interval is not None}

    def paired(self, method: str, other: str, amount: float, what: str) -> Interval | None:
        """Return how much better a method is than another, in points, over the seeds that both have."""
        first, second = self.changes(method, amount), self.changes(other, amount)
        both = sorted(first.keys() & second.keys())
        differences = [getattr(first[seed], what) - getattr(second[seed], what) for seed in both]
        return Interval(differences) if differences else None

    def best_baseline(self, amount: float, family: str | None = None) -> Method | None:
        """Return the baseline with the highest Delta_m on the *validation* split; the test split makes no choice."""
        candidates = [
            (mean(change.mean for change in found.values()), method)
            for method in self.methods
            if not method.ours and (family is None or method.family == family)
            if (found := self.changes(method.name, amount, "validation"))
        ]
        return max(candidates, key=lambda pair: pair[0])[1] if candidates else None

    def sparsity(self, method: str, amount: float) -> tuple[float, float]:
        """Return the mean sparsity of the shared weights, and the highest of any task's own, over the seeds."""
        found = [run.sparsity for run in self._runs(method, amount)]
        own = [max((share for part, share in parts.items() if part != "shared"), default=0.0) for parts in found]
        return mean(parts.get("shared", 0.0) for parts in found), mean(own)

    def emptied(self, method: str, amount: float) -> float:
        """Return how many weight tensors were left with nothing, a mean over the seeds."""
        return mean(len(run.emptied) for run in self._runs(method, amount))

    def _runs(self, method: str, amount: float) -> list[Run]:
        return [run for (name, at, _), run in self.runs.items() if (name, at) == (method, amount)]
