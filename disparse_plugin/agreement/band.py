"""The exact cut without sorting everything.

Where to cut is a question about one percentile, so only the weights near it need exact ranks. A sample tells roughly
where the cut lies; one pass per task puts every entry below, inside or above a narrow band around it; entries inside
get exact ranks, the others only need to be on the right side. The result is the very mask that full ranks give, or None
when the sample misled; then the caller ranks everything.

Why it is exact: unanimous, any and at_least(k) return one of the tasks' percentiles, picked by order alone. They
commute with every increasing map, so with clipping all percentiles to the band, and the n lowest of the clipped
agreement scores are the n lowest of the true ones as long as the cut falls strictly inside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..arbiters import Arbiter, ignores_absent_tasks, is_order_statistic
from ..sorting import positions
from .candidates import Candidates, first_of, joined_on_one_device
from .counting import lowest_by_counting
from .percentiles import agreement, fractions, in_threads
from .ranking import kth_lowest, lowest, ranks
from .tallies import count_true, counts_true

# Entries sampled to find the band, and half the band's width in percentiles: seven standard errors at this size.
SAMPLE = 2**19
HALF_WIDTH = 0.005
# Entries of small parameters that an accelerator takes together, where launching many operations takes the time.
CHUNK = 2**24
# Up to so many entries a CPU ranks them all.
COUNTED = 2**15


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
    total = sum(candidates.sizes[index] for index in within)
    on_cpu = all(device.type == "cpu" for device in candidates.devices)
    # A sample is one of each task: of many, all together are more than the scores of a small model.
    sampled = total > (max(4, len(tasks)) if on_cpu else 4) * SAMPLE and len(candidates.devices) == 1
    if sampled and is_order_statistic(arbiter) and 0 < count < total:
        chosen = _cut_in_band(list(_chunks(candidates, within)), tasks, arbiter, count)
        if chosen is not None:
            return chosen
    if on_cpu and ignores_absent_tasks(arbiter) and total > COUNTED and 0 < count < total:
        return lowest_by_counting(candidates, tasks, arbiter, count, within)
    every = agreement(candidates, tasks, arbiter)
    return lowest_of([every[index] for index in within], count, candidates.magnitudes_of(within))


def lowest_of(values: Sequence[Tensor], count: int, magnitudes: Sequence[Tensor] | None) -> list[Tensor]:
    """Mark the lowest entries of several tensors together; bool, one for each, on its device."""
    joined = None if magnitudes is None else joined_on_one_device(magnitudes)
    marked = lowest(joined_on_one_device(values), count, joined)
    split = marked.split([value.numel() for value in values])
    return [part.to(value.device) for part, value in zip(split, values, strict=True)]


@dataclasses.dataclass
class _Chunk:
    """Parameters that follow each other and that the same tasks reach.

    Attributes:
        tasks: Which reach them.
        scores: Each task's, for each parameter; looked at one by one, because what is looked at may be made for it.
        sizes: How many units each parameter has.
        magnitudes: One tensor for each parameter, or None.
        cut: Whether they are cut, or only ranked.
    """

    tasks: Sequence[str]
    scores: Sequence[Mapping[str, Tensor]]
    sizes: Sequence[int]
    magnitudes: Sequence[Tensor] | None
    cut: bool

    def row(self, task: str, stride: int = 1) -> Tensor:
        """One task's scores; where the chunk is one parameter, a view."""
        parts = [rows[task][::stride] for rows in self.scores]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def magnitudes_at(self, places: Tensor) -> Tensor | None:
        if self.magnitudes is None:
            return None
        return (self.magnitudes[0] if len(self.magnitudes) == 1 else torch.cat(list(self.magnitudes)))[places]


def _chunks(candidates: Candidates, within: Sequence[int]) -> Iterator[_Chunk]:
    """Part the parameters: on a CPU each is a chunk."""
    cut, waiting, entries = set(within), list[int](), 0
    kinds = [(tuple(rows), index in cut) for index, rows in enumerate(candidates.scores)]
    for index, size in enumerate(candidates.sizes):
        alone = first_of(candidates.scores[index]).device.type == "cpu" or entries + size > CHUNK
        if waiting and (alone or kinds[index] != kinds[waiting[0]]):
            yield _chunk(candidates, waiting, *kinds[waiting[0]])
            waiting, entries = [], 0
        waiting.append(index)
        entries += size
    yield _chunk(candidates, waiting, *kinds[waiting[0]])


def _chunk(candidates: Candidates, indices: Sequence[int], tasks: Sequence[str], cut: bool) -> _Chunk:
    scores = [candidates.scores[index] for index in indices]
    sizes = [candidates.sizes[index] for index in indices]
    return _Chunk(tasks, scores, sizes, candidates.magnitudes_of(indices), cut)


@dataclasses.dataclass
class _Band:
    """One task's narrow range of scores, ``low < score <= high``, and the exact ranks of what lies inside."""

    low: float
    high: float
    below: int  # entries at or under `low`: the rank of the first entry inside
    inside: dict[int, Tensor]  # number of the chunk -> positions of the entries inside
    percentiles: dict[int, Tensor]  # their exact percentiles
    total: int

    @property
    def limits(self) -> tuple[float, float]:
        within = sum(part.numel() for part in self.inside.values())
        return self.below / self.total, (self.below + within) / self.total


