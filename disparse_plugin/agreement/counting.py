"""The exact cut by counting, for every arbiter that never falls when a percentile rises.

The bits of a float, taken as a whole number, are in the order of the floats, so the leading ones part the scores of a
task into bins. Counted, these tell the least and the largest percentile that an entry of a bin can have, and the
arbiter of the least (largest) of all tasks is the least (largest) agreement score of the unit. The k-th lowest
agreement score lies between the k-th lowest of both: a sample guesses that range, all units tell it where the sample
misled. What is wholly under the range goes, what is wholly over it stays, and only what is left, one of a hundred, is
looked at more closely: first by its bins, then by all bits of its scores, then, where scores are equal, by magnitudes.
Nothing is ever sorted but entries of bins that are still in question.

Rounding does no harm: a sum, a quotient, a median never fall when what they are made of rises, rounded or not.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ..arbiters import Arbiter
from ..sorting import over, positions, sorted_values, taken, under
from .across_tasks import roughly
from .candidates import Candidates, first_of
from .percentiles import fractions, in_threads
from .ranking import kth_lowest, lowest, ranks
from .sample import guessed
from .tallies import counts_true, extremes

# Bits of a float32 that do not count: 11 of the fraction do, so a bin is a two-thousandth of its values wide.
DROPPED = 12
# Entries that a CPU takes at a time, so that what is made of them stays in the cache.
PIECE = 2**16
# Entries that an accelerator takes at a time: enough to be busy, few beside what it holds.
LONG_PIECE = 2**23
# Steps of agreement scores in which they are counted.
STEPS = 2**16
# For each task, what percentiles rounded to 32 bits, and their sums, may differ by, and more.
SLACK = 2**-22

# For each parameter that is cut, one tensor.
Parts: TypeAlias = Mapping[int, Tensor]


def lowest_by_counting(
    candidates: Candidates, tasks: Sequence[str], arbiter: Arbiter, count: int, within: Sequence[int]
) -> list[Tensor]:
    """Mark the ``count`` units with the lowest agreement scores.

    Args:
        candidates: What is ranked; on one device.
        tasks: All task names.
        arbiter: One that never falls when a percentile rises, and ignores absent tasks.
        count: How many units to mark: more than none, fewer than all.
        within: Indices of the parameters that are cut.

    Returns:
        As :func:`disparse_plugin.agreement.ways.lowest_by_agreement`.

    Example:
        >>> from disparse_plugin.arbiters import unanimous
        >>> candidates = Candidates([{"a": torch.tensor([3.0, 1.0, 2.0]), "b": torch.tensor([1.0, 2.0, 9.0])}])
        >>> lowest_by_counting(candidates, ["a", "b"], unanimous, 1, [0])
        [tensor([False,  True, False])]
    """
    bins = dict(zip(tasks, in_threads(functools.partial(_Bins.of, candidates), tasks, candidates.devices), strict=True))
    ranges = _ranges(candidates, bins, arbiter, count, within)
    found = (_cut(candidates, bins, arbiter, limits, count, within) for limits in ranges)
    return next(marks for marks in found if marks is not None)


def _cut(
    candidates: Candidates,
    bins: Mapping[str, _Bins],
    arbiter: Arbiter,
    limits: tuple[float, float],
    count: int,
    within: Sequence[int],
) -> list[Tensor] | None:
    """Mark the lowest units; None if their highest agreement score is not between the limits."""
    marks, asked = _sides(candidates, bins, arbiter, limits, within)
    left = count - sum(counts_true(list(marks.values())))
    if not 0 < left <= sum(map(len, asked.values())):
        return None
    for closer in (_by_bins, _by_all_bits):
        least, most = _closer_bounds(candidates, bins, arbiter, asked, closer)
        low, high = (kth_lowest(torch.cat(list(part.values())), left) for part in (least, most))
        if not limits[0] <= low <= high <= limits[1]:
            return None
        gone = {index: most[index] < low for index in asked}
        left -= sum(counts_true(list(gone.values())))
        for index, places in asked.items():
            marks[index].index_fill_(0, taken(places, positions(gone[index])), True)
            asked[index] = taken(places, positions(~gone[index] & (least[index] <= high)))
    exact, _ = _closer_bounds(candidates, bins, arbiter, asked, _by_magnitude)
    last = lowest(torch.cat(list(exact.values())), left, magnitudes_at(candidates, asked))
    for (index, places), part in zip(asked.items(), last.split([len(p) for p in asked.values()]), strict=True):
        marks[index].index_fill_(0, taken(places, positions(part)), True)
    return [marks[index] for index in within]


def magnitudes_at(candidates: Candidates, places: Parts) -> Tensor | None:
    """Return the magnitudes at some places of each parameter, in one tensor; None where the order alone decides."""
    if candidates.magnitudes is None:
        return None
    return torch.cat([taken(candidates.magnitudes[index], part) for index, part in places.items()])


@dataclasses.dataclass(frozen=True)
class _Bins:
    """One task's scores, counted by their leading bits.

    Attributes:
        first: The leading bits of the lowest score.
        total: How many scores there are.
        upto: How many scores are in lower bins: int64, one more entry than there are bins.
        ends: The least and the largest percentile of a score in each bin, rounded to 32 bits and packed into one
            number of 64: so a unit's place is looked up once.
    """

    first: int
    total: int
    upto: Tensor
    ends: Tensor

    @classmethod
    def of(cls, candidates: Candidates, task: str) -> _Bins:
        rows = [rows[task] for rows in candidates.scores if task in rows]
        ends = torch.stack([extremes(row).float() for row in rows if row.numel()])
        first, last = _leading(torch.stack([ends.min(), ends.max()])).tolist()
        counts = torch.zeros(last - first + 1, dtype=torch.int64, device=ends.device)
        for row in rows:
            for piece in pieces(row.numel(), row.device):
                counts += torch.bincount(_leading(row[piece], first >= 0).sub_(first), minlength=counts.numel())
        upto, total = torch.nn.functional.pad(counts.cumsum(0), (1, 0)), sum(row.numel() for row in rows)
        ends = torch.stack([fractions(upto[:-1], total), fractions(upto[1:] - 1, total)], 1)
        return cls(first, total, upto, ends.float().view(torch.int64).flatten())

    def __call__(self, row: Tensor) -> Tensor:
        """Return the bin of each score; int32."""
        return _leading(row, self.first >= 0).sub_(self.first)


def _leading(values: Tensor, positive: bool = False) -> Tensor:
    bits = (values.float() + 0.0).view(torch.int32)
    if not positive:  # negative floats order backwards by their bits
        bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)
    return bits.bitwise_right_shift_(DROPPED)


def _bounds(
    rows: Mapping[str, Tensor], piece: slice, bins: Mapping[str, _Bins], arbiter: Arbiter
) -> tuple[Tensor, Tensor]:
    """Return the least and the largest agreement score of some units, by the bins of their scores."""
    ends = [bins[task].ends.index_select(0, bins[task](row[piece])).view(torch.float32) for task, row in rows.items()]
    joined, slack = roughly(arbiter, ends).view(-1, 2), (len(rows) + 1) * SLACK
    return joined[:, 0] - slack, joined[:, 1] + slack


def pieces(size: int, device: torch.device, rows: int = 1) -> list[slice]:
    """Divide so many entries into slices that a device takes one after the other; shorter ones of many rows.

    Example:
        >>> pieces(5, torch.device("cpu"))
        [slice(0, 65536, None)]
    """
    longest = PIECE if device.type == "cpu" else LONG_PIECE
    length = min(longest, max(1, 2 * longest // rows))
    return [slice(start, start + length) for start in range(0, size, length)]


def _ranges(
    candidates: Candidates, bins: Mapping[str, _Bins], arbiter: Arbiter, count: int, within: Sequence[int]
) -> Iterator[tuple[float, float]]:
    """Guess between which two numbers the ``count``-th lowest agreement score lies; then say so for certain."""

    def bounds(sample: Candidates) -> tuple[Tensor, Tensor]:
        found = [_bounds(rows, slice(None), bins, arbiter) for rows in sample.scores]
        return torch.cat([least for least, _ in found]), torch.cat([most for _, most in found])

    yield guessed(candidates, within, count, bounds)
    yield _range_of_the_cut(candidates, bins, arbiter, count, within)


def _range_of_the_cut(
    candidates: Candidates,
    bins: Mapping[str, _Bins],
    arbiter: Arbiter,
    count: int,
    within: Sequence[int],
) -> tuple[float, float]:
    """Return two numbers between which the ``count``-th lowest agreement score lies."""
    found = torch.zeros(2, STEPS + 1, dtype=torch.int64, device=first_of(candidates.scores[0]).device)
    for index in within:
        rows = candidates.scores[index]
        for piece in pieces(candidates.sizes[index], found.device, len(rows)):
            for row, bound in zip(found, _bounds(rows, piece, bins, arbiter), strict=True):
                row += torch.bincount((bound * STEPS).int().clamp_(0, STEPS), minlength=STEPS + 1)
    low, high = (found.cumsum(1) < count).sum(1).tolist()
    return low / STEPS, (high + 1) / STEPS


def _sides(
    candidates: Candidates,
    bins: Mapping[str, _Bins],
    arbiter: Arbiter,
    limits: tuple[float, float],
    within: Sequence[int],
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Mark what is wholly under the range, and return where what is neither under nor over it lies."""
    marks, asked = {}, {}
    for index in within:
        rows = candidates.scores[index]
        device = first_of(rows).device
        marks[index] = torch.zeros(candidates.sizes[index], dtype=torch.bool, device=device)
        found = [torch.zeros(0, dtype=torch.int64, device=device)]
        for piece in pieces(candidates.sizes[index], device, len(rows)):
            least, most = _bounds(rows, piece, bins, arbiter)
            decided = under(most, limits[0], out=marks[index][piece]) | over(least, limits[1])
            found.append(positions(~decided) + piece.start)
        asked[index] = torch.cat(found)
    return marks, asked


