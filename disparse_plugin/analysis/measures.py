"""How much the masks of two or more tasks have in common, from counts: IoU, what chance gives, kappa.

A *stratum* is one layer with the masks of the tasks that reach it. An *overlap* is one stratum, or several taken
together; several are never thrown into one pot, because layers differ so much in density that even masks drawn at
random, layer by layer, would look alike. Chance is always chance *within the layer*.

With ``n`` alive weights in a layer, of which task k keeps ``n_k``, densities ``d_k = n_k / n``, and T tasks:

``iou``
    ``|kept by all| / |kept by any|``, for any number of tasks. NaN where nothing is kept.
``chance_iou``
    What it would be if each task had drawn its ``n_k`` weights at random and independently:
    ``prod d_k / (1 - prod (1 - d_k))``, the ratio of the expected counts (the expected ratio differs by O(1/n)).
``kappa``
    Agreement on keep *and* removal beyond chance, ``(P - E) / (1 - E)``. For two tasks it is Cohen's kappa: ``P`` is
    the share of weights on which they decide alike and ``E = d_a d_b + (1 - d_a)(1 - d_b)`` (Cohen, Educ. Psychol.
    Meas. 20, 1960). For more tasks ``P`` and ``E`` are means over all pairs (Conger, Psychol. Bull. 88, 1980; each task
    has a density of its own, unlike in Fleiss' kappa). 1 for equal masks, 0 for independent ones at *any* density,
    negative for masks that avoid each other, NaN where every task keeps all or every task keeps nothing, or there is
    but one task.
``rank_correlation``
    Spearman's correlation of the scores themselves, before any cut (Am. J. Psychol. 15, 1904); the mean over pairs.

Over several layers the expected and observed counts are added up first (for kappa, weights ``n (1 - E)`` for each
layer's kappa), and rank correlations are averaged with weights ``n``.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..agreement.ranking import ranks
from ..agreement.tallies import count_true

Pair: TypeAlias = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Stratum:
    """The counts of one layer.

    Attributes:
        size: Number of alive weights.
        kept: For each task that reaches the layer, how many it keeps.
        kept_by: How many are kept by exactly 0, 1, ... T of these tasks.
        both: For each pair of them, how many both keep.
        rank_correlations: For each pair, Spearman's correlation of the scores; NaN where unknown.
    """

    size: int
    kept: Mapping[str, int]
    kept_by: tuple[int, ...]
    both: Mapping[Pair, int]
    rank_correlations: Mapping[Pair, float]

    def between(self, first: str, second: str) -> Stratum:
        """Return the counts of two of the tasks alone."""
        pair = (first, second) if (first, second) in self.both else (second, first)
        a, b, both = self.kept[first], self.kept[second], self.both[pair]
        return Stratum(
            self.size,
            {first: a, second: b},
            (self.size - a - b + both, a + b - 2 * both, both),
            {(first, second): both},
            {(first, second): self.rank_correlations[pair]},
        )

    @property
    def any_by_chance(self) -> float:
        """How many weights at least one task would keep if all chose independently."""
        return self.size * (1 - math.prod(1 - kept / self.size for kept in self.kept.values()))

    @property
    def all_by_chance(self) -> float:
        """How many weights all tasks would keep if all chose independently."""
        return self.size * math.prod(kept / self.size for kept in self.kept.values())

    @property
    def alike(self) -> tuple[float, float]:
        """On how many weights a pair of tasks decides alike, observed and by chance; means over the pairs."""
        observed = [self.size - self.kept[a] - self.kept[b] + 2 * both for (a, b), both in self.both.items()]
        chance = []
        for a, b in self.both:
            p, q = self.kept[a] / self.size, self.kept[b] / self.size
            chance.append(self.size * (p * q + (1 - p) * (1 - q)))
        return sum(observed) / len(observed), sum(chance) / len(chance)


def count_stratum(masks: Mapping[str, Tensor], scores: Mapping[str, Tensor] | None = None) -> Stratum:
    """Count what the masks of one layer have in common.

    Args:
        masks: For each task, the alive entries that it keeps: bool, 1-D.
        scores: The tasks' scores of the same entries, or None to leave the rank correlations out (NaN).

    Example:
        >>> count_stratum({"a": torch.tensor([True, True, False]), "b": torch.tensor([True, False, False])}).kept_by
        (1, 1, 1)
    """
    pairs = list(itertools.combinations(masks, 2))
    size = next(iter(masks.values())).numel()
    times = torch.zeros(size, dtype=torch.int16, device=next(iter(masks.values())).device)
    for mask in masks.values():
        times += mask.to(times.device)
    correlations = dict.fromkeys(pairs, math.nan)
    if scores is not None and pairs:
        ordered = {task: _standard_ranks(scores[task]) for task in masks}
        correlations = {(a, b): _spearman(ordered[a], ordered[b]) for a, b in pairs}
    return Stratum(
        size,
        {task: count_true(mask) for task, mask in masks.items()},
        tuple(count_true(times == k) for k in range(len(masks) + 1)),
        {(a, b): count_true(masks[a] & masks[b]) for a, b in pairs},
        correlations,
    )


@dataclasses.dataclass(frozen=True)
class Overlap:
    """What tasks have in common in one layer, or in several together.

    Attributes:
        name: The layer's qualified name, or what the layers are called together.
        strata: The counts, one entry per layer.
    """

    name: str
    strata: tuple[Stratum, ...]

    @functools.cached_property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that reach the layer (or one of the layers)."""
        return tuple(dict.fromkeys(task for stratum in self.strata for task in stratum.kept))

    @property
    def size(self) -> int:
        """Number of alive weights."""
        return sum(stratum.size for stratum in self.strata)

    @property
    def density(self) -> dict[str, float]:
        """For each task the share that it keeps of the weights that it reaches."""
        return {
            task: _ratio(
                sum(stratum.kept.get(task, 0) for stratum in self.strata),
                sum(stratum.size for stratum in self.strata if task in stratum.kept),
            )
            for task in self.tasks
        }

    @property
    def kept_by(self) -> tuple[int, ...]:
        """How many weights are kept by exactly 0, 1, ... T tasks."""
        counts = [0] * (len(self.tasks) + 1)
        for stratum in self.strata:
            for k, count in enumerate(stratum.kept_by):
                counts[k] += count
        return tuple(counts)

    @property
    def iou(self) -> float:
        """Intersection over union of all tasks' masks; see the module's formulas."""
        kept_by_all = sum(stratum.kept_by[-1] for stratum in self.strata)
        return _ratio(kept_by_all, sum(stratum.size - stratum.kept_by[0] for stratum in self.strata))

    @property
    def chance_iou(self) -> float:
        """The IoU of independent masks of the same densities."""
        kept_by_all = sum(stratum.all_by_chance for stratum in self.strata)
        return _ratio(kept_by_all, sum(stratum.any_by_chance for stratum in self.strata))

    @property
    def kappa(self) -> float:
        """Agreement beyond chance, by Cohen's kappa; Conger's for more than two tasks."""
        shared = [stratum for stratum in self.strata if stratum.both]
        alike = [stratum.alike for stratum in shared]
        observed, chance = (sum(counts[place] for counts in alike) for place in (0, 1))
        return _ratio(observed - chance, sum(stratum.size for stratum in shared) - chance)

    @property
    def rank_correlation(self) -> float:
        """Spearman's correlation of the scores, averaged over pairs and, with their sizes as weights, over layers."""
        known = [
            (stratum.size, value)
            for stratum in self.strata
            for value in stratum.rank_correlations.values()
            if not math.isnan(value)
        ]
        return _ratio(sum(size * value for size, value in known), sum(size for size, _ in known))

    def pair(self, first: str, second: str) -> Overlap:
        """Return the overlap of two of the tasks, in the layers that both reach.

        Raises:
            KeyError: If no layer is reached by both.
        """
        strata = tuple(
            stratum.between(first, second)
            for stratum in self.strata
            if first != second and first in stratum.kept and second in stratum.kept
        )
        if not strata:
            raise KeyError(
                f"pair: must be two tasks that reach {self.name}, found {first!r} and {second!r}; "
                f"there are {', '.join(self.tasks)}"
            )
        return Overlap(self.name, strata)

    @property
    def pairs(self) -> dict[Pair, Overlap]:
        """The overlap of each pair of tasks that have a layer in common."""
        found = dict.fromkeys(pair for stratum in self.strata for pair in stratum.both)
        return {pair: self.pair(*pair) for pair in found}

    def pairwise(self) -> Overlap:
        """Return the overlap with every pair of tasks as a stratum of its own.

        Its IoU does not fall with the number of tasks, so it can be compared with that of one pair.
        """
        return together(self.name, self.pairs.values())

    def to_dict(self) -> dict[str, Any]:
        """Return all measures as plain values for JSON; what is undefined is None."""
        return {**self._measures(), "pairs": [overlap._measures() for overlap in self.pairs.values()]}

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat row for all tasks and, with three or more, one for each pair, for ``pandas.DataFrame``."""
        overlaps = [self, *self.pairs.values()] if len(self.tasks) > 2 else [self]
        return [overlap._row() for overlap in overlaps]

    def _measures(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "tasks": list(self.tasks),
            "size": self.size,
            "density": {task: plain(value) for task, value in self.density.items()},
            "kept_by": list(self.kept_by),
            **{measure: plain(getattr(self, measure)) for measure in MEASURES},
        }

    def _row(self) -> dict[str, Any]:
        flat = self._measures()
        return {
            "name": self.name,
            "tasks": " & ".join(self.tasks),
            "size": self.size,
            **{f"density {task}": value for task, value in flat["density"].items()},
            **{measure: flat[measure] for measure in MEASURES},
            **{f"kept by {k}": count for k, count in enumerate(self.kept_by)},
        }


MEASURES = ("iou", "chance_iou", "kappa", "rank_correlation")


def together(name: str, overlaps: Iterable[Overlap]) -> Overlap:
    """Take several overlaps as one, every layer a stratum of its own."""
    return Overlap(name, tuple(stratum for overlap in overlaps for stratum in overlap.strata))


def _ratio(part: float, whole: float) -> float:
    # Where chance agreement is complete, rounding may leave a tiny rest of either sign in place of zero.
    return part / whole if whole > 1e-9 else math.nan


def plain(value: float) -> float | None:
    """Return a number as JSON can hold it: None for NaN."""
    return None if math.isnan(value) else value


def _average_ranks(values: Tensor) -> Tensor:
    """Rank from 0 (lowest) to n-1; equal values share the mean of their ranks.

    By the first-come rule of :mod:`disparse_plugin.agreement.ranking`, tables full of equal scores would look alike.

    Example:
        >>> _average_ranks(torch.tensor([0.5, 0.1, 0.5, 0.0])).tolist()
        [2.5, 1.0, 2.5, 0.0]
    """
    place = ranks(values).long()
    ordered = torch.empty_like(values)
    ordered[place] = values
    _, group, counts = ordered.unique_consecutive(return_inverse=True, return_counts=True)
    last = counts.cumsum(0) - 1
    means: Tensor = last.double() - (counts - 1).double() / 2  # whole numbers divide to torch's default type
    return means[group][place]


def _standard_ranks(values: Tensor) -> Tensor:
    """Return :func:`_average_ranks` with mean 0 and length 1, so that a dot product is Spearman's correlation.

    All zeros where the values are all equal, whose correlation with anything is undefined.

    Example:
        >>> a, b = _standard_ranks(torch.tensor([1.0, 2.0, 9.0])), _standard_ranks(torch.tensor([5.0, 7.0, 6.0]))
        >>> round(float(a @ b), 3)
        0.5
    """
    centred = _average_ranks(values)
    centred -= centred.mean()
    length = torch.linalg.vector_norm(centred)
    return centred / length if bool(length > 0) else centred


def _spearman(a: Tensor, b: Tensor) -> float:
    """Return Spearman's rank correlation of two :func:`_standard_ranks`; NaN where one of the two is constant."""
    if not bool(a.any()) or not bool(b.any()):
        return float("nan")
    return float(a @ b.to(a.device))