def _cut_in_band(chunks: Sequence[_Chunk], tasks: Sequence[str], arbiter: Arbiter, count: int) -> list[Tensor] | None:
    ranges = _sampled_ranges(chunks, tasks, arbiter, count)
    bands = dict(zip(tasks, in_threads(lambda task: _band(chunks, task, *ranges[task]), tasks), strict=True))
    floor = max(band.limits[0] for band in bands.values())
    ceiling = min(band.limits[1] for band in bands.values())
    if floor >= ceiling:
        return None
    marks, undecided, values, magnitudes, sizes = [], [], [], [], []
    for number, chunk in enumerate(chunks):
        if chunk.cut:
            mark, inside, value = _judge(chunk, number, bands, arbiter)
            # Clipping: under the floor the order is unknown and does not matter, because all of it is pruned.
            mark[inside] = value <= floor
            left = positions(value > floor)
            marks.append(mark)
            undecided.append(inside[left])
            values.append(value[left])
            magnitudes.append(chunk.magnitudes_at(undecided[-1]))
            sizes.append(chunk.sizes)
    surely = sum(counts_true(marks))
    if not surely <= count <= surely + count_true(torch.cat(values) <= ceiling):
        return None
    known = [part for part in magnitudes if part is not None]
    taken = lowest_of(values, count - surely, known or None)
    for mark, places, take in zip(marks, undecided, taken, strict=True):
        mark[places] = take
    return [part for mark, own in zip(marks, sizes, strict=True) for part in mark.split(own)]


def _sampled_ranges(
    chunks: Sequence[_Chunk], tasks: Sequence[str], arbiter: Arbiter, count: int
) -> dict[str, tuple[float, float]]:
    """Guess, from every stride-th entry, the range of each task's scores around the cut."""
    totals = [sum(chunk.sizes) for chunk in chunks]
    stride = max(1, sum(totals) // SAMPLE)
    while stride % 2 == 0 or stride % 3 == 0 or stride % 5 == 0 or stride % 7 == 0:
        stride += 1  # kernels have 9, 25 or 49 places; a stride that divides them would see only some
    sample = [{task: chunk.row(task, stride) for task in chunk.tasks} for chunk in chunks]
    every = agreement(Candidates(sample), tasks, arbiter)
    values = torch.cat([value for value, chunk in zip(every, chunks, strict=True) if chunk.cut])
    share = count / sum(total for total, chunk in zip(totals, chunks, strict=True) if chunk.cut)
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


def _band(chunks: Sequence[_Chunk], task: str, low: float, high: float) -> _Band:
    below, total, inside, values, magnitudes = 0, 0, {}, [], []
    for number, chunk in enumerate(chunks):
        if task in chunk.tasks:
            row = chunk.row(task)
            over = _above(row, low)
            below += row.numel() - count_true(over)
            total += row.numel()
            inside[number] = positions(over ^ _above(row, high))
            values.append(row[inside[number]])
            magnitudes.append(chunk.magnitudes_at(inside[number]))
    known = [part for part in magnitudes if part is not None]
    # All of equal scores lie on one side of a limit, so ties are broken among what is inside as among all.
    ranked = ranks(torch.cat(values), torch.cat(known) if known else None)
    split = fractions(ranked.long() + below, total).split([value.numel() for value in values])
    return _Band(low, high, below, inside, dict(zip(inside, split, strict=True)), total)


def _judge(chunk: _Chunk, number: int, bands: Mapping[str, _Band], arbiter: Arbiter) -> tuple[Tensor, Tensor, Tensor]:
    """Put each entry of a chunk under, inside or over the band, with exact values inside.

    Returns:
        Which entries are under it, the positions of those inside, and their agreement scores.
    """
    sides = torch.stack([_side(chunk.row(task), bands[task]) for task in chunk.tasks])
    side = arbiter(sides)
    inside = positions(_equal(side, 1))
    percentiles = sides[:, inside].double()  # 0 and 2 stand for "under" and "over": they only have to compare right
    for axis, task in enumerate(chunk.tasks):
        exact, places = bands[task].percentiles[number], bands[task].inside[number]
        if places.numel():
            found = exact[torch.searchsorted(places, inside).clamp_max_(places.numel() - 1)]
            percentiles[axis] = torch.where(percentiles[axis] == 1, found, percentiles[axis])
    return _equal(side, 0), inside, arbiter(percentiles)


def _side(row: Tensor, band: _Band) -> Tensor:
    """Tell of each score whether it is under the band (0), inside (1) or over it (2)."""
    return _above(row, band.low).view(torch.int8) + _above(row, band.high).view(torch.int8)


def _above(row: Tensor, limit: float) -> Tensor:
    """Compare; on a CPU numpy does it two to three times faster than torch."""
    if row.device.type == "cpu" and row.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(row.numpy() > limit)
    return row > limit


def _equal(values: Tensor, number: int) -> Tensor:
    """Compare; on a CPU numpy does it two to three times faster than torch."""
    return torch.from_numpy(values.numpy() == number) if values.device.type == "cpu" else values == number