# From candidates, task, bins and what is asked (by parameter: places) to the least and the largest rank of each.
_Closer: TypeAlias = Callable[[Candidates, str, _Bins, Parts], dict[int, tuple[Tensor, Tensor]]]


def _closer_bounds(
    candidates: Candidates, bins: Mapping[str, _Bins], arbiter: Arbiter, asked: Parts, closer: _Closer
) -> tuple[Parts, Parts]:
    """Return the least and the largest agreement scores of what is still in question, task after task."""
    least: dict[int, list[Tensor]] = {index: [] for index in asked}
    most: dict[int, list[Tensor]] = {index: [] for index in asked}
    for task, own in bins.items():
        of_task = {index: places for index, places in asked.items() if task in candidates.scores[index]}
        for index, (low, high) in closer(candidates, task, own, of_task).items() if of_task else ():
            least[index].append(fractions(low, own.total))
            most[index].append(fractions(high, own.total))
    return {index: arbiter(torch.stack(rows)) for index, rows in least.items()}, {
        index: arbiter(torch.stack(rows)) for index, rows in most.items()
    }


def _by_bins(candidates: Candidates, task: str, bins: _Bins, asked: Parts) -> dict[int, tuple[Tensor, Tensor]]:
    """Return the ranks that scores can have by their bins."""
    found = {index: bins(score).long() for index, score in _scores_at(candidates, task, asked).items()}
    return {index: (bins.upto[own], bins.upto[own + 1] - 1) for index, own in found.items()}


