"""What is asked of scores that are spread over ranks: answers lie beside the weights, and all ranks ask together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .._support.distributed import check_same_copies, failing_together, this_rank
from .._support.shards import beside, block, local, owns, places
from ..agreement import shared_out
from ..agreement.budgets import Budget, warn_of_percentages
from ..agreement.consequences import tell_of_empty_tensors, tell_of_ties_at_zero
from ..agreement.patterns import Pattern, Place, Weights, spread
from ..agreement.shared_out import SharedOut
from ..arbiters import Arbiter
from ..parameters import ParameterKey, alive_mask, stored


class SharedOutScores:
    """The scores of a model of which each rank has its share, ready to be cut."""

    def __init__(
        self,
        keys: Sequence[ParameterKey],
        names: Sequence[str],
        rows: Sequence[Mapping[str, Tensor]],
        tasks: Sequence[str],
        *,
        shares: bool,
    ) -> None:
        """Take what there is.

        Args:
            keys: The ``(module, name)`` pairs.
            names: Their qualified names.
            rows: For each, the scores of the tasks that reach it, spread as the weight is.
            tasks: All task names.
            shares: Whether the scores are shares of their parameter already.
        """
        self._parameters = [stored(*key) for key in keys]
        alive = [alive_mask(*key) for key in keys]
        self._places = [
            Place(name, local(parameter).shape, None if mask is None else local(mask))
            for name, parameter, mask in zip(names, self._parameters, alive, strict=True)
        ]
        self._tasks = tasks
        self._candidates = self._alive_here(rows, shares)

    def _alive_here(self, rows: Sequence[Mapping[str, Tensor]], shares: bool) -> SharedOut:
        unit, first, where = Weights(), 0, []
        for parameter, place in zip(self._parameters, self._places, strict=True):
            where.append(first + unit.units(places(parameter), place))
            first += parameter.numel()
        owned = [owns(weight, this_rank()) for weight in self._parameters]
        scores = [
            {task: _alive_scores(local(score), place, shares=shares, owned=own) for task, score in row.items()}
            for row, place, own in zip(rows, self._places, owned, strict=True)
        ]
        weights = [
            unit.units(local(parameter.detach()), place)
            for parameter, place in zip(self._parameters, self._places, strict=True)
        ]
        return SharedOut(scores, weights, shares, where, owned)

    def masks(self, amount: object, arbiter: Arbiter, budget: Budget, pattern: Pattern) -> list[Tensor]:
        """Return the keep masks, each spread as its weight is.

        Args:
            amount: What the user passed, of which ``budget`` was made.
            arbiter: The reduction over tasks.
            budget: How much goes.
            pattern: Single weights.

        Raises:
            ValueError: If the pattern is another, or the budget cannot be met.
        """
        if type(pattern) is not Weights:
            raise ValueError(
                f"pattern: must be 'weights' where weights are sharded, found {pattern.name!r}; prune to it before "
                "fully_shard: save_masks and fold the model before, load_masks after it"
            )
        candidates = self._candidates
        warn_of_percentages(amount, candidates)
        with failing_together():
            floors = self.floors(budget)
            quotas = budget.quotas(candidates, self._tasks, floors)
        gone = shared_out.lowest_in_budget(candidates, self._tasks, arbiter, quotas, floors)
        self._warn(gone)
        masks = [spread(~mark, place) for mark, place in zip(gone, self._places, strict=True)]
        parts = {
            (place.name, *block(weight)): mask
            for place, weight, mask in zip(self._places, self._parameters, masks, strict=True)
        }
        check_same_copies("masks", parts, "give ranks that hold copies of weights the same gradients of them")
        return self._beside(masks)

    def importance(self, arbiter: Arbiter, budget: Budget) -> list[Tensor]:
        """Return the agreement scores, no two equal, each spread as its weight is.

        Args:
            arbiter: The reduction over tasks.
            budget: How much of every parameter is protected.
        """
        values = shared_out.agreement(self._candidates, self._tasks, arbiter)
        lifted = shared_out.lift(self._candidates, values, self.floors(budget))
        parted = shared_out.distinct(self._candidates, lifted)
        return self._beside([spread(part, place) for part, place in zip(parted, self._places, strict=True)])

    def floors(self, budget: Budget) -> list[int]:
        """Return how many units of each parameter stay at least, on all ranks together."""
        return [
            budget.kept_of(parameter.numel(), alive)
            for parameter, alive in zip(self._parameters, self._candidates.sizes, strict=True)
        ]

    def _beside(self, values: Sequence[Tensor]) -> list[Tensor]:
        return [beside(value, parameter) for value, parameter in zip(values, self._parameters, strict=True)]

    def _warn(self, gone: Sequence[Tensor]) -> None:
        candidates = self._candidates
        zero = [torch.stack([row == 0 for row in rows.values()]).all(0) for rows in candidates.scores]
        total = sum(candidates.counts(zero))
        going = sum(candidates.counts([mark & mask for mark, mask in zip(gone, zero, strict=True)]))
        tell_of_ties_at_zero(total, going, sum(candidates.sizes))
        names = [place.name for place in self._places]
        tell_of_empty_tensors(names, candidates.scores, candidates.counts(gone), candidates.sizes)


def _alive_scores(scores: Tensor, place: Place, *, shares: bool, owned: bool) -> Tensor:
    """Take the scores of what is alive here; shares are those among what is alive on all ranks."""
    if not shares or place.alive is None:
        return Weights().units(scores, place)
    flat = scores.reshape(-1)
    return shared_out.renewed_among_all(flat, place.alive.reshape(-1), torch.full_like(flat, owned, dtype=torch.bool))
