"""In words: where seeing the tasks one by one wins, ties and loses against the same method on the summed loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ..problem.relative import Interval
from ..pruning.methods import Method
from .summary import Summary


class Comparison(NamedTuple):
    """A method against another at one amount: how much better, in points of relative change."""

    method: str
    other: str
    amount: float
    mean: Interval
    worst: Interval

    @property
    def verdict(self) -> str:
        """Say it for the mean over the tasks, and for the task that lost most."""
        return " / ".join(interval.word() for interval in (self.mean, self.worst))


def twins(summary: Summary) -> Iterator[Comparison]:
    """Compare every method of ours with its twin on the summed loss."""
    return _against(summary, lambda method: method.twin)


def budgets(summary: Summary) -> Iterator[Comparison]:
    """Compare every method that has a floor, a budget per part or a rule across layers with the one that has none."""
    return _against(summary, lambda method: method.without)


def _against(summary: Summary, other: Callable[[Method], str]) -> Iterator[Comparison]:
    for method in summary.methods:
        if name := other(method):
            yield from _compare(summary, method.name, lambda _, name=name: name)


def baselines(summary: Summary) -> Iterator[Comparison]:
    """Compare every method of ours with the baseline of its family that validation says is best at that amount."""
    for method in summary.methods:
        if method.ours and method.twin:

            def best(amount: float, family: str = method.family) -> str:
                found = summary.best_baseline(amount, family)
                return found.name if found else ""

            yield from _compare(summary, method.name, best)


def _compare(summary: Summary, method: str, other: Callable[[float], str]) -> Iterator[Comparison]:
    for amount in summary.amounts:
        name = other(amount)
        mean = summary.paired(method, name, amount, "mean")
        worst = summary.paired(method, name, amount, "worst")
        if mean is not None and worst is not None:
            yield Comparison(method, name, amount, mean, worst)


def counts(comparisons: Sequence[Comparison], what: str) -> tuple[int, int, int]:
    """Count how many are won, tied and lost, by ``"mean"`` or ``"worst"``."""
    words = [getattr(comparison, what).word() for comparison in comparisons]
    return words.count("wins"), words.count("ties"), words.count("loses")


def tally(comparisons: Sequence[Comparison]) -> str:
    """Count in one sentence."""
    parts = []
    for what, label in (("mean", "mean over the tasks"), ("worst", "worst task")):
        won, tied, lost = counts(comparisons, what)
        parts.append(f"{label}: wins {won}, ties {tied}, loses {lost}")
    return f"of {len(comparisons)} comparisons, {'; '.join(parts)}"
