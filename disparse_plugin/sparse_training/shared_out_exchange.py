"""Drop and grow inside a layer that is spread over ranks: the same choice as in one place, each rank of its share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .._support.distributed import added_counts, this_rank
from ..agreement.ranking import count_true
from ..agreement.select import lowest
from ..agreement.shared_out import SharedOut, agreement
from ..arbiters import Arbiter, ignores_absent_tasks
from ..shards import local, owns, places


@dataclasses.dataclass(frozen=True)
class SharedOutExchange:
    """The rule of :class:`.Exchange`, for a layer of which each rank has its share. All ranks must call it alike.

    Attributes:
        fraction: Share of the alive weights that is dropped.
        arbiter: How the tasks' percentiles become one wish.
        tasks: All tasks; the order of the axis that a custom arbiter sees.
        regrow_dropped: Whether a weight may be grown in the update that drops it.
    """

    fraction: float
    arbiter: Arbiter
    tasks: Sequence[str]
    regrow_dropped: bool = False

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
        kept = _total(flat, owned)
        count = min(round(self.fraction * kept), parameter.numel() - kept)
        if count == 0:
            return alive.clone()
        dropped = torch.zeros_like(flat)
        magnitudes = local(parameter).reshape(-1).abs()[flat]
        exact = magnitudes if magnitudes.dtype == torch.float64 else magnitudes.float()
        dropped[flat] = lowest(exact, count, where[flat], torch.full_like(flat[flat], owned), added_counts)
        candidates = ~flat | dropped if self.regrow_dropped else ~flat
        rows = {task: score.reshape(-1)[candidates] for task, score in scores.items()}
        asking = [owned * count_true(row != 0) for row in rows.values()]
        sums = added_counts(torch.tensor(asking, dtype=torch.int64, device="cpu")).tolist()
        rows = {task: row for (task, row), some in zip(rows.items(), sums, strict=True) if some}
        if not rows:
            return alive.clone()
        grown = torch.zeros_like(flat)
        grown[candidates] = self._grown(rows, where[candidates], owned, count)
        return ((flat & ~dropped) | grown).reshape(alive.shape)

    def _grown(self, rows: Mapping[str, Tensor], where: Tensor, owned: bool, count: int) -> Tensor:
        shared = SharedOut([rows], None, False, [where], [owned])
        present = [task for task in self.tasks if task in rows] if ignores_absent_tasks(self.arbiter) else self.tasks
        values = agreement(shared, present, self.arbiter)[0]
        return ~shared.lowest({0: values}, shared.sizes[0] - count)[0]


def _total(mask: Tensor, owned: bool) -> int:
    return int(added_counts(torch.tensor([owned * count_true(mask)], dtype=torch.int64, device="cpu")))
