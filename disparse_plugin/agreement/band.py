"""The exact cut without sorting everything.

Where to cut is a question about one percentile, so only the weights near it need exact ranks. A sample tells roughly
where the cut lies; one pass per task puts every entry below, inside or above a narrow band around it; entries inside
get exact ranks, the others only need to be on the right side. The result is the very mask that full ranks give, or None
when the sample misled; then the caller ranks everything. Used on CPUs, where a full sort is the slowest step of all.

Why it is exact: unanimous, any and at_least(k) return one of the tasks' percentiles, picked by order alone. They
commute with every increasing map, so with clipping all percentiles to the band, and the n lowest of the clipped
agreement scores are the n lowest of the true ones as long as the cut falls strictly inside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..arbiters import Arbiter, is_order_statistic
from .candidates import Candidates, first_of, joined_on_one_device
from .percentiles import agreement, fractions, in_threads
from .ranking import count_true, kth_lowest, lowest, positions, ranks

# Entries sampled to find the band, and half the band's width in percentiles: seven standard errors at this size.
SAMPLE = 2**19
HALF_WIDTH = 0.005


def lowest_by_agreement(
    candidates: Candidates,
    tasks: Sequence[str],
    arbiter: Arbiter,
    count: int,
    within: Sequence[int] | None = None,
) -> list[Tensor]:
    """Mark the ``count`` units with the lowest agreement scores.

    Args:
        candidates: What is ranked.
        tasks: All task names.
        arbiter: The reduction over tasks.
        count: How many units to mark, over all parameters that are cut.
        within: Indices of the parameters that are cut, in ascending order; by default all. Agreement scores are those
            among all parameters in any case.

    Returns:
        bool, 1-D, one per parameter that is cut, on its device; exactly ``count`` are True. Ties as in
        :mod:`disparse_plugin.agreement.ranking`.
    """
    within = range(len(candidates.scores)) if within is None else within
    total = _total(candidates, within)
    devices = {first_of(rows).device for rows in candidates.scores}
    on_cpu = devices == {torch.device("cpu")}
    if on_cpu and is_order_statistic(arbiter) and total > 4 * SAMPLE and 0 < count < total:
        chosen = _cut_in_band(candidates, tasks, arbiter, count, within)
        if chosen is not None:
            return chosen
    every = agreement(candidates, tasks, arbiter)
    return lowest_of([every[index] for index in within], count, candidates.magnitudes_of(within))


def _total(candidates: Candidates, within: Sequence[int]) -> int:
    return sum(first_of(candidates.scores[index]).numel() for index in within)


def lowest_of(values: Sequence[Tensor], count: int, magnitudes: Sequence[Tensor] | None) -> list[Tensor]:
    """Mark the lowest entries of several tensors together; bool, one for each, on its device."""
    joined = None if magnitudes is None else joined_on_one_device(magnitudes)
    marked = lowest(joined_on_one_device(values), count, joined)
    split = marked.split([value.numel() for value in values])
    return [part.to(value.device) for part, value in zip(split, values, strict=True)]


@dataclasses.dataclass
class _Band:
    """One task's narrow range of scores, ``low < score <= high``, and the exact ranks of what lies inside."""

    low: float
    high: float
    below: int  # entries at or under `low`: the rank of the first entry inside
    inside: dict[int, Tensor]  # parameter index -> positions of the entries inside
    percentiles: dict[int, Tensor]  # their exact percentiles
    total: int

    @property
    def limits(self) -> tuple[float, float]:
        within = sum(part.numel() for part in self.inside.values())
        return self.below / self.total, (self.below + within) / self.total


def _cut_in_band(
    candidates: Candidates, tasks: Sequence[str], arbiter: Arbiter, count: int, within: Sequence[int]
) -> list[Tensor] | None:
    ranges = _sampled_ranges(candidates, tasks, arbiter, count, within)
    bands = dict(zip(tasks, in_threads(lambda task: _band(candidates, task, *ranges[task]), tasks), strict=True))
    floor = max(band.limits[0] for band in bands.values())
    ceiling = min(band.limits[1] for band in bands.values())
    if floor >= ceiling:
        return None
    marks, undecided, values = [], [], []
    for index in within:
        side, inside, value = _judge(candidates.scores[index], index, bands, arbiter)
        mark = torch.from_numpy(side.numpy() == 0)
        # Clipping: under the floor the order is unknown and does not matter, because all of it is pruned.
        mark[inside[value <= floor]] = True
        marks.append(mark)
        undecided.append(inside[value > floor])
        values.append(value[value > floor])
    surely = sum(count_true(mark) for mark in marks)
    joined = torch.cat(values)
    if not surely <= count <= surely + count_true(joined <= ceiling):
        return None
    magnitudes = candidates.magnitudes_of(within)
    if magnitudes is not None:
        magnitudes = [part[inside] for part, inside in zip(magnitudes, undecided, strict=True)]
    taken = lowest_of(values, count - surely, magnitudes)
    for mark, inside, take in zip(marks, undecided, taken, strict=True):
        mark[inside[take]] = True
    return marks


