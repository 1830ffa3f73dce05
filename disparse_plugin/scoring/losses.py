"""What a user's loss function is: one scalar loss per task and batch, checked; and many tasks made into one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

Batch: TypeAlias = Any
TaskLosses: TypeAlias = Callable[[nn.Module, Batch], Mapping[str, Tensor]]


def check_losses(losses: object, tasks: Sequence[str] | None, batch: int) -> dict[str, Tensor]:
    """Check what a user's loss function returned for one batch.

    Args:
        losses: The value returned.
        tasks: The task names seen in the first batch, or None in the first batch.
        batch: Number of the batch, for messages.

    Returns:
        The losses, in the order of ``tasks``.

    Raises:
        TypeError: If it is not a mapping from str to tensors.
        ValueError: If it is empty, a loss is not a real scalar, or the tasks differ from those of the first batch.
    """
    if not isinstance(losses, Mapping):
        raise TypeError(
            f"losses: must return a mapping from task name to scalar loss, found {type(losses).__name__} in batch "
            f"{batch}; return e.g. {{'segmentation': loss_a, 'depth': loss_b}}"
        )
    if not losses:
        raise ValueError(f"losses: must return at least one task, found an empty mapping in batch {batch}")
    for task, loss in losses.items():
        if not isinstance(task, str):
            raise TypeError(
                f"losses: task names must be str, found {task!r} of type {type(task).__name__} in batch {batch}"
            )
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"losses: the loss of task {task!r} must be a tensor, found {type(loss).__name__} in batch {batch}; do "
                "not call .item() on it"
            )
        if loss.numel() != 1 or loss.is_complex():
            raise ValueError(
                f"losses: the loss of task {task!r} must be one real number, found shape {tuple(loss.shape)} and "
                f"{loss.dtype} in batch {batch}; reduce it with .mean() or .sum()"
            )
    if tasks is not None and set(losses) != set(tasks):
        raise ValueError(
            f"losses: every batch must return the same tasks, found {sorted(losses)} in batch {batch} after "
            f"{sorted(tasks)} in batch 0; return a zero loss for a task without labels"
        )
    return {task: losses[task] for task in (losses if tasks is None else tasks)}


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
