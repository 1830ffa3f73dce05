"""The watershed: the layer after which the tasks stop agreeing on which weights to keep, and what to do about it.

The paper (section 4.5) reads a watershed off the plain IoU per layer. That curve falls even for two identical tasks,
because it follows the layers' densities, so the rule here looks at chance-corrected agreement, and answers None unless
the data support a drop:

1. Layers where the agreement is undefined or cannot be measured are left out: kappa is NaN, or, with controls, the
   ceiling is below ``disparse_plugin.analysis.controls.LOWEST_CEILING``: a task does not even agree with itself there.
2. The values are kappa per layer or, with controls, kappa between tasks across halves of the data over the ceiling,
   i.e. agreement corrected for unreliability (Spearman, Am. J. Psychol. 15, 1904): 1 means that two tasks agree as
   well as each agrees with itself.
3. One drop is sought by :mod:`disparse_plugin.analysis.change_point`.
4. With controls, observed kappa must fall there by at least the least drop *more* than kappa with permuted labels does:
   every task has a head of its own, whose random weights alone make tasks differ in the layers next to it.
5. With resampled batches, it must come back: a drop is found in at least half of the resamples, and the places of the
   middle 80 % of them span at most a quarter of the layers (or two layers).

Layers are in the order of ``TaskScores.parameters``, the order in which the model's modules were made. Where that is
not the order of computation, the answer means little.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

import numpy as np

from ..kinds import check_fraction, check_number
from .change_point import Drop, find_drop
from .controls import Controls
from .measures import Overlap


@dataclasses.dataclass(frozen=True)
class Watershed:
    """A supported drop of the agreement between tasks.

    Attributes:
        layer: The last layer before the drop.
        next_layer: The first layer after it.
        before: Mean agreement of the layers up to ``layer``.
        after: Mean agreement of the layers from ``next_layer`` on.
        p_value: Of the permutation test.
        relative: Whether agreement is relative to the ceiling (1 = as each task with itself) or plain kappa.
        interval: First and last of the layers named by the middle 80 % of the resamples, or None without resamples.
        support: Share of the resamples in which a drop was found, or None without resamples.
    """

    layer: str
    next_layer: str
    before: float
    after: float
    p_value: float
    relative: bool
    interval: tuple[str, str] | None = None
    support: float | None = None

    def __str__(self) -> str:
        """Say what was found, and what it means for an architecture."""
        measure = "agreement relative to the ceiling" if self.relative else "agreement beyond chance (kappa)"
        lines = [
            f"Watershed after {self.layer}: mean {measure} {self.before:.2f} up to it, {self.after:.2f} from "
            f"{self.next_layer} on (p = {self.p_value:.3f})."
        ]
        if self.interval is not None and self.support is not None:
            lines.append(
                f"Resampled batches put it between {self.interval[0]} and {self.interval[1]} (middle 80 %), and find a "
                f"drop in {100 * self.support:.0f} % of the cases."
            )
        else:
            lines.append("Its uncertainty is unknown without resampled batches: see overlap_with_controls.")
        if not self.relative:
            lines.append("Whether the labels have anything to do with it is unknown without controls.")
        lines.append(
            "Up to it the tasks want the same weights more often than further on; after it they share layers but fewer "
            "weights, so each could have a copy of its own at little loss of common structure: see suggest_branch(). "
            "Whether that pays must be found out by training; masks do not say it."
        )
        return "\n".join(lines)


def judge_watershed(
    layers: Sequence[Overlap], controls: Controls | None, *, min_drop: float, significance: float
) -> tuple[Watershed | None, str]:
    """Apply the rule of this module.

    Args:
        layers: The shared layers, in order.
        controls: Their controls, if there are any.
        min_drop: The least drop of the mean agreement that counts.
        significance: Largest p-value of the permutation test.

    Returns:
        The watershed or None, and in words what was found or why there is none.

    Raises:
        TypeError: If an option is no number.
        ValueError: If ``min_drop`` is not from 0 to 2, as kappa can fall, or ``significance`` not from 0 to 1.
    """
    check_number("min_drop", min_drop)
    if not 0 <= min_drop <= 2:
        raise ValueError(f"min_drop: must be from 0 to 2, found {min_drop}")
    check_fraction("significance", significance)
    profile = [layer.kappa for layer in layers] if controls is None else controls.relative_agreement()
    places, drop = _drop(profile, min_drop, significance)
    if drop is None:
        measure = "kappa" if controls is None else "agreement relative to the ceiling"
        return None, f"No watershed: {measure} has no single drop of at least {min_drop:g} along the layers."
    last, following = layers[places[drop.place - 1]].name, layers[places[drop.place]].name
    interval, support = None, None
    if controls is not None:
        excess = _excess_over_permuted(layers, controls.permuted, places, drop.place)
        if math.isnan(excess):
            return None, (
                f"No watershed: agreement drops between {last} and {following}, but what is left of it with permuted "
                "labels cannot be told: on one side every task keeps all weights then, or none."
            )
        if excess < min_drop:
            return None, (
                f"No watershed: agreement drops between {last} and {following}, but kappa drops there by {excess:.2f} "
                "more than with permuted labels. Architecture, heads and inputs make this drop, not what the tasks "
                "have to learn."
            )
    if controls is not None and controls.resamples:
        found = _again(controls.resamples, min_drop, significance)
        support = len(found) / len(controls.resamples)
        low, high = (int(place) for place in np.quantile(found or [0], [0.1, 0.9], method="nearest"))
        if support < 0.5 or high - low > max(2, len(profile) / 4):
            return None, (
                f"No watershed: agreement drops between {last} and {following}, but resampled batches do not confirm "
                f"it (a drop in {100 * support:.0f} % of them)."
            )
        interval = (layers[low].name, layers[high].name)
    relative = controls is not None
    watershed = Watershed(last, following, drop.before, drop.after, drop.p_value, relative, interval, support)
    return watershed, str(watershed)


def _excess_over_permuted(
    observed: Sequence[Overlap], permuted: Sequence[Overlap], places: Sequence[int], border: int
) -> float:
    """By how much more observed kappa falls at a place than kappa with permuted labels does; NaN where untold."""

    def mean(layers: Sequence[Overlap], which: Sequence[int]) -> float:
        known = [layers[place].kappa for place in which if not math.isnan(layers[place].kappa)]
        return statistics.fmean(known) if known else math.nan

    falls = [mean(layers, places[:border]) - mean(layers, places[border:]) for layers in (observed, permuted)]
    return falls[0] - falls[1]


def _drop(profile: Sequence[float], min_drop: float, significance: float) -> tuple[list[int], Drop | None]:
    places = [place for place, value in enumerate(profile) if not math.isnan(value)]
    return places, find_drop([profile[place] for place in places], min_drop=min_drop, significance=significance)


def _again(resamples: Sequence[Sequence[float]], min_drop: float, significance: float) -> list[int]:
    found = []
    for profile in resamples:
        places, drop = _drop(profile, min_drop, significance)
        if drop is not None:
            found.append(places[drop.place - 1])
    return found


@dataclasses.dataclass(frozen=True)
class Branch:
    """What it costs to give every task its own copy of the layers after one layer.

    Only the analysed weights count; biases and normalisation layers come on top.

    Attributes:
        after: The last shared layer.
        layers: The layers to copy.
        weights: How many weights the copies add to the dense model.
        kept: How many weights they add to the pruned model, where every copy holds its own task's mask.
        share: ``weights`` over all weights of the analysed model.
    """

    after: str
    layers: tuple[str, ...]
    weights: int
    kept: int
    share: float

    def __str__(self) -> str:
        """Say it in one sentence."""
        return (
            f"Branching after {self.after} copies {len(self.layers)} layers: {self.weights:,} more weights in the "
            f"dense model (+{100 * self.share:.1f} %), {self.kept:,} more in the pruned one."
        )


def branch(layers: Sequence[Overlap], private: Sequence[Overlap], after: str) -> Branch:
    """Count what branching after a layer costs; see :meth:`disparse_plugin.analysis.TaskOverlap.suggest_branch`.

    Args:
        layers: The shared layers, in order.
        private: The layers of single tasks.
        after: Name of one of the shared layers.
    """
    copied = layers[[layer.name for layer in layers].index(after) + 1 :]
    total = sum(layer.size for layer in (*layers, *private))
    weights = sum((len(layer.tasks) - 1) * layer.size for layer in copied)
    kept = sum(
        sum(stratum.kept.values()) - (stratum.size - stratum.kept_by[0]) for layer in copied for stratum in layer.strata
    )
    return Branch(after, tuple(layer.name for layer in copied), weights, kept, weights / total)
