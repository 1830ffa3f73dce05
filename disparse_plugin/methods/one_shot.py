"""Score and prune in one call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.utils import prune

from .. import arbiters
from ..agreement.budgets import Amount, check_budget
from ..arbiters import Arbiter
from ..scoring.losses import Batch, TaskLosses
from ..scoring.score import score_tasks
from ..scoring.task_scores import TaskScores


def disparse_static(
    model: nn.Module,
    losses: TaskLosses,
    data: Iterable[Batch],
    amount: Amount,
    *,
    arbiter: str | Arbiter = "unanimous",
    min_keep: float = 0,
    **options: Any,
) -> TaskScores:
    """Prune a model at initialisation: score it, then as ``prune.global_unstructured`` with :class:`DiSparseStatic`.

    Args:
        model: The untrained model; pruned in place.
        losses: ``losses(model, batch)`` runs the model once and returns one scalar loss per task.
        data: Any iterable of batches.
        amount: A fraction of the weights still alive (float in [0, 1]) or a count (int), or one for each part:
            ``{"shared": 0.9, "depth": 0.5, ...}``, as in :meth:`TaskScores.masks`.
        arbiter: As in :meth:`TaskScores.importance`.
        min_keep: How many weights stay in every tensor at least (int), or which fraction of it (float in (0, 1)), as
            in :meth:`TaskScores.masks`.
        **options: As in :func:`score_tasks`: ``criterion`` (default ``"snip"``), ``parameters``, ``num_batches``,
            ``cycle``, ``progress``.

    Returns:
        The scores, for reports and analysis.

    Raises:
        TypeError: As :func:`score_tasks`. The model is unchanged.
        ValueError: As :func:`score_tasks` and :meth:`TaskScores.masks`. The model is unchanged.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
        >>> losses = lambda model, x: {"a": model(x)[:, 0].square().mean(), "b": model(x)[:, 1].square().mean()}
        >>> scores = disparse_static(net, losses, [torch.randn(8, 6)], amount=0.5)
        >>> sum(int(layer.weight_mask.sum()) for layer in net)
        16
    """
    return _one_shot(model, losses, data, amount, arbiter, min_keep, options)


def disparse_pretrained(
    model: nn.Module,
    losses: TaskLosses,
    data: Iterable[Batch],
    amount: Amount,
    *,
    arbiter: str | Arbiter = "unanimous",
    min_keep: float = 0,
    **options: Any,
) -> TaskScores:
    """Prune a trained model: score it, then as ``prune.global_unstructured`` with :class:`DiSparsePretrained`.

    Args:
        model: The trained model; pruned in place.
        losses: ``losses(model, batch)`` runs the model once and returns one scalar loss per task.
        data: Any iterable of batches.
        amount: A fraction of the weights still alive (float in [0, 1]) or a count (int), or one for each part:
            ``{"shared": 0.9, "depth": 0.5, ...}``, as in :meth:`TaskScores.masks`.
        arbiter: As in :meth:`TaskScores.importance`.
        min_keep: How many weights stay in every tensor at least (int), or which fraction of it (float in (0, 1)), as
            in :meth:`TaskScores.masks`.
        **options: As in :func:`score_tasks`: ``criterion`` (default ``"taylor"``), ``parameters``, ``num_batches``,
            ``cycle``, ``progress``.

    Returns:
        The scores, for reports and analysis.

    Raises:
        TypeError: As :func:`score_tasks`. The model is unchanged.
        ValueError: As :func:`score_tasks` and :meth:`TaskScores.masks`. The model is unchanged.

    Example:
        >>> import torch
        >>> net = nn.Linear(6, 2)
        >>> losses = lambda model, x: {"a": model(x)[:, 0].square().mean(), "b": model(x)[:, 1].square().mean()}
        >>> disparse_pretrained(net, losses, [torch.randn(8, 6)], amount=0.5, criterion="fisher").criterion
        'fisher'
    """
    return _one_shot(model, losses, data, amount, arbiter, min_keep, {"criterion": "taylor", **options})


def _one_shot(
    model: nn.Module,
    losses: TaskLosses,
    data: Iterable[Batch],
    amount: Amount,
    arbiter: str | Arbiter,
    min_keep: float,
    options: dict[str, Any],
) -> TaskScores:
    check_budget(amount, min_keep)
    arbiters.resolve(arbiter)
    scores = score_tasks(model, losses, data, **options)
    # The masks that prune.global_unstructured would make, without its flat copies of all weights (nor its demand that
    # they be contiguous, which channels_last weights are not).
    for (module, name), mask in scores.masks(amount, arbiter, min_keep=min_keep).items():
        prune.custom_from_mask(module, name, mask)
    return scores
