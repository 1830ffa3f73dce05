"""Slow reference implementations, straight from the definitions and without torch.

They use exact fractions and plain loops, so that nothing is shared with the package: not the sorting, not the tie
handling, not the rounding.
"""

from fractions import Fraction
from statistics import median

import numpy as np


def ordered_positions(values, magnitudes=None):
    """Positions from the lowest value to the highest; of equal values the smaller magnitude, then the earlier first."""
    sizes = [0] * len(values) if magnitudes is None else [abs(magnitude) for magnitude in magnitudes]
    return sorted(range(len(values)), key=lambda position: (values[position], sizes[position], position))


class Layout:
    """Scores of several tasks on several parameters: ``tables[task][parameter] = [score, ...]``, alive entries only.

    ``weights[parameter]`` are the weights that were scored; without them the order alone decides between equals.
    """

    def __init__(self, tables, sizes, weights=None):
        self.tables = tables
        self.weights = [[0] * size for size in sizes] if weights is None else weights
        self.sizes = sizes
        self.entries = [(parameter, place) for parameter, size in enumerate(sizes) for place in range(size)]

    def reached(self, task):
        return [(parameter, place) for parameter, place in self.entries if parameter in self.tables[task]]

    def ordered(self, task):
        """The task's entries from least to most important."""
        entries = self.reached(task)
        return self._sorted(entries, [self.tables[task][p][j] for p, j in entries])

    def _sorted(self, entries, values):
        return [entries[i] for i in ordered_positions(values, [self.weights[p][j] for p, j in entries])]

    def top(self, task, rho):
        """B_kc of the paper: the task's own mask, keeping the fraction rho of all that the task uses."""
        ordered = self.ordered(task)
        removed = int((1 - Fraction(rho)) * len(ordered))
        return set(ordered[removed:])

    def union_of_tops(self, rho):
        """The unanimous rule: a weight stays if any task that uses it has it in its own mask."""
        return set().union(*(self.top(task, rho) for task in self.tables))

    def percentiles(self):
        """For each entry, the exact percentile of each task that reaches it."""
        found = {entry: {} for entry in self.entries}
        for task in self.tables:
            ordered = self.ordered(task)
            for rank, entry in enumerate(ordered):
                found[entry][task] = Fraction(rank + 1, len(ordered))
        return found

    def kept(self, count, arbiter):
        """What remains after the ``count`` entries with the lowest agreement are removed."""
        return set(self.by_agreement(arbiter)[count:])

    def by_agreement(self, arbiter):
        """All entries from the lowest agreement score to the highest."""
        percentiles = self.percentiles()
        agreement = [ARBITERS[arbiter](list(percentiles[entry].values())) for entry in self.entries]
        return self._sorted(self.entries, agreement)

    def protected(self, floors, arbiter):
        """Of each parameter, as many of its own highest entries as its floor says."""
        ordered = self.by_agreement(arbiter)
        own = [[entry for entry in ordered if entry[0] == parameter] for parameter in range(len(self.sizes))]
        return {entry for entries, floor in zip(own, floors, strict=True) for entry in entries[len(entries) - floor :]}

    def part(self, parameter):
        tasks = [task for task, table in self.tables.items() if parameter in table]
        return tasks[0] if len(tasks) == 1 else "shared"

    def kept_in_budget(self, counts, floors, arbiter):
        """What remains after each part has lost its count of its lowest entries that are not protected."""
        protected = self.protected(floors, arbiter)
        free = [entry for entry in self.by_agreement(arbiter) if entry not in protected]
        lost = set()
        for part, count in counts.items():
            lost.update([entry for entry in free if part in ("everything", self.part(entry[0]))][:count])
        return set(self.entries) - lost


def kth_largest(values, k):
    return sorted(values, reverse=True)[min(k, len(values)) - 1]


ARBITERS = {
    "unanimous": max,
    "any": min,
    "mean": lambda values: sum(values) / len(values),
    "majority": median,
    "at_least(2)": lambda values: kth_largest(values, 2),
    "at_least(3)": lambda values: kth_largest(values, 3),
}


def lamp(scores):
    """LAMP, equation 4: the square over the sum of all squares at least as large."""
    scores = np.abs(np.asarray(scores, dtype=np.float64))
    result = np.zeros_like(scores)
    for i, score in enumerate(scores):
        if score > 0:
            result[i] = score**2 / sum(other**2 for other in scores if other >= score)
    return result
