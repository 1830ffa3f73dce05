"""Drop and grow inside one layer: the smallest alive weights go, those that a task strongly asks for come."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .._support.shards import part_here
from ..agreement.candidates import Candidates
from ..agreement.ranking import absolute, highest, lowest, ranks
from ..agreement.tallies import counts_true
from ..agreement.ways import lowest_by_agreement
from ..arbiters import Arbiter, ignores_absent_tasks, unanimous
from ..sorting import positions
from .at_once import Layer, new_masks_at_once


@dataclasses.dataclass(frozen=True)
class Exchange:
    """The rule by which one layer exchanges weights.

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

    _goes_by_layers: ClassVar[bool] = True  # not by smaller blocks

    def new_masks(
        self,
        weights: Sequence[Tensor],
        alive: Sequence[Tensor],
        scores: Sequence[Mapping[str, Tensor]],
        kept: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Choose the new masks of some layers; what has to be read back of an accelerator is read for all at once.

        Args:
            weights: Each layer's weight; masked entries may hold anything.
            alive: bool, of the same shapes.
            scores: For each layer, the scores of each task that reaches it, of the same shape. A task whose scores of
                all candidates are zero asks for nothing and is left out.
            kept: How many are alive in each layer, where that is known.

        Returns:
            bool, of the same shapes, with as many True as ``alive``. Equal to ``alive`` where no task asks for
            anything.

        Example:
            >>> rule = Exchange(0.5, unanimous, ["a"])
            >>> weight, alive = torch.tensor([1.0, 3.0, 0.0, 0.0]), torch.tensor([True, True, False, False])
            >>> [mask.tolist() for mask in rule.new_masks([weight], [alive], [{"a": torch.arange(4.0)}])]
            [[False, True, False, True]]
        """
        kept = counts_true(alive) if kept is None else kept
        counts = [self.count(number, mask.numel()) for number, mask in zip(kept, alive, strict=True)]
        facts = zip(weights, alive, scores, kept, counts, strict=True)
        layers = [Layer(*of_layer) for of_layer in facts if of_layer[-1]]
        if self.arbiter is unanimous and self._goes_by_layers and all(layer.fits for layer in layers):
            changed = iter(new_masks_at_once(layers, regrow_dropped=self.regrow_dropped))
            return [next(changed) if count else mask.clone() for mask, count in zip(alive, counts, strict=True)]
        dropped = [
            self._dropped(weight, mask, count) if count else None
            for weight, mask, count in zip(weights, alive, counts, strict=True)
        ]
        candidates = [
            ~mask if gone is None or not self.regrow_dropped else ~mask | gone
            for mask, gone in zip(alive, dropped, strict=True)
        ]
        asking = _asking(scores, candidates, counts)
        return [
            mask.clone() if gone is None or not rows else (mask & ~gone) | self._grown(rows, free, gone, count)
            for mask, gone, free, rows, count in zip(alive, dropped, candidates, asking, counts, strict=True)
        ]

    def count(self, kept: int, size: int) -> int:
        """Return how many weights a layer exchanges: a share of the alive, at most as many as are masked.

        So a dense layer exchanges nothing, and no layer gets denser or sparser.

        Args:
            kept: How many of the layer's weights are alive.
            size: How many it has.

        Example:
            >>> Exchange(0.5, unanimous, ["a"]).count(3, 4)
            1
        """
        return min(round(self.fraction * kept), size - kept)

    def _dropped(self, weight: Tensor, alive: Tensor, count: int) -> Tensor:
        return smallest(weight, alive, count)

    def _grown(self, rows: Mapping[str, Tensor], candidates: Tensor, dropped: Tensor, count: int) -> Tensor:  # noqa: ARG002
        """Mark as many of the candidates as were dropped."""
        if self.arbiter is unanimous:
            return wanted_by_any({task: row.masked_fill(~candidates, -torch.inf) for task, row in rows.items()}, count)
        grown = torch.zeros_like(candidates)
        chosen = most_wanted(
            {task: row[candidates] for task, row in rows.items()}, self._present(rows), self.arbiter, count
        )
        grown[candidates] = chosen
        return grown

    def _present(self, rows: Mapping[str, Tensor]) -> Sequence[str]:
        """Return the tasks that the arbiter sees: one of the user's own sees all, NaN where one is absent."""
        return [task for task in self.tasks if task in rows] if ignores_absent_tasks(self.arbiter) else self.tasks


def _asking(
    scores: Sequence[Mapping[str, Tensor]], candidates: Sequence[Tensor], counts: Sequence[int]
) -> list[dict[str, Tensor]]:
    """Leave out the tasks that score zero for all candidates of a layer, and layers that exchange nothing."""
    pairs = [(index, task) for index, rows in enumerate(scores) if counts[index] for task in rows]
    wishes = counts_true([((scores[index][task] != 0) & candidates[index]).any() for index, task in pairs])
    found: list[dict[str, Tensor]] = [{} for _ in scores]
    for (index, task), wish in zip(pairs, wishes, strict=True):
        if wish:
            found[index][task] = scores[index][task]
    return found


def smallest(weight: Tensor, alive: Tensor, count: int) -> Tensor:
    """Mark the alive weights of the smallest magnitude; of equal ones the first in row-major order.

    Args:
        weight: Any shape.
        alive: bool, same shape.
        count: How many.

    Returns:
        bool, same shape, ``count`` True.

    Example:
        >>> smallest(torch.tensor([0.1, -3.0, 0.2, 2.0]), torch.tensor([False, True, True, True]), 2).tolist()
        [False, False, True, True]
    """
    if weight.device.type != "cpu":  # to gather would let the host wait
        magnitudes = absolute(weight.detach()).masked_fill(~alive, torch.inf)
        return lowest(magnitudes.reshape(-1), count).view(alive.shape)
    marked = torch.zeros_like(alive)
    marked[alive] = lowest(absolute(weight.detach()[alive]), count)
    return marked


def most_wanted(scores: Mapping[str, Tensor], tasks: Sequence[str], arbiter: Arbiter, count: int) -> Tensor:
    """Mark the entries with the highest agreement scores.

    Each task's scores become percentiles among the entries given; the arbiter joins them. With ``unanimous`` (the
    largest percentile) this is the union of the tasks' own top sets at one common ratio, as in DiSparse's growth, but
    the ratio is such that the union has exactly ``count`` entries.

    Args:
        scores: The entries' scores by task, 1-D; tasks that do not reach them are left out.
        tasks: The tasks that the arbiter sees.
        arbiter: The reduction over tasks.
        count: How many.

    Returns:
        bool, 1-D, ``count`` True.

    Example:
        >>> from disparse_plugin.arbiters import unanimous
        >>> a, b = torch.tensor([9.0, 1.0, 2.0, 3.0]), torch.tensor([0.1, 0.9, 0.3, 0.2])
        >>> most_wanted({"a": a, "b": b}, ["a", "b"], unanimous, 2).tolist()
        [True, True, False, False]
    """
    size = next(iter(scores.values())).numel()
    return ~lowest_by_agreement(Candidates([scores]), tasks, arbiter, size - count)[0]


def wanted_by_any(scores: Mapping[str, Tensor], count: int) -> Tensor:
    """Mark what :func:`most_wanted` marks with the arbiter ``unanimous``, without ranking all entries.

    A marked entry is among the ``count`` highest of some task, because those of one task alone would be enough. So each
    task's highest ``count`` are ranked among themselves, and all others stay behind.

    Args:
        scores: The entries' scores by task, any shape; -inf where an entry must not be marked.
        count: How many.

    Returns:
        bool, of the same shape, ``count`` True.

    Example:
        >>> a, b = torch.tensor([9.0, 1.0, 2.0, 3.0]), torch.tensor([0.1, 0.9, 0.3, 0.2])
        >>> wanted_by_any({"a": a, "b": b}, 2).tolist()
        [True, True, False, False]
    """
    like = next(iter(scores.values()))
    best = torch.zeros(like.numel(), dtype=torch.float64, device=like.device)
    for score in scores.values():
        flat = score.reshape(-1)
        top = highest(flat, count)
        best[top] = torch.maximum(best[top], ranks(flat[top]).double() + 1)
    marked = torch.zeros(like.numel(), dtype=torch.bool, device=like.device)
    wanted = positions(best != 0)
    marked[wanted[highest(best[wanted], count)]] = True
    return marked.reshape(like.shape)


def random_scores(layers: Sequence[Tensor], generator: torch.Generator) -> list[dict[str, Tensor]]:
    """Draw a score for every entry, as the growth of SET (Mocanu et al., 2018); the same on any device.

    Args:
        layers: One tensor for every layer, for its shape and device; of a sharded one, the scores here are returned.
        generator: A CPU generator.

    Returns:
        One task, ``"random"``, for each layer; values in (0, 1].
    """

    def drawn(layer: Tensor) -> Tensor:
        values = 1 - torch.rand(layer.shape, generator=generator, dtype=torch.float32, device="cpu")
        return part_here(values, layer).to(layer.device)

    return [{"random": drawn(layer)} for layer in layers]


def random_mask(like: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw a mask with ``count`` True, uniformly; bool, of the shape and on the device of ``like``.

    Of a sharded tensor it is what of the mask lies on this rank.

    Example:
        >>> int(random_mask(torch.zeros(4, 5), 7, torch.Generator().manual_seed(0)).sum())
        7
    """
    order = torch.randperm(like.numel(), generator=generator, device="cpu")
    mask = torch.zeros(like.numel(), dtype=torch.bool, device="cpu")
    mask[order[:count]] = True
    return part_here(mask.reshape(like.shape), like).to(like.device)
