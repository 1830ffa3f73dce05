"""Score and prune in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.nn.utils import prune

from .. import arbiters, damped_shares
from .._support.all_or_nothing import all_or_nothing
from .._support.distributed import check_same, failing_together
from ..agreement import patterns
from ..agreement.budgets import Amount, Budget
from ..agreement.patterns import Pattern
from ..arbiters import Arbiter
from ..criteria import Criterion, ScoreFunction
from ..in_weight import attach_in_weights, masks_in_weights
from ..parameters import Exclude, ParameterKey, unwrap
from ..scoring.losses import Batch, TaskLosses
from ..scoring.score import score_tasks
from ..scoring.task_scores import TaskScores


def disparse_static(
    model: nn.Module,
    losses: TaskLosses,
    data: Iterable[Batch],
    amount: Amount | Budget | None = None,
    *,
    criterion: str | Criterion | ScoreFunction = "snip",
    arbiter: str | Arbiter = "unanimous",
    pattern: str | Pattern = "weights",
    min_keep: float = 0,
    parameters: Iterable[ParameterKey] | None = None,
    exclude: Exclude = (),
    num_batches: int | None = None,
    cycle: bool = False,
    progress: bool = False,
) -> TaskScores:
    """Prune a model at initialisation: score it, then as ``prune.global_unstructured`` with :class:`DiSparseStatic`.

    Args:
        model: The untrained model; pruned in place.
        losses: ``losses(model, batch)`` runs the model once and returns one scalar loss per task.
        data: Any iterable of batches.
        amount: A fraction of the weights still alive (float in [0, 1]) or a count (int), or one for each part:
            ``{"shared": 0.9, "depth": 0.5, ...}``, as in :meth:`TaskScores.masks`. Left out with an ``n:m`` pattern.
        criterion: How one task scores one weight, as in :func:`score_tasks`.
        arbiter: How the tasks agree, as in :meth:`TaskScores.importance`.
        pattern: ``"weights"``, any ``"n:m"`` such as ``"2:4"``, or ``"channels"`` (masked, not removed), as in
            :meth:`TaskScores.masks`.
        min_keep: How many weights stay in every tensor at least (int), or which fraction of it (float in (0, 1)), as
            in :meth:`TaskScores.masks`.
        parameters: ``(module, name)`` pairs; by default :func:`prunable_parameters`.
        exclude: What to leave out: modules, names or glob patterns, as in :func:`prunable_parameters`.
        num_batches: How many batches to score on; None for all of ``data``.
        cycle: Start again at the first batch when ``data`` ends before ``num_batches``.
        progress: Show a tqdm bar.

    Returns:
        The scores, for reports and analysis.

    Raises:
        TypeError: As :func:`score_tasks`. The model is unchanged.
        ValueError: As :func:`score_tasks` and :meth:`TaskScores.masks`. The model is unchanged.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> def build():
        ...     return nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
        >>> losses = lambda model, x: {"a": model(x)[:, 0].square().mean(), "b": model(x)[:, 1].square().mean()}
        >>> net, sparse = build(), build()
        >>> scores = disparse_static(net, losses, [torch.randn(8, 8)], amount=0.5)
        >>> sum(int(layer.weight_mask.sum()) for layer in net)
        20
        >>> scores = disparse_static(sparse, losses, [torch.randn(8, 8)], pattern="2:4")
        >>> sparse[1].weight_mask.sum(1)
        tensor([2., 2.])
    """
    rule, form = _checked(amount, arbiter, pattern, min_keep)
    scores = score_tasks(
        model,
        losses,
        data,
        criterion=criterion,
        parameters=parameters,
        exclude=exclude,
        num_batches=num_batches,
        cycle=cycle,
        progress=progress,
    )
    masks = scores.masks(amount, rule, min_keep=min_keep, pattern=form)
    if masks_in_weights(unwrap(model)):
        attach_in_weights(masks)
    else:
        _prune(masks)
    return scores


def disparse_pretrained(
    model: nn.Module,
    losses: TaskLosses,
    data: Iterable[Batch],
    amount: Amount | Budget | None = None,
    *,
    criterion: str | Criterion | ScoreFunction = damped_shares.CRITERION,
    arbiter: str | Arbiter | None = None,
    pattern: str | Pattern = "weights",
    min_keep: float = 0,
    parameters: Iterable[ParameterKey] | None = None,
    exclude: Exclude = (),
    num_batches: int | None = None,
    cycle: bool = False,
    progress: bool = False,
) -> TaskScores:
    """Prune a trained model: score it, then as ``prune.global_unstructured`` with :class:`DiSparsePretrained`.

    By default by *damped shares*: each task's saliency ``w^2 * sqrt(sum of abs(g))``, LAMP's share of it in its tensor,
    added up over the tasks; see :mod:`disparse_plugin.damped_shares` for the formula, the evidence and the limits. The
    paper's rule, ``criterion="taylor"``, prunes layers very unevenly, and at high sparsity whole ones away. Without
    labels, ``criterion="lamp", arbiter="sum"`` is hardly behind; with two like tasks torch's
    ``prune.global_unstructured(..., prune.L1Unstructured)`` will do.

    Args:
        model: The trained model; pruned in place.
        losses: ``losses(model, batch)`` runs the model once and returns one scalar loss per task.
        data: Any iterable of batches.
        amount: A fraction of the weights still alive (float in [0, 1]) or a count (int), or one for each part:
            ``{"shared": 0.9, "depth": 0.5, ...}``, as in :meth:`TaskScores.masks`. Left out with an ``n:m`` pattern.
        criterion: How one task scores one weight, as in :func:`score_tasks`; ``"taylor"`` is the paper's.
        arbiter: How the tasks agree, as in :meth:`TaskScores.importance`. None is ``"sum"`` with the default criterion,
            and with any other the paper's ``"unanimous"``.
        pattern: ``"weights"``, any ``"n:m"`` such as ``"2:4"``, or ``"channels"`` (masked, not removed), as in
            :meth:`TaskScores.masks`.
        min_keep: How many weights stay in every tensor at least (int), or which fraction of it (float in (0, 1)), as
            in :meth:`TaskScores.masks`.
        parameters: ``(module, name)`` pairs; by default :func:`prunable_parameters`.
        exclude: What to leave out: modules, names or glob patterns, as in :func:`prunable_parameters`.
        num_batches: How many batches to score on; None for all of ``data``.
        cycle: Start again at the first batch when ``data`` ends before ``num_batches``.
        progress: Show a tqdm bar.

    Returns:
        The scores, for reports and analysis.

    Raises:
        TypeError: As :func:`score_tasks`. The model is unchanged.
        ValueError: As :func:`score_tasks` and :meth:`TaskScores.masks`. The model is unchanged.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Linear(6, 2)
        >>> losses = lambda model, x: {"a": model(x)[:, 0].square().mean(), "b": model(x)[:, 1].square().mean()}
        >>> scores = disparse_pretrained(net, losses, [torch.randn(8, 6)], amount=0.5)
        >>> int(net.weight_mask.sum()), scores.criterion
        (6, 'layer_adaptive(damped(taylor, 0.25))')
    """
    with failing_together():
        rule = damped_shares.arbiter_for(criterion, arbiter)
    return disparse_static(  # the same cut; when it is made, and by which criterion, differs
        model,
        losses,
        data,
        amount,
        criterion=criterion,
        arbiter=rule,
        pattern=pattern,
        min_keep=min_keep,
        parameters=parameters,
        exclude=exclude,
        num_batches=num_batches,
        cycle=cycle,
        progress=progress,
    )


def _checked(
    amount: Amount | Budget | None, arbiter: str | Arbiter, pattern: str | Pattern, min_keep: float
) -> tuple[Arbiter, Pattern]:
    """Check what can be checked before scoring, on all ranks together."""
    with failing_together():
        rule, form = arbiters.resolve(arbiter), patterns.resolve(pattern)
        budget = Budget.of(amount, min_keep)
        form.check_budget(budget)
    plain = dict(budget.amount) if isinstance(budget.amount, Mapping) else budget.amount
    name = getattr(rule, "__name__", type(rule).__name__)
    options = {"amount": plain, "min_keep": budget.min_keep, "arbiter": name, "pattern": form.name}
    for argument, value in options.items():
        check_same(argument, value, "give all ranks the same arguments")
    return rule, form


def _prune(masks: Mapping[ParameterKey, Tensor]) -> None:
    """Attach the masks that ``prune.global_unstructured`` would make.

    Without its flat copies of all weights, nor its demand that they be contiguous, which channels_last weights are not.
    """
    with all_or_nothing(masks):
        for (module, name), mask in masks.items():
            prune.custom_from_mask(module, name, mask)
