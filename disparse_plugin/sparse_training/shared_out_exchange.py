"""Drop and grow inside a layer that is spread over ranks: the same choice as in one place, each rank of its share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .._support.distributed import added_counts, this_rank, total_counts
from .._support.shards import local, owns, places
from ..agreement.ranking import absolute
from ..agreement.select import lowest
from ..agreement.shared_out import SharedOut, agreement
from ..agreement.tallies import count_true
from .exchange import Exchange


class SharedOutExchange(Exchange):
    """The rule for a layer of which each rank has its share. All ranks must call it alike."""

    def new_mask(self, parameter: Tensor, alive: Tensor, scores: Mapping[str, Tensor]) -> Tensor:
        """Choose the layer's new mask.

        Args:
            parameter: The layer's weight, spread.
            alive: bool; what of the mask lies here.
            scores: For each task that reaches the layer, what of its scores lies here.

        Returns:
            bool, what of the new mask lies here; on all ranks together as many True as before.
        """
        owned, where, flat = owns(parameter, this_rank()), places(parameter), alive.reshape(-1)
        (kept,) = total_counts([owned * count_true(flat)])
        count = self.count(kept, parameter.numel())
        if count == 0:
            return alive.clone()
        dropped = torch.zeros_like(flat)
        magnitudes = absolute(local(parameter).reshape(-1)[flat])
        dropped[flat] = lowest(magnitudes, count, where[flat], torch.full_like(flat[flat], owned), added_counts)
        candidates = ~flat | dropped if self.regrow_dropped else ~flat
        rows = {task: score.reshape(-1)[candidates] for task, score in scores.items()}
        asking = total_counts([owned * count_true(row != 0) for row in rows.values()])
        rows = {task: row for (task, row), some in zip(rows.items(), asking, strict=True) if some}
        if not rows:
            return alive.clone()
        grown = torch.zeros_like(flat)
        grown[candidates] = self._grown_here(rows, where[candidates], owned, count)
        return ((flat & ~dropped) | grown).reshape(alive.shape)

    def _grown_here(self, rows: Mapping[str, Tensor], where: Tensor, owned: bool, count: int) -> Tensor:
        shared = SharedOut([rows], None, False, [where], [owned])
        values = agreement(shared, self._present(rows), self.arbiter)[0]
        return ~shared.lowest({0: values}, shared.sizes[0] - count)[0]
