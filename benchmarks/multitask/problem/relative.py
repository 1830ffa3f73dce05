"""How much a pruned network changed each task, relative to the dense one, and what several seeds say about it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Protocol

from scipy import stats

LEVEL = 0.05  # of p-values: below it, a difference is one
Metrics = Mapping[str, Mapping[str, float]]  # task -> metric -> value


class Judged(Protocol):
    """A task as far as it is needed here."""

    name: str
    better: Mapping[str, str]


def changes(tasks: Iterable[Judged], measured: Metrics, dense: Metrics) -> dict[str, float]:
    """Return each task's change in per cent, negative for worse.

    ``change_task = 100 * mean over its metrics of sign * (m - dense) / abs(dense)``, with sign 1 where higher is
    better and -1 where lower is (Delta_m of Maninis et al., CVPR 2019, for one task).
    """
    result = {}
    for task in tasks:
        parts = []
        for metric, direction in task.better.items():
            before, now = dense[task.name][metric], measured[task.name][metric]
            sign = 1 if direction == "higher" else -1
            parts.append(sign * (now - before) / max(abs(before), 1e-12))
        result[task.name] = 100 * mean(parts)
    return result


def mean_change(tasks: Iterable[Judged], measured: Metrics, dense: Metrics) -> float:
    """Return Delta_m: the mean change over the tasks, in per cent."""
    return mean(changes(tasks, measured, dense).values())


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct the p-values of several comparisons, so that one found by chance among all of them is rare (Holm, 1979).

    The i-th smallest of m, counted from 0, is multiplied by ``m - i``, made no smaller than the one before, and at
    most 1.

    Args:
        p_values: One per comparison, each in [0, 1].

    Returns:
        The corrected values, in the same order.

    Example:
        >>> holm([0.04, 0.01, 0.03])
        [0.06, 0.03, 0.06]
    """
    corrected, least = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = min(1.0, max(least, (len(p_values) - place) * p_values[index]))
        corrected[index] = least
    return corrected


class Interval:
    """The mean of some values with its 95 % interval (Student's t)."""

    def __init__(self, values: Sequence[float]) -> None:
        self.count = len(values)
        self.mean = mean(values)
        self.error = stdev(values) / math.sqrt(self.count) if self.count > 1 else math.inf
        self.half = float(stats.t.ppf(1 - LEVEL / 2, self.count - 1)) * self.error if self.count > 1 else math.inf

    def __str__(self) -> str:
        """Format as ``mean ± half``; one value alone has no interval."""
        return f"{self.mean:.1f}" if math.isinf(self.half) else f"{self.mean:.1f} ± {self.half:.1f}"

    @property
    def p_value(self) -> float:
        """How likely a mean so far from zero is where the true one is zero: two-sided, Student's t; 1 for one value."""
        if self.count == 1:
            return 1.0
        if self.error == 0:
            return float(self.mean == 0)
        return 2 * float(stats.t.sf(abs(self.mean) / self.error, self.count - 1))

    def word(self, p_value: float | None = None) -> str:
        """Say whether what it is a difference of wins, ties or loses.

        Args:
            p_value: The corrected one; by default the interval's own, and then it ties where it holds zero.
        """
        if (self.p_value if p_value is None else p_value) >= LEVEL:
            return "ties"
        return "wins" if self.mean > 0 else "loses"
