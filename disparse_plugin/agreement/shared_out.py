"""The cut over candidates that no rank has all of: the same ranks, ties and counts as in one place.

Percentiles come from :mod:`disparse_plugin.agreement.sorted_shares`, the cut from
:mod:`disparse_plugin.agreement.select`; in between, each rank works on what it has. All ranks must make the same calls.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .._support.distributed import added_counts, gathered, total_counts
from ..arbiters import Arbiter, scale_of
from .budgets import Quota
from .candidates import Candidates, first_of, joined_on_one_device
from .percentiles import fractions, over_tasks
from .ranking import BITS_OF_ONE, absolute
from .renewed_shares import growths
from .select import lowest
from .sorted_shares import Sorted, in_order, ranks_among_all
from .tallies import counts_true


@dataclasses.dataclass(frozen=True)
class SharedOut(Candidates):
    """The units of a model that are alive and lie on this rank.

    Attributes:
        places: For each parameter, where its units here stand among all units of the model, int64: in the order of the
            parameters, then row-major.
        owned: For each parameter, whether its units count here; what several ranks hold counts at one of them.
    """

    places: Sequence[Tensor] = ()
    owned: Sequence[bool] = ()

    @functools.cached_property
    def sizes(self) -> list[int]:
        """How many units each parameter has, on all ranks together."""
        return total_counts([size * owned for size, owned in zip(self.local_sizes, self.owned, strict=True)])

    @property
    def local_sizes(self) -> list[int]:
        """How many units of each parameter lie here."""
        return [first_of(rows).numel() for rows in self.scores]

    @functools.cached_property
    def turns(self) -> list[Tensor]:
        """In which turn each unit goes where scores are equal, counted over all ranks."""
        everything = range(len(self.scores))
        if self.magnitudes is None:
            return list(self.places)
        magnitudes = absolute(joined_on_one_device(self.magnitudes))
        found = ranks_among_all(magnitudes, joined_on_one_device(self.places), self.counted(everything))
        return list(found.split(self.local_sizes))

    def counted(self, parameters: Sequence[int]) -> Tensor:
        """Tell of each unit of some parameters whether it counts here; bool, 1-D."""
        return joined_on_one_device(
            [torch.full_like(self.places[i], self.owned[i], dtype=torch.bool) for i in parameters]
        )

    def counts(self, marks: Sequence[Tensor]) -> list[int]:
        """Count the marked units of each parameter, on all ranks together."""
        return total_counts([count * owned for count, owned in zip(counts_true(marks), self.owned, strict=True)])

    def turns_of(self, parameters: Sequence[int]) -> Tensor:
        """Return the turns of some parameters, joined."""
        return joined_on_one_device([self.turns[index] for index in parameters])

    def lowest(self, values: Mapping[int, Tensor], count: int) -> list[Tensor]:
        """Mark the lowest units of some parameters together.

        Args:
            values: 1-D, by the index of the parameter.
            count: How many, on all ranks together.
        """
        parameters = list(values)
        marked = lowest(
            joined_on_one_device(list(values.values())),
            count,
            self.turns_of(parameters),
            self.counted(parameters),
            added_counts,
        )
        return list(marked.split([part.numel() for part in values.values()]))


def agreement(candidates: SharedOut, tasks: Sequence[str], arbiter: Arbiter) -> list[Tensor]:
    """Reduce the tasks' scores to agreement scores, as :func:`disparse_plugin.agreement.percentiles.agreement` does.

    Args:
        candidates: What is ranked.
        tasks: All task names; the order of the axis that the arbiter sees.
        arbiter: The reduction over tasks.

    Returns:
        float64 in [0, 1], 1-D, for each parameter those of its units here.

    Raises:
        ValueError: If the arbiter returns another shape or a value outside [0, 1].
    """
    if scale_of(arbiter) == "share":

        def share(index: int, task: str) -> Tensor:
            row = candidates.scores[index][task]
            return row if candidates.shares else lamp_among_all(row, candidates.counted([index]))

        return over_tasks(candidates, tasks, arbiter, share)
    ranked = {task: _percentiles(candidates, task) for task in tasks}
    return over_tasks(candidates, tasks, arbiter, lambda index, task: ranked[task].pop(index))


def _percentiles(candidates: SharedOut, task: str) -> dict[int, Tensor]:
    own = [index for index, rows in enumerate(candidates.scores) if task in rows]
    if not own:
        return {}
    parts = [candidates.scores[index][task] for index in own]
    found = ranks_among_all(joined_on_one_device(parts), candidates.turns_of(own), candidates.counted(own))
    percentiles = fractions(found, sum(candidates.sizes[index] for index in own))
    return dict(zip(own, percentiles.split([part.numel() for part in parts]), strict=True))


def lowest_in_budget(
    candidates: SharedOut, tasks: Sequence[str], arbiter: Arbiter, quotas: Sequence[Quota], floors: Sequence[int]
) -> list[Tensor]:
    """Mark what goes, as :func:`disparse_plugin.agreement.cut.lowest_in_budget` does.

    Args:
        candidates: What is ranked.
        tasks: All task names.
        arbiter: The reduction over tasks.
        quotas: How many go from which parameters, on all ranks together.
        floors: How many units of each parameter stay at least, on all ranks together.

    Returns:
        bool, 1-D, for each parameter those of its units here.
    """
    values = protected(candidates, agreement(candidates, tasks, arbiter), floors, torch.inf)
    marks: dict[int, Tensor] = {}
    for quota in quotas:
        chosen = candidates.lowest({index: values[index] for index in quota.tensors}, quota.count)
        marks.update(zip(quota.tensors, chosen, strict=True))
    return [marks[index] for index in range(len(values))]


def protected(candidates: SharedOut, values: Sequence[Tensor], floors: Sequence[int], value: float) -> list[Tensor]:
    """Give the highest entries of each parameter another value.

    Args:
        candidates: What is ranked.
        values: 1-D, for each parameter.
        floors: How many of each, on all ranks together.
        value: What they get.

    Returns:
        New tensors where something is protected.
    """
    result = list(values)
    for index, floor in enumerate(floors):
        if floor:
            low = candidates.lowest({index: values[index]}, candidates.sizes[index] - floor)[0]
            result[index] = torch.where(low, values[index], value)
    return result


def lift(candidates: SharedOut, values: Sequence[Tensor], floors: Sequence[int]) -> list[Tensor]:
    """Put the highest entries of each parameter above all others, as :func:`disparse_plugin.agreement.cut.lift`."""
    if not any(floors):
        return list(values)
    marked = protected(candidates, values, floors, torch.inf)
    return [value / 4 + 0.75 * mark.isinf() for value, mark in zip(values, marked, strict=True)]


def distinct(candidates: SharedOut, values: Sequence[Tensor]) -> list[Tensor]:
    """Part equal values, as :func:`disparse_plugin.agreement.ranking.distinct` does.

    Args:
        candidates: What the values are of.
        values: For each parameter, 1-D, float64, in [0, 1].

    Returns:
        The same values, equal ones raised to the next larger float64 by turns.
    """
    everything, every = range(len(values)), sum(candidates.sizes)
    counted = candidates.counted(everything)
    parted = in_order(
        joined_on_one_device(values), candidates.turns_of(everything), counted, lambda part: _parted(part, every)
    )
    return list(parted.split(candidates.local_sizes))


def _parted(part: Sorted, every: int) -> Tensor:
    """Raise, in one range, what is not above all before it; see :func:`disparse_plugin.agreement.ranking.distinct`."""
    ranks = part.ranks()
    free = part.values.view(torch.int64) - ranks
    highest = int(free.max()) if free.numel() else 0
    raised = free.cummax(0).values if free.numel() else free
    raised = raised.clamp_min(max([0, *part.lower(highest)])) + ranks if raised.numel() else raised
    return torch.minimum(raised, BITS_OF_ONE - (every - 1 - ranks)).view(torch.float64)


def lamp_among_all(scores: Tensor, counted: Tensor) -> Tensor:
    """Divide each squared score of one parameter by the sum of those at least as large, on all ranks.

    As :func:`disparse_plugin.criteria.lamp_scores`, but for the order in which the sums are made.

    Args:
        scores: The alive scores here, 1-D.
        counted: bool: which of them count here.

    Returns:
        Values in [0, 1], same shape and type.

    Example:
        >>> lamp_among_all(torch.tensor([1.0, 3.0, 2.0]), torch.ones(3, dtype=torch.bool))
        tensor([0.0714, 1.0000, 0.3077])
    """
    result = torch.zeros_like(scores)
    some = scores != 0  # zeros have no share, and may be so many that they would all meet on one rank
    sizes = scores[some].abs()
    # Turns that are all alike keep equal scores together: they have the same sum.
    result[some] = in_order(sizes, torch.zeros_like(sizes, dtype=torch.int64), counted[some], _lamp).to(scores.dtype)
    return result


def renewed_among_all(shares: Tensor, alive: Tensor, counted: Tensor) -> Tensor:
    """Return shares of the entries alive now, as :func:`disparse_plugin.agreement.renewed_shares.renewed` does.

    Args:
        shares: Of the entries of one parameter here, 1-D.
        alive: bool: which of them are alive.
        counted: bool: which of them count here.

    Returns:
        Those of the entries alive, 1-D.

    Example:
        >>> every, alive = torch.ones(3, dtype=torch.bool), torch.tensor([True, False, True])
        >>> renewed_among_all(lamp_among_all(torch.tensor([1.0, 3.0, 2.0]), every), alive, every)
        tensor([0.2000, 1.0000])
    """
    kept, gone = shares[alive], shares[~alive]
    limit = max(gathered(float(gone.max()) if gone.numel() else 0.0))
    if not any(gathered(bool((kept <= limit).any()))) or not limit > 0:
        return kept
    some = shares != 0
    values = shares[some].double()
    squares = torch.zeros_like(shares, dtype=torch.float64)
    squares[some] = in_order(values, torch.zeros_like(values, dtype=torch.int64), counted[some], _squares)
    new = lamp_among_all(squares[alive].sqrt(), counted[alive])
    return torch.where(kept > limit, kept, new.to(kept.dtype))


def _squares(part: Sorted) -> Tensor:
    top = not sum(part.higher(part.values.numel()))
    growth = growths(part.values, part.counts, top=top)
    return part.values * (growth + sum(part.higher(float(growth[0]) if growth.numel() else 0.0))).exp()


def _lamp(part: Sorted) -> Tensor:
    values = part.values.double()
    largest = max([0.0, *part.of_all(float(values.max()) if values.numel() else 0.0)])
    squares = (values / largest).square() if values.numel() else values
    sums = (squares * part.counts).flip(0).cumsum(0).flip(0)
    above = sum(part.higher(float(sums[0]) if sums.numel() else 0.0))
    first = torch.searchsorted(part.values, part.values)  # equal scores share the sum that begins at the first of them
    return squares / (sums[first] + above) if values.numel() else values
