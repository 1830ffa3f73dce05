"""One task in place of many: the sum of the losses, as methods for a single task see a network."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from .gradients import Batch, TaskLosses, check_losses


def joint(losses: TaskLosses, weights: Mapping[str, float] | None = None) -> TaskLosses:
    """Turn losses per task into the one task ``"joint"``, the weighted sum.

    With it the same code runs the single-task methods: ``DiSparseScheduler(model, optimizer, joint(losses), ...)`` is
    RigL, ``score_tasks(model, joint(losses), data)`` is SNIP.

    Args:
        losses: As in :func:`disparse_plugin.score_tasks`.
        weights: Weight of each task; 1 where it is not given.

    Returns:
        A function of the same kind, returning ``{"joint": sum}``.

    Example:
        >>> import torch
        >>> losses = lambda model, batch: {"a": model(batch).mean(), "b": model(batch).std()}
        >>> list(joint(losses, {"b": 0.1})(nn.Linear(2, 2), torch.randn(3, 2)))
        ['joint']
    """
    factors = dict(weights or {})

    def summed(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        parts = [factors.get(task, 1.0) * loss for task, loss in check_losses(losses(model, batch), None, 0).items()]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return {"joint": total}

    return summed
