"""Score every weight once per task: one forward and one backward per task on each batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .._support.distributed import check_same, check_same_values, failing_together
from .._support.shards import is_sharded, reshard
from ..criteria import Criterion, ScoreFunction, resolve
from ..in_weight import masks_in_weights
from ..maskable import Selection, select, warn_of_kept_aside
from ..parameters import Exclude, ParameterKey, stored, unwrap
from .batches import Data
from .losses import Batch, TaskLosses, check_callable_losses
from .sharded_sums import sums_for
from .shards import any_sharded
from .storage import BESIDE, Device, Storage, TasksInTurn
from .sums import GradientObserver, ScoreSums
from .task_scores import TaskScores


def score_tasks(
    model: nn.Module,
    losses: TaskLosses,
    data: Iterable[Batch],
    *,
    criterion: str | Criterion | ScoreFunction = "snip",
    parameters: Iterable[ParameterKey] | None = None,
    exclude: Exclude = (),
    num_batches: int | None = None,
    cycle: bool = False,
    progress: bool = False,
    observe: GradientObserver | None = None,
    dtype: torch.dtype | None = None,
    device: Device | None = None,
    tasks_at_once: int | None = None,
) -> TaskScores:
    """Score every weight once per task; the model is left exactly as it was found.

    For task k and batches b the score is ``s_k = sum over b of criterion(w, dL_k(b)/dw)``, with ``w`` the effective
    weight (Sun et al., CVPR 2022, section 3). Which task uses which weight is read off the autograd graph, never off
    names.

    The forward runs in the model's present mode: call ``model.eval()`` first to score without dropout and with the
    stored BatchNorm statistics. Wrappers of ``DistributedDataParallel`` and ``torch.compile`` are looked through.

    Under ``torch.distributed`` all ranks must call this, each with its own part of the data; the scores of all batches
    of all ranks are added up, so that every rank returns the same scores.

    Weights that are sharded (``fully_shard``, tensor parallel) have scores beside them, DTensors of their layout. There
    the gradient of a batch is the mean over all ranks before the absolute value is taken: one batch of the score is the
    batches of all ranks together, and all ranks must have as many, with the same tasks.

    Args:
        model: The model; on any device.
        losses: ``losses(model, batch)`` runs the model once and returns one scalar loss per task. The scale of a loss
            changes nothing.
        data: Any iterable of batches; they are passed to ``losses`` as they are.
        criterion: A name, a :class:`~disparse_plugin.criteria.Criterion` or a callable ``(weight, grad) -> score``; see
            :mod:`disparse_plugin.criteria`.
        parameters: ``(module, name)`` pairs to score; by default those of
            :func:`~disparse_plugin.prunable_parameters` that can be masked.
        exclude: What to leave out: modules, names or glob patterns, as in
            :func:`~disparse_plugin.prunable_parameters`. It is neither scored nor pruned nor counted.
        num_batches: How many batches to use; None for all of ``data``.
        cycle: Start again at the first batch when ``data`` ends before ``num_batches``.
        progress: Show a tqdm bar.
        observe: Shown every batch's gradients before they are scored and freed, e.g. a
            :class:`~disparse_plugin.analysis.GradientConflict`.
        dtype: What the scores are kept in: ``torch.bfloat16`` takes half the memory of float32. They are added up in
            float32 and rounded once, when complete: each is off by at most 2^-9 of itself. Masks are exact for the
            rounded scores: of scores that round to one number the smaller ``abs(w)`` goes first, so only weights whose
            scores are that close may change places. None keeps the type of the sums.
        device: Where the scores are kept, e.g. ``"cpu"``: moved there once, when complete, and cut there. Masks and
            agreement scores come back to the weights. From an accelerator they go into pinned memory, which the system
            cannot swap out while they live, and are waited for once, at the end. None leaves them beside their weights.
        tasks_at_once: How many tasks are scored in one go over the data, so that float32 sums of no more are held; None
            for all. ``data`` is read once for each go, with a forward for each batch, and must give the same batches
            each time: a list, or a loader that does not shuffle. For very many tasks, with ``dtype`` or ``device``.

    Returns:
        The scores, float32 (float64 for float64 weights) or of ``dtype``, on the devices of the weights or ``device``.

    Raises:
        TypeError: If ``losses`` does not return a mapping from str to tensors, or an argument has the wrong type.
        ValueError: If ``data`` is empty or too short, a loss is not one finite number, tasks differ between batches, a
            task reaches no parameter, a score is not finite, or a listed parameter cannot be masked (tied, lazy,
            parametrized, not of this model, read by its parent, not what its layer multiplies with); the message has
            the ``exclude`` to paste. If layers run where autograd does not see them (re-entrant checkpointing). On all
            ranks, if they have different numbers of batches, other criteria or parameters, or weights that differ.
        RuntimeError: If another rank of ``torch.distributed`` has failed.

    Warns:
        UserWarning: If some parameters are reached by no task; they are listed in ``TaskScores.unreached``. With
            ``parameters=None``, if some cannot be masked; they are listed in ``TaskScores.skipped``.
        TiesWarning: If more than nine tenths of a task's scores are exactly zero.

    Example:
        >>> import torch
        >>> class TwoHeads(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.trunk, self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(8, 1)
        ...     def forward(self, x):
        ...         h = self.trunk(x).relu()
        ...         return self.a(h), self.b(h)
        >>> def losses(model, batch):
        ...     a, b = model(batch)
        ...     return {"a": a.logsumexp(1).mean(), "b": b.square().mean()}
        >>> net = TwoHeads()
        >>> scores = score_tasks(net, losses, [torch.randn(4, 8) for _ in range(3)])
        >>> scores.names, scores.tasks_reaching(net.a, "weight")
        (('trunk.weight', 'a.weight', 'b.weight'), ('a',))
    """
    source, storage = Data(data, num_batches, cycle, progress), Storage(dtype, device, tasks_at_once)
    return _score(model, losses, source, criterion, parameters, exclude, observe=observe, storage=storage)


def score_for_removal(
    model: nn.Module,
    losses: TaskLosses,
    data: Iterable[Batch],
    *,
    criterion: str | Criterion | ScoreFunction,
    parameters: Iterable[ParameterKey],
    num_batches: int | None = None,
) -> TaskScores:
    """Score as :func:`score_tasks` does weights that are removed and not masked: how their layers use them is free.

    Args:
        model: As :func:`score_tasks`.
        losses: As :func:`score_tasks`.
        data: As :func:`score_tasks`.
        criterion: As :func:`score_tasks`.
        parameters: ``(module, name)`` pairs.
        num_batches: As :func:`score_tasks`.

    Returns:
        The scores.

    Raises:
        TypeError: As :func:`score_tasks`.
        ValueError: As :func:`score_tasks`.
    """
    source = Data(data, num_batches, may_cycle=False)
    return _score(model, losses, source, criterion, parameters, (), to_mask=False)


def _score(
    model: nn.Module,
    losses: TaskLosses,
    data: Data,
    criterion: str | Criterion | ScoreFunction,
    parameters: Iterable[ParameterKey] | None,
    exclude: Exclude,
    *,
    observe: GradientObserver | None = None,
    to_mask: bool = True,
    storage: Storage = BESIDE,
) -> TaskScores:
    root = unwrap(model)
    reshard(root)
    with failing_together():
        check_callable_losses(losses)
        _check_observer(observe, storage)
        storage.check_source(data.source)
        rule = resolve(criterion)
        selection = select(root, parameters, exclude)
        if not to_mask and any_sharded(selection.keys):
            raise ValueError(
                "model: must hold whole weights where channels are removed, found sharded ones; remove channels before "
                "fully_shard"
            )
        if to_mask and not masks_in_weights(root):
            warn_of_kept_aside(root, selection.keys)
        turn = TasksInTurn(storage.tasks_at_once)

        def sums_without(skipped: Mapping[str, str]) -> ScoreSums:
            options = {"listed": selection.listed, "to_mask": to_mask, "turn": turn}
            return sums_for(selection.keys, selection.names, rule, skipped=skipped, **options)

        sums, batches = sums_without(selection.skipped), data.batches()
    _check_alike(rule, selection, storage)
    tables: dict[str, dict[ParameterKey, Tensor]] = {}
    while True:
        with sums.together():
            sums.add_batches(model, losses, batches, observe=observe)
        if not tables:  # once is enough
            _check_same_weights(selection)
        sums.add_ranks()
        tables |= sums.tables(storage, progress=data.progress)
        if not turn.more():
            storage.wait(stored(*key).device for key in selection.keys)
            return sums.finish(sums.scores(root, tables))
        with failing_together():
            sums, batches = sums_without(sums.skipped), data.batches()


def _check_alike(rule: Criterion, selection: Selection, storage: Storage) -> None:
    """Compare over all ranks what decides how often they exchange something, and what."""
    check_same("criterion", rule.name, "give all ranks the same arguments")
    check_same(
        "parameters",
        selection.names,
        "give all ranks the same model and arguments; a model whose layers lie on different ranks (pipeline "
        "parallelism) has no gradient of one loss on all of them, and is not supported",
    )
    check_same("tasks_at_once", storage.tasks_at_once, "give all ranks the same arguments")


def _check_same_weights(selection: Selection) -> None:
    every = {name: stored(*key) for name, key in zip(selection.names, selection.keys, strict=True)}
    weights = {name: weight for name, weight in every.items() if not is_sharded(weight)}
    check_same_values("model", weights, "scores of different weights do not add up: load or seed all ranks alike")


def _check_observer(observe: object, storage: Storage) -> None:
    if observe is not None and (
        isinstance(observe, type) or not (hasattr(observe, "begin") and hasattr(observe, "add"))
    ):
        found = f"the class {observe.__name__}" if isinstance(observe, type) else type(observe).__name__
        raise TypeError(f"observe: must be an observer such as GradientConflict(), or None, found {found}")
    if observe is not None and storage.tasks_at_once is not None:
        raise ValueError("observe: must be None with tasks_at_once, found one; it compares all tasks on each batch")
