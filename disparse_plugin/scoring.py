"""Score every weight once per task: one forward and one backward per task on each batch."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .criteria import Criterion, ScoreFunction, resolve
from .gradients import Batch, TaskLosses, UsedWeights, check_losses
from .parameters import ParameterKey, alive_mask, check_parameters, qualified_names, score_dtype, unwrap
from .scores import TaskScores
from .undisturbed import undisturbed


class GradientObserver(Protocol):
    """Sees the gradients that scoring computes anyway, e.g. :class:`disparse_plugin.analysis.GradientConflict`."""

    def begin(self, keys: Sequence[ParameterKey], names: Sequence[str], losses: Mapping[str, Tensor]) -> None:
        """Start a batch; the losses still have their graphs."""

    def add(self, task: str, grads: Mapping[int, Tensor]) -> None:
        """Take one task's gradients, by the index of the parameter in ``keys``; they must not be changed."""


def score_tasks(
    model: nn.Module,
    losses: TaskLosses,
    data: Iterable[Batch],
    *,
    criterion: str | Criterion | ScoreFunction = "snip",
    parameters: Iterable[ParameterKey] | None = None,
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

    Args:
        model: The model; on any device.
        losses: ``losses(model, batch)`` runs the model once and returns one scalar loss per task. The scale of a loss
            changes nothing.
        data: Any iterable of batches; they are passed to ``losses`` as they are.
        criterion: A name, a :class:`~disparse_plugin.criteria.Criterion` or a callable ``(weight, grad) -> score``; see
            :mod:`disparse_plugin.criteria`.
        parameters: ``(module, name)`` pairs to score; by default :func:`~disparse_plugin.prunable_parameters`.
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
            parametrized, not of this model, read by its parent).

    Warns:
        UserWarning: If some parameters are reached by no task; they are listed in ``TaskScores.unreached``.

    Example:
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
    rule = resolve(criterion)
    root = unwrap(model)
    keys = check_parameters(root, parameters)
    names = qualified_names(root, keys)
    batches = _batches(data, num_batches, cycle, progress)
    used, sums = UsedWeights(keys, names), _Sums(keys, names, rule)
    tasks: tuple[str, ...] | None = None
    with undisturbed(root, keys), used.recording():
        for number, batch in enumerate(batches):
            used.forget()
            by_task = check_losses(losses(root, batch), tasks, number)
            tasks = tuple(by_task)
            sums.add_losses(by_task)
            if observe is not None:
                observe.begin(keys, names, by_task)
            for task, grads in used.gradients(by_task):
                if observe is not None:
                    observe.add(task, grads)
                sums.add(task, grads)
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
    length = len(data) if isinstance(data, Sized) else None
    if num_batches is not None and length is not None and 0 < length < num_batches and not cycle:
        raise _too_short(num_batches, length)
    expected = num_batches if length is None or cycle else min(length, num_batches or length)
    return iter(
        tqdm(_counted(data, num_batches, cycle), total=expected, desc="scoring", unit="batch", disable=not progress)
    )


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
        f"num_batches: must be at most the number of batches in data, found {wanted} with {found} in data; "
        f"pass num_batches={found}, or cycle=True with a data set that can be read again"
    )


class _Sums:
    """Running sums of the scores per task and parameter, on the parameters' devices, without reading them back."""

    def __init__(self, keys: Sequence[ParameterKey], names: Sequence[str], rule: Criterion) -> None:
        self._keys = keys
        self._names = names
        self._rule = rule
        self._sums: dict[str, dict[int, Tensor]] = {}
        self._losses: list[dict[str, Tensor]] = []
        self._peaks: list[dict[str, dict[int, Tensor]]] = []

    def add_losses(self, losses: dict[str, Tensor]) -> None:
        self._losses.append({task: loss.detach() for task, loss in losses.items()})
        self._peaks.append({task: {} for task in losses})
        for task in losses:
            self._sums.setdefault(task, {})

    def add(self, task: str, grads: dict[int, Tensor]) -> None:
        """Add one task's scores on one batch; takes the gradients out of ``grads`` one by one to free them early."""
        sums, peaks = self._sums[task], self._peaks[-1][task]
        for index in list(grads):
            if index in sums and not self._rule.summed:
                continue
            score = self._score(index, grads.pop(index))
            peaks[index] = torch.linalg.vector_norm(score, ord=torch.inf)
            sums[index] = score if index not in sums else sums[index].add_(score)

    def _score(self, index: int, grad: Tensor) -> Tensor:
        module, name = self._keys[index]
        weight = getattr(module, name).detach()
        dtype = score_dtype(weight)
        weight, grad = weight.to(dtype), grad.detach().to(dtype)
        score = self._rule.score(weight, grad)
        if not isinstance(score, Tensor) or score.shape != weight.shape or not score.is_floating_point():
            found = f"{score.dtype} {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
            raise ValueError(
                f"criterion: {self._rule.name} must return a floating point tensor of the weight's shape "
                f"{tuple(weight.shape)}, "
                f"found {found} for {self._names[index]}"
            )
        # What we keep is added to in place, so it must not be the weight, nor a gradient that autograd shares.
        owned = score.data_ptr() not in (weight.data_ptr(), grad.data_ptr())
        return score.detach().to(dtype, copy=not owned)

    def finish(self, root: nn.Module) -> TaskScores:
        """Check that everything is finite, apply the per-layer step, and hand over."""
        self._check_finite()
        tables: dict[str, dict[ParameterKey, Tensor]] = {}
        for task, sums in self._sums.items():
            tables[task] = {self._keys[index]: self._per_layer(index, sums[index]) for index in sorted(sums)}
        scores = TaskScores(
            root, tables, parameters=self._keys, criterion=self._rule.name, num_batches=len(self._losses)
        )
        if scores.unreached:
            warnings.warn(
                f"parameters: {len(scores.unreached)} of {len(self._keys)} are reached by no task's loss and are left "
                "out of "
                f"scoring and pruning: {', '.join(scores.unreached)}",
                stacklevel=3,
            )
        return scores

    def _per_layer(self, index: int, score: Tensor) -> Tensor:
        step = self._rule.per_layer
        if step is None:
            return score
        alive = alive_mask(*self._keys[index])
        if alive is None:
            return step(score.reshape(-1)).reshape(score.shape)
        result = torch.zeros_like(score)
        result[alive] = step(score[alive])
        return result

    def _check_finite(self) -> None:
        for number, (losses, peaks) in enumerate(zip(self._losses, self._peaks, strict=True)):
            for task, loss in losses.items():
                if not bool(loss.isfinite().all()):
                    raise ValueError(
                        f"losses: every loss must be finite, found {loss.item()} for task {task!r} in batch {number}; "
                        "check the batch's "
                        "labels, masks without valid pixels, or the precision"
                    )
                self._check_peaks(task, number, peaks[task])

    def _check_peaks(self, task: str, number: int, peaks: dict[int, Tensor]) -> None:
        if not peaks:
            return
        home = next(iter(peaks.values())).device
        finite = torch.stack([peak.to(home) for peak in peaks.values()]).isfinite().tolist()
        for index, good in zip(peaks, finite, strict=True):
            if not good:
                raise ValueError(
                    f"losses: every score must be finite, found NaN or infinity for task {task!r}, batch {number}, "
                    "parameter "
                    f"{self._names[index]} (criterion {self._rule.name!r}); check for a division by zero, a square "
                    "root at zero or an "
                    "overflow in the loss"
                )
