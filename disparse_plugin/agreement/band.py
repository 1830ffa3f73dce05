"""The exact cut by a sample, where one task's percentile decides.

Where to cut is a question about one percentile, so only the weights near it need exact ranks. A sample tells roughly
where the cut lies; one pass per task puts every entry below, inside or above a narrow band around it; entries inside
get exact ranks, the others only need to be on the right side. The result is the very mask that full ranks give, or None
when the sample misled.

Why it is exact: unanimous, any and at_least(k) return one of the tasks' percentiles, picked by order alone. They
commute with every increasing map, so with clipping all percentiles to the band, and the n lowest of the clipped
agreement scores are the n lowest of the true ones as long as the cut falls strictly inside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..arbiters import Arbiter
from ..sorting import over, positions, taken
from .candidates import Candidates
from .percentiles import agreement, fractions, in_threads
from .ranking import kth_lowest, lowest, ranks
from .sample import sampled, value_at
from .tallies import count_true, counts_true

# Entries sampled to find the band, and half the band's width in percentiles: seven standard errors at this size.
SAMPLE = 2**19
HALF_WIDTH = 0.005


@dataclasses.dataclass
class _Band:
    """One task's narrow range of scores, ``low < score <= high``, and the exact ranks of what lies inside."""

    low: float
    high: float
    below: int  # entries at or under `low`: the rank of the first entry inside
    inside: dict[int, Tensor]  # index of the parameter -> positions of the entries inside
    percentiles: dict[int, Tensor]  # their exact percentiles
    total: int

    @property
    def limits(self) -> tuple[float, float]:
        within = sum(part.numel() for part in self.inside.values())
        return self.below / self.total, (self.below + within) / self.total


def pays(entries: int, tasks: int) -> bool:
    """Tell whether a sample saves time: one is taken of each task, and of many all together are as much as a model."""
    return entries > max(4, tasks) * SAMPLE


def lowest_in_band(
    candidates: Candidates, tasks: Sequence[str], arbiter: Arbiter, count: int, within: Sequence[int]
) -> list[Tensor] | None:
    """Mark the ``count`` units with the lowest agreement scores.

    Args:
        candidates: What is ranked; on one device.
        tasks: All task names.
        arbiter: One that returns one of the percentiles, chosen by their order alone.
        count: How many units to mark: more than none, fewer than all.
        within: Indices of the parameters that are cut.

    Returns:
        As :func:`disparse_plugin.agreement.ways.lowest_by_agreement`; None if the sample misled.
    """
    ranges = _sampled_ranges(candidates, tasks, arbiter, count, within)
    found = in_threads(lambda task: _band(candidates, task, *ranges[task]), tasks, candidates.devices)
    bands = dict(zip(tasks, found, strict=True))
    floor = max(band.limits[0] for band in bands.values())
    ceiling = min(band.limits[1] for band in bands.values())
    if floor >= ceiling:
        return None
    marks, undecided, values, magnitudes = [], [], [], []
    for index in within:
        mark, inside, value = _judge(candidates.scores[index], index, bands, arbiter)
        # Clipping: under the floor the order is unknown and does not matter, because all of it is pruned.
        mark[inside] = value <= floor
        left = positions(value > floor)
        marks.append(mark)
        undecided.append(inside[left])
        values.append(value[left])
        magnitudes.append(_magnitudes_at(candidates, index, undecided[-1]))
    surely = sum(counts_true(marks))
    if not surely <= count <= surely + count_true(torch.cat(values) <= ceiling):
        return None
    known = [part for part in magnitudes if part is not None]
    last = lowest(torch.cat(values), count - surely, torch.cat(known) if known else None)
    for mark, places, part in zip(marks, undecided, last.split([len(p) for p in undecided]), strict=True):
        mark[places] = part
    return marks


def _magnitudes_at(candidates: Candidates, index: int, places: Tensor) -> Tensor | None:
    return None if candidates.magnitudes is None else taken(candidates.magnitudes[index], places)


def _sampled_ranges(
    candidates: Candidates, tasks: Sequence[str], arbiter: Arbiter, count: int, within: Sequence[int]
) -> dict[str, tuple[float, float]]:
    """Guess, from every stride-th entry, the range of each task's scores around the cut."""
    sample = sampled(candidates, range(len(candidates.scores)), SAMPLE)
    every = agreement(sample, tasks, arbiter)
    values = torch.cat([every[index] for index in within])
    share = count / sum(candidates.sizes[index] for index in within)
    middle = kth_lowest(values, min(values.numel(), max(1, round(share * values.numel()))))
    scores = {task: torch.cat([rows[task] for rows in sample.scores if task in rows]).double() for task in tasks}
    ends = (middle - HALF_WIDTH, middle + HALF_WIDTH)
    return {task: (value_at(own, ends[0]), value_at(own, ends[1])) for task, own in scores.items()}


def _band(candidates: Candidates, task: str, low: float, high: float) -> _Band:
    below, total, inside, values, magnitudes = 0, 0, {}, [], []
    for index, rows in enumerate(candidates.scores):
        if task in rows:
            row = rows[task]
            above = over(row, low)
            below += row.numel() - count_true(above)
            total += row.numel()
            inside[index] = positions(above ^ over(row, high))
            values.append(taken(row, inside[index]))
            magnitudes.append(_magnitudes_at(candidates, index, inside[index]))
    known = [part for part in magnitudes if part is not None]
    # All of equal scores lie on one side of a limit, so ties are broken among what is inside as among all.
    ranked = ranks(torch.cat(values), torch.cat(known) if known else None)
    split = fractions(ranked.long() + below, total).split([value.numel() for value in values])
    return _Band(low, high, below, inside, dict(zip(inside, split, strict=True)), total)


def _judge(
    rows: Mapping[str, Tensor], index: int, bands: Mapping[str, _Band], arbiter: Arbiter
) -> tuple[Tensor, Tensor, Tensor]:
    """Put each entry of a parameter under, inside or over the band, with exact values inside.

    Returns:
        Which entries are under it, the positions of those inside, and their agreement scores.
    """
    sides = torch.stack([_side(row, bands[task]) for task, row in rows.items()])
    side = arbiter(sides)
    inside = positions(_equal(side, 1))
    percentiles = sides[:, inside].double()  # 0 and 2 stand for "under" and "over": they only have to compare right
    for axis, task in enumerate(rows):
        exact, places = bands[task].percentiles[index], bands[task].inside[index]
        if places.numel():
            found = exact[torch.searchsorted(places, inside).clamp_max_(places.numel() - 1)]
            percentiles[axis] = torch.where(percentiles[axis] == 1, found, percentiles[axis])
    return _equal(side, 0), inside, arbiter(percentiles)


def _side(row: Tensor, band: _Band) -> Tensor:
    """Tell of each score whether it is under the band (0), inside (1) or over it (2)."""
    return over(row, band.low).view(torch.int8) + over(row, band.high).view(torch.int8)


def _equal(values: Tensor, number: int) -> Tensor:
    """Compare small whole numbers; on a CPU numpy does it two to three times faster than torch."""
    return torch.from_numpy(values.numpy() == number) if values.device.type == "cpu" else values == number
