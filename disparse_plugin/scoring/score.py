"""Score every weight once per task: one forward and one backward per task on each batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sized

from torch import nn
from tqdm.auto import tqdm

from .._support.distributed import failing_together
from ..criteria import Criterion, ScoreFunction, resolve
from ..parameters import Exclude, ParameterKey, check_parameters, qualified_names, unwrap
from .losses import Batch, TaskLosses
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
) -> TaskScores:
    """Score every weight once per task; the model is left exactly as it was found.

    For task k and batches b the score is ``s_k = sum over b of criterion(w, dL_k(b)/dw)``, with ``w`` the effective
    weight (Sun et al., CVPR 2022, section 3). Which task uses which weight is read off the autograd graph, never off
    names.

    The forward runs in the model's present mode: call ``model.eval()`` first to score without dropout and with the
    stored BatchNorm statistics. Wrappers of ``DistributedDataParallel`` and ``torch.compile`` are looked through.

    Under ``torch.distributed`` all ranks must call this, each with its own part of the data; the scores of all batches
    of all ranks are added up, so that every rank returns the same scores.

    Args:
        model: The model; on any device.
        losses: ``losses(model, batch)`` runs the model once and returns one scalar loss per task. The scale of a loss
            changes nothing.
        data: Any iterable of batches; they are passed to ``losses`` as they are.
        criterion: A name, a :class:`~disparse_plugin.criteria.Criterion` or a callable ``(weight, grad) -> score``; see
            :mod:`disparse_plugin.criteria`.
        parameters: ``(module, name)`` pairs to score; by default :func:`~disparse_plugin.prunable_parameters`.
        exclude: What to leave out: modules, names or glob patterns, as in
            :func:`~disparse_plugin.prunable_parameters`. It is neither scored nor pruned nor counted.
        num_batches: How many batches to use; None for all of ``data``.
        cycle: Start again at the first batch when ``data`` ends before ``num_batches``.
        progress: Show a tqdm bar.
        observe: Shown every batch's gradients before they are scored and freed, e.g. a
            :class:`~disparse_plugin.analysis.GradientConflict`.

    Returns:
        The scores, float32 (float64 for float64 weights), on the devices of the weights.

    Raises:
        TypeError: If ``losses`` does not return a mapping from str to tensors, or an argument has the wrong type.
        ValueError: If ``data`` is empty or too short, a loss is not one finite number, tasks differ between batches, a
            task reaches no parameter, a score is not finite, or a parameter cannot be pruned by torch (tied, lazy,
            parametrized, not of this model, read by its parent). On all ranks, if they have different numbers of
            batches.
        RuntimeError: If another rank of ``torch.distributed`` has failed.

    Warns:
        UserWarning: If some parameters are reached by no task; they are listed in ``TaskScores.unreached``. If more
            than nine tenths of a task's scores are exactly zero.

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
    root = unwrap(model)
    with failing_together():
        rule = resolve(criterion)
        keys = check_parameters(root, parameters, exclude)
        batches = _batches(data, num_batches, cycle, progress)
        sums = ScoreSums(keys, qualified_names(root, keys), rule)
        sums.add_batches(model, losses, batches, observe=observe)
    sums.add_ranks()
    return sums.finish(root)


def _batches(data: Iterable[Batch], num_batches: int | None, cycle: bool, progress: bool) -> Iterator[Batch]:
    if num_batches is not None:
        if isinstance(num_batches, bool) or not isinstance(num_batches, int):
            raise TypeError(f"num_batches: must be an int or None, found {type(num_batches).__name__}: {num_batches!r}")
        if num_batches < 1:
            raise ValueError(f"num_batches: must be at least 1, found {num_batches}; pass None to use all of data")
    elif cycle:
        raise ValueError("num_batches: must be given with cycle=True, found None; otherwise scoring would never end")
    if not isinstance(data, Iterable):
        raise TypeError(
            f"data: must be an iterable of batches, found {type(data).__name__}; a single batch is data=[batch]"
        )
    length = _length(data)
    if num_batches is not None and length is not None and 0 < length < num_batches and not cycle:
        raise _too_short(num_batches, length)
    expected = num_batches if length is None or cycle else min(length, num_batches or length)
    return iter(
        tqdm(_counted(data, num_batches, cycle), total=expected, desc="scoring", unit="batch", disable=not progress)
    )


def _length(data: Iterable[Batch]) -> int | None:
    try:
        return len(data) if isinstance(data, Sized) else None
    except TypeError:  # a DataLoader over an IterableDataset has __len__, but no length
        return None


def _counted(data: Iterable[Batch], num_batches: int | None, cycle: bool) -> Iterator[Batch]:
    found = 0
    for _ in itertools.count():
        start = found
        for batch in data if num_batches is None else itertools.islice(data, num_batches - found):
            found += 1
            yield batch
        if not cycle or found in (start, num_batches):
            break
    if found == 0:
        raise ValueError("data: must hold at least one batch, found none")
    if num_batches is not None and found < num_batches:
        raise _too_short(num_batches, found)


def _too_short(wanted: int, found: int) -> ValueError:
    return ValueError(
        f"num_batches: must be at most the number of batches in data, found {wanted} with {found} in data; pass "
        f"num_batches={found}, or cycle=True with a data set that can be read again"
    )
