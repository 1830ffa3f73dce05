"""n of every m weights in training: the first masks, the exchange inside blocks, and the way from dense to n:m.

A block is m weights that follow each other along the input dimension, as in :mod:`disparse_plugin.agreement.patterns`.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..agreement.amounts import count_to_prune
from ..agreement.budgets import Budget
from ..agreement.candidates import Candidates
from ..agreement.patterns import NofM, Place, best_in_blocks, spread
from ..agreement.percentiles import agreement
from ..agreement.ranking import distinct
from ..agreement.tallies import count_true
from ..agreement.ways import lowest_of
from ..arbiters import Arbiter
from .exchange import Exchange, smallest


@dataclasses.dataclass(frozen=True)
class OnTheWay(NofM):
    """On the way to n:m: of the weights that n:m would remove, so many with the lowest agreement scores go.

    So every total is exact, no block ever has fewer than n, and when all have gone every block has n.
    """

    def removed(
        self, candidates: Candidates, tasks: Sequence[str], arbiter: Arbiter, budget: Budget, places: Sequence[Place]
    ) -> list[Tensor]:
        """Mark the lowest of what is not among the n highest of its block; all of it, if the amount is more."""
        free, left = [], 0
        for index, (values, place) in enumerate(zip(agreement(candidates, tasks, arbiter), places, strict=True)):
            magnitudes = candidates.magnitudes_of([index])
            parted = distinct(values, None if magnitudes is None else magnitudes[0])
            stay = self.units(best_in_blocks(spread(parted, place, fill=-torch.inf), self.n, self.m), place)
            free.append(values.masked_fill(stay, torch.inf))
            left += stay.numel() - count_true(stay)
        amount = budget.required_amount()
        assert not isinstance(amount, Mapping)
        return lowest_of(free, min(count_to_prune(amount, sum(candidates.sizes)), left), candidates.magnitudes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockExchange(Exchange):
    """The rule by which one layer exchanges weights such that every block keeps as many as it has.

    In a layer of b blocks, ``k = min(round(f * n * b), min(n, m - n) * b)`` alive weights are dropped: the smallest,
    but of no block more than ``min(n, m - n)``. A block grows as many as it dropped: of its masked weights those that
    the tasks want most, by the same percentiles among all masked weights of the layer as without blocks.

    Attributes:
        n: How many of each block are alive.
        m: Size of a block.
    """

    n: int
    m: int

    _goes_by_layers = False

    def count(self, kept: int, size: int) -> int:
        """Return how many weights a layer exchanges."""
        return min(round(self.fraction * kept), min(self.n, self.m - self.n) * (size // self.m))

    def _dropped(self, weight: Tensor, alive: Tensor, count: int) -> Tensor:
        magnitudes = weight.detach().abs().double().masked_fill(~alive, torch.inf)
        most = min(self.n, self.m - self.n)
        # The highest of the negated are the lowest; of equal ones the last, so the order is turned round as well.
        lowest = best_in_blocks(-magnitudes.flip(self._dim(alive)), most, self.m).flip(self._dim(alive))
        return smallest(weight, lowest & alive, count)

    def _grown(self, rows: Mapping[str, Tensor], candidates: Tensor, dropped: Tensor, count: int) -> Tensor:  # noqa: ARG002
        place = Place("", candidates.shape, candidates)
        listed = Candidates([{task: row[candidates] for task, row in rows.items()}])
        values = agreement(listed, self._present(rows), self.arbiter)[0]
        wanted = spread(distinct(values), place, fill=-torch.inf)
        dim = self._dim(candidates)
        blocks = wanted.movedim(dim, -1).unflatten(-1, (-1, self.m))
        ranks = blocks.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
        vacant = dropped.movedim(dim, -1).unflatten(-1, (-1, self.m)).sum(-1, keepdim=True)
        grown: Tensor = (ranks >= self.m - vacant).flatten(-2).movedim(-1, dim)
        return grown

    @staticmethod
    def _dim(tensor: Tensor) -> int:
        return min(1, tensor.dim() - 1)


def check_amount_of(pattern: NofM, amount: object, total: int) -> None:
    """Check that an amount is left out, or is what the pattern makes of ``total`` weights.

    Raises:
        ValueError: If not.

    Example:
        >>> check_amount_of(NofM(2, 4), 0.9, 1000)
        Traceback (most recent call last):
        ValueError: amount: must be left out with pattern='2:4' or be 0.5, found 0.9
    """
    fraction = 1 - pattern.n / pattern.m
    fits = amount is None or (isinstance(amount, numbers.Real) and not isinstance(amount, bool))
    if fits and amount is not None:
        fits = count_to_prune(amount, total) == round(fraction * total)  # type: ignore[arg-type]
    if not fits:
        raise pattern.wrong_amount(amount)


def random_blocks(shape: torch.Size, n: int, m: int, generator: torch.Generator) -> Tensor:
    """Draw a mask with n True in every block of m, uniformly; bool, on the CPU.

    Example:
        >>> random_blocks(torch.Size([4, 8]), 2, 4, torch.Generator().manual_seed(0)).view(8, 4).sum(1).tolist()
        [2, 2, 2, 2, 2, 2, 2, 2]
    """
    return best_in_blocks(torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu"), n, m)


def blocks_with_other_counts(mask: Tensor, n: int, m: int) -> int:
    """Return how many blocks do not have exactly n alive.

    Example:
        >>> blocks_with_other_counts(torch.tensor([[True, True, False, False, True, False, False, False]]), 2, 4)
        1
    """
    return count_true(_alive_in_blocks(mask, m) != n)


def above(mask: Tensor, n: int, m: int) -> int:
    """Return how many weights are alive above n, over all blocks.

    Example:
        >>> above(torch.tensor([[True, True, True, True, True, False, False, False]]), 2, 4)
        2
    """
    return int((_alive_in_blocks(mask, m) - n).clamp_min(0).sum())


def _alive_in_blocks(mask: Tensor, m: int) -> Tensor:
    counts: Tensor = mask.movedim(min(1, mask.dim() - 1), -1).unflatten(-1, (-1, m)).sum(-1)
    return counts
