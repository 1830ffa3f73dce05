"""Where a sequence of numbers drops once and for all, if it does.

**Rule.** Of all places that leave at least ``MARGIN`` values on either side, take the one at which two means, one
before and one after, fit best by least squares and the second mean is the lower one. It is a drop if all of these hold:

1. the mean falls by at least ``min_drop``;
2. by shuffling the values, a fit as good is found in at most ``significance`` of the cases (the share of ``SHUFFLES``
   random orders whose best drop reduces the squared error at least as much; the given order counts as one);
3. the two means fit better than a straight line by the Bayesian information criterion, with three parameters (two means
   and the place) against the line's two. A steady decline is not a drop.

The statistic in 2 is the least squares form of the classical test for one change in mean (Sen & Srivastava, Ann. Stat.
3, 1975).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MARGIN = 2
SHUFFLES = 999
_NOISE = 1e-12  # squared error per value that counts as a perfect fit


@dataclasses.dataclass(frozen=True)
class Drop:
    """One accepted drop: the first ``place`` values have mean ``before``, the others ``after``."""

    place: int
    before: float
    after: float
    p_value: float


def find_drop(values: Sequence[float], *, min_drop: float, significance: float) -> Drop | None:
    """Find the one drop of a sequence by the rule of this module.

    Args:
        values: The sequence, without NaN.
        min_drop: The least difference of the means.
        significance: The largest p-value.

    Returns:
        The drop, or None when there is none, or with fewer than ``2 * MARGIN`` values.

    Example:
        >>> find_drop([0.9, 0.8, 0.9, 0.85, 0.8, 0.3, 0.2, 0.3, 0.25, 0.2], min_drop=0.1, significance=0.05).place
        5
        >>> find_drop([0.1 * step for step in range(10, 0, -1)], min_drop=0.1, significance=0.05) is None
        True
    """
    series = np.asarray(values, dtype=np.float64)
    if series.size < 2 * MARGIN or np.ptp(series) == 0:
        return None
    gains = _gains(series[None])[0]
    place = int(gains.argmax())
    before, after = float(series[: place + MARGIN].mean()), float(series[place + MARGIN :].mean())
    if before - after < min_drop or not _beats_a_line(series, float(gains[place])):
        return None
    generator = np.random.default_rng(0)
    shuffled = generator.permuted(np.tile(series, (SHUFFLES, 1)), axis=1)
    best = _gains(shuffled).max(axis=1)
    p_value = (1 + int((best >= gains[place] * (1 - 1e-9)).sum())) / (1 + SHUFFLES)
    return Drop(place + MARGIN, before, after, p_value) if p_value <= significance else None


def _gains(series: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each row and allowed place, by how much two means reduce the squared error of one; 0 where the mean rises."""
    size = series.shape[1]
    counts = np.arange(MARGIN, size - MARGIN + 1)
    sums = series.cumsum(axis=1)
    before = sums[:, counts - 1] / counts
    after = (sums[:, -1:] - sums[:, counts - 1]) / (size - counts)
    gains: NDArray[np.float64] = np.where(before > after, counts * (size - counts) / size * (before - after) ** 2, 0.0)
    return gains


def _beats_a_line(series: NDArray[np.float64], gain: float) -> bool:
    size, steps = series.size, np.arange(series.size)
    total = float(((series - series.mean()) ** 2).sum())
    line = np.polynomial.Polynomial.fit(steps, series, 1)
    line_error = float(((series - line(steps)) ** 2).sum())
    step_score = size * np.log(max(total - gain, 0.0) / size + _NOISE) + 3 * np.log(size)
    line_score = size * np.log(line_error / size + _NOISE) + 2 * np.log(size)
    return bool(step_score < line_score)