def _sampled_ranges(
    candidates: Candidates, tasks: Sequence[str], arbiter: Arbiter, count: int, within: Sequence[int]
) -> dict[str, tuple[float, float]]:
    """Guess, from every stride-th entry, the range of each task's scores around the cut."""
    total = sum(candidates.sizes)
    stride = max(1, total // SAMPLE)
    while stride % 2 == 0 or stride % 3 == 0 or stride % 5 == 0 or stride % 7 == 0:
        stride += 1  # kernels have 9, 25 or 49 places; a stride that divides them would see only some
    sample = [{task: row[::stride] for task, row in rows.items()} for rows in candidates.scores]
    every = agreement(Candidates(sample), tasks, arbiter)
    values = torch.cat([every[index] for index in within])
    share = count / _total(candidates, within)
    middle = kth_lowest(values, min(values.numel(), max(1, round(share * values.numel()))))
    ranges = {}
    for task in tasks:
        sampled = torch.cat([rows[task] for rows in sample if task in rows]).double()
        last = sampled.numel() - 1
        low, high = (int((middle + shift) * last) for shift in (-HALF_WIDTH, HALF_WIDTH))
        ranges[task] = (
            kth_lowest(sampled, low + 1) if low >= 0 else -torch.inf,
            kth_lowest(sampled, high + 1) if high <= last else torch.inf,
        )
    return ranges


def _band(candidates: Candidates, task: str, low: float, high: float) -> _Band:
    below, total, inside, values = 0, 0, {}, []
    for index, rows in enumerate(candidates.scores):
        if task in rows:
            row = rows[task]
            over = _above(row, low)
            below += row.numel() - count_true(over)
            total += row.numel()
            inside[index] = positions(over ^ _above(row, high))
            values.append(row[inside[index]])
    magnitudes = candidates.magnitudes_of(inside)
    if magnitudes is not None:
        magnitudes = [part[places] for part, places in zip(magnitudes, inside.values(), strict=True)]
    # All of equal scores lie on one side of a limit, so ties are broken among what is inside as among all.
    joined = None if magnitudes is None else torch.cat(magnitudes)
    exact = fractions(ranks(torch.cat(values), joined).long() + below, total)
    split = exact.split([value.numel() for value in values])
    return _Band(low, high, below, inside, dict(zip(inside, split, strict=True)), total)


def _judge(
    rows: Mapping[str, Tensor], index: int, bands: Mapping[str, _Band], arbiter: Arbiter
) -> tuple[Tensor, Tensor, Tensor]:
    """Put each entry of one parameter under (0), inside (1) or over (2) the band, with exact values inside.

    Returns:
        The sides (int8), the positions of the entries inside, and their agreement scores.
    """
    limits = [(row, bands[task].low, bands[task].high) for task, row in rows.items()]
    sides = torch.stack(
        [_above(row, low).view(torch.int8) + _above(row, high).view(torch.int8) for row, low, high in limits]
    )
    side = arbiter(sides)
    inside = positions(torch.from_numpy(side.numpy() == 1))
    percentiles = sides[:, inside].double()  # 0 and 2 stand for "under" and "over": they only have to compare right
    for axis, task in enumerate(rows):
        known = percentiles[axis] == 1
        places = torch.searchsorted(bands[task].inside[index], inside[known])
        percentiles[axis, known] = bands[task].percentiles[index][places]
    return side, inside, arbiter(percentiles)


def _above(row: Tensor, limit: float) -> Tensor:
    """Compare on a CPU, where numpy does it two to three times faster than torch."""
    if row.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(row.numpy() > limit)
    return row > limit
