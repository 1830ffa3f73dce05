"""What a user's loss function is: one scalar loss per task and batch, checked; and many tasks made into one."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from ..errors import did_you_mean, wrong

Batch: TypeAlias = Any
TaskLosses: TypeAlias = Callable[[nn.Module, Batch], Mapping[str, Tensor]]


def check_callable_losses(losses: object) -> None:
    """Check that the losses are a function, before anything is run or changed.

    Raises:
        TypeError: If not.
    """
    if not callable(losses) or isinstance(losses, nn.Module | type):
        raise TypeError(
            f"losses: must be a function of model and batch that returns one loss per task, found {_kind(losses)}"
        )


def _kind(value: object) -> str:
    return wrong(value) if isinstance(value, type) else type(value).__name__


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
            f"losses: must return a mapping from task name to scalar loss, found {_kind(losses)} in batch "
            f"{batch}; return e.g. {{'segmentation': loss_a, 'depth': loss_b}}{_of_a_detector(losses)}"
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
                f"losses: the loss of task {task!r} must be a tensor, found {type(loss).__name__} in batch {batch}; "
                f"{'do not call .item() on it' if isinstance(loss, float | int) else 'make it one number'}"
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


def _of_a_detector(found: object) -> str:
    """Say what to do about the predictions that torchvision's detectors return in eval mode in place of losses."""
    predictions = isinstance(found, Sequence) and bool(found) and all(isinstance(part, Mapping) for part in found)
    return "; these look like predictions: a detector returns losses after model.train() only" if predictions else ""


def joint(losses: TaskLosses, weights: Mapping[str, float] | None = None) -> TaskLosses:
    """Turn losses per task into the one task ``"joint"``, the weighted sum.

    With it the same code runs the single-task methods: ``DiSparseScheduler(model, optimizer, joint(losses), ...)`` is
    RigL, ``score_tasks(model, joint(losses), data)`` is SNIP.

    Args:
        losses: As in :func:`disparse_plugin.score_tasks`.
        weights: Weight of each task; 1 where it is not given.

    Returns:
        A function of the same kind, returning ``{"joint": sum}``. It raises ValueError where ``weights`` name a task
        that the losses do not return.

    Raises:
        TypeError: If ``losses`` is no function, or ``weights`` is no mapping from task to number.
        ValueError: If a weight is not finite.

    Example:
        >>> import torch
        >>> losses = lambda model, batch: {"a": model(batch).mean(), "b": model(batch).std()}
        >>> list(joint(losses, {"b": 0.1})(nn.Linear(2, 2), torch.randn(3, 2)))
        ['joint']
    """
    check_callable_losses(losses)
    factors = _checked_weights(weights)

    def summed(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        by_task = check_losses(losses(model, batch), None, 0)
        for task in factors:
            if task not in by_task:
                raise ValueError(
                    f"weights: must be of tasks that losses return, found {task!r} with {', '.join(by_task)}"
                    f"{did_you_mean(task, by_task)}; a batch without labels for a task returns a zero loss for it"
                )
        parts = [factors.get(task, 1.0) * loss for task, loss in by_task.items()]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return {"joint": total}

    return summed


def _checked_weights(weights: object) -> dict[str, float]:
    if weights is None:
        return {}
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights: must be a mapping from task to number, found {type(weights).__name__}")
    for task, weight in weights.items():
        if not isinstance(weight, numbers.Real | Tensor) or isinstance(weight, bool):
            raise TypeError(f"weights: the weight of task {task!r} must be a number, found {type(weight).__name__}")
        if not math.isfinite(weight):
            raise ValueError(f"weights: the weight of task {task!r} must be finite, found {weight}")
    return dict(weights)