def _by_all_bits(candidates: Candidates, task: str, bins: _Bins, asked: Parts) -> dict[int, tuple[Tensor, Tensor]]:
    """Return the ranks that scores can have, which differ where other scores of the task equal them."""
    scores = _scores_at(candidates, task, asked)
    places = _places_in_bins(candidates, task, bins, scores)
    near = sorted_values(torch.cat(list(_scores_at(candidates, task, places).values())))
    known = bins(near)
    found = {}
    for index, score in scores.items():
        before = _not_near(bins, bins(score), known)
        low, high = (torch.searchsorted(near, score, right=right) + before for right in (False, True))
        found[index] = low, high - 1
    return found


def _not_near(bins: _Bins, own: Tensor, known: Tensor) -> Tensor:
    """Return, of some scores, how many of the task's are in lower bins but not among those that were looked at.

    Args:
        bins: Those of the task.
        own: The bins of the scores.
        known: The bins of all scores that were looked at, in order; whole bins.
    """
    return bins.upto[own.long()] - torch.searchsorted(known, own)


def _scores_at(candidates: Candidates, task: str, places: Parts) -> dict[int, Tensor]:
    return {index: taken(candidates.scores[index][task], part) for index, part in places.items()}


def _places_in_bins(candidates: Candidates, task: str, bins: _Bins, scores: Parts) -> dict[int, Tensor]:
    """Return, of each parameter that the task reaches, where scores in the bins of the given ones lie."""
    wanted = torch.zeros_like(bins.upto[1:], dtype=torch.bool)
    for score in scores.values():
        wanted.index_fill_(0, bins(score).long(), True)
    found = {}
    for index, rows in enumerate(candidates.scores):
        if task in rows:
            row, parts = rows[task], [torch.zeros(0, dtype=torch.int64, device=wanted.device)]
            parts.extend(
                positions(wanted.index_select(0, bins(row[piece]))).add_(piece.start)
                for piece in pieces(row.numel(), wanted.device)
            )
            found[index] = torch.cat(parts)
    return found


def _by_magnitude(candidates: Candidates, task: str, bins: _Bins, asked: Parts) -> dict[int, tuple[Tensor, Tensor]]:
    """Return the exact ranks: among equal scores by magnitude, then as they come."""
    scores = _scores_at(candidates, task, asked)
    near = _places_in_bins(candidates, task, bins, scores)
    values = torch.cat(list(_scores_at(candidates, task, near).values()))
    magnitudes = magnitudes_at(candidates, near)
    known = bins(sorted_values(values))
    found = dict(zip(near, ranks(values, magnitudes).long().split([len(p) for p in near.values()]), strict=True))
    result = {}
    for index, score in scores.items():
        place = torch.searchsorted(near[index], asked[index])
        rank = found[index][place] + _not_near(bins, bins(score), known)
        result[index] = rank, rank
    return result
