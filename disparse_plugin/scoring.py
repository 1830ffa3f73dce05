"""Score every weight once per task: one forward and one backward per task on each batch."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence, Sized

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .accumulate import accumulate
from .criteria import Criterion, ScoreFunction, resolve
from .distributed import add_up, check_same, failing_together
from .gradients import Batch, TaskLosses, UsedWeights, check_losses
from .parameters import ParameterKey, alive_mask, check_parameters, qualified_names, score_dtype, stored, unwrap
from .scores import TaskScores
from .undisturbed import undisturbed


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
        num_batches: How many batches to use; None for all of ``data``.
        cycle: Start again at the first batch when ``data`` ends before ``num_batches``.
        progress: Show a tqdm bar.

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
    root = unwrap(model)
    with failing_together():
        rule = resolve(criterion)
        keys = check_parameters(root, parameters)
        batches = _batches(data, num_batches, cycle, progress)
        sums = ScoreSums(keys, qualified_names(root, keys), rule)
        sums.add_batches(model, losses, batches)
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
        f"num_batches: must be at most the number of batches in data, found {wanted} with {found} in data; "
        f"pass num_batches={found}, or cycle=True with a data set that can be read again"
    )


class NonFiniteError(ValueError):
    """A loss or a score is NaN or infinite."""


class ScoreSums:
    """Running sums of the scores per task and parameter, on the parameters' devices, without reading them back."""

    def __init__(self, keys: Sequence[ParameterKey], names: Sequence[str], rule: Criterion) -> None:
        self._keys = keys
        self._names = names
        self._rule = rule
        self.by_task: dict[str, dict[int, Tensor]] = {}
        self._losses: list[dict[str, Tensor]] = []
        # For each batch and task, on each device: which parameters, and the extremes of their scores, (parameters, 2).
        self._peaks: list[dict[str, list[tuple[tuple[int, ...], Tensor]]]] = []

    def add_batches(
        self, model: nn.Module, losses: TaskLosses, batches: Iterable[Batch], *, same_tasks: bool = True
    ) -> None:
        """Score batches, and check that all scores are finite; the model is left as it was found.

        Args:
            model: The model, as the caller has it.
            losses: As in :func:`score_tasks`.
            batches: The batches.
            same_tasks: Whether every batch must return the same tasks.
        """
        tasks: tuple[str, ...] | None = None
        root, used = unwrap(model), UsedWeights(self._keys, self._names)
        with undisturbed(model, self._keys), used.recording():
            for number, batch in enumerate(batches):
                used.forget()
                by_task = check_losses(losses(root, batch), tasks, number)
                tasks = tuple(by_task) if same_tasks else None
                self._add_losses(by_task)
                for task, grads in used.gradients(by_task):
                    self._add(task, grads)
        self._check_finite()

    def add_ranks(self) -> None:
        """Add the scores of the other ranks of ``torch.distributed``, if there are any.

        Raises:
            ValueError: On all ranks, if they have scored different numbers of batches.
        """
        check_same("data", len(self._losses), "give every rank the same number of batches (drop or repeat some)")
        add_up(self.by_task, self._zeros, self._rule.summed)

    def by_parameter(self) -> list[dict[str, Tensor]]:
        """Return, for each parameter, the sums of the tasks that reach it."""
        return [
            {task: rows[index] for task, rows in self.by_task.items() if index in rows}
            for index in range(len(self._keys))
        ]

    def _zeros(self, index: int) -> Tensor:
        weight = stored(*self._keys[index])
        return torch.zeros(weight.shape, dtype=score_dtype(weight), device=weight.device)

    def _add_losses(self, losses: dict[str, Tensor]) -> None:
        self._losses.append({task: loss.detach().clone() for task, loss in losses.items()})
        self._peaks.append({task: [] for task in losses})
        for task in losses:
            self.by_task.setdefault(task, {})

    def _add(self, task: str, grads: dict[int, Tensor]) -> None:
        """Add one task's scores on one batch; takes the gradients out of ``grads`` one by one to free them early."""
        sums = self.by_task[task]
        peaks: dict[torch.device, dict[int, Tensor]] = {}
        for index in list(grads):
            if index in sums and not self._rule.summed:
                continue
            weight, grad = getattr(*self._keys[index]), grads.pop(index)
            sums[index], found = accumulate(self._rule, weight, grad, sums.get(index), self._names[index])
            peaks.setdefault(found.device, {})[index] = found
        # One tensor per batch, not one per parameter: there may be very many batches.
        self._peaks[-1][task] = [(tuple(found), torch.stack(list(found.values()))) for found in peaks.values()]

    def finish(self, root: nn.Module) -> TaskScores:
        """Hand over, and say which parameters no task reaches."""
        scores = self.scores(root)
        if scores.unreached:
            warnings.warn(
                f"parameters: {len(scores.unreached)} of {len(self._keys)} are reached by no task's loss and are left "
                f"out of scoring and pruning: {', '.join(scores.unreached)}",
                stacklevel=3,
            )
        return scores

    def scores(self, root: nn.Module, *, strict: bool = True) -> TaskScores:
        """Apply the per-layer step, and hand over; unless strict, without the tasks that reach nothing."""
        tables: dict[str, dict[ParameterKey, Tensor]] = {}
        for task, sums in self.by_task.items():
            if sums or strict:
                tables[task] = {self._keys[index]: self._per_layer(index, sums[index]) for index in sorted(sums)}
        return TaskScores(root, tables, parameters=self._keys, criterion=self._rule.name, num_batches=len(self._losses))

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
                    raise NonFiniteError(
                        f"losses: every loss must be finite, found {loss.item()} for task {task!r} in batch {number}; "
                        "check the batch's "
                        "labels, masks without valid pixels, or the precision"
                    )
                for indices, found in peaks[task]:
                    self._check_peaks(task, number, indices, found)

    def _check_peaks(self, task: str, number: int, indices: Sequence[int], peaks: Tensor) -> None:
        for index, good in zip(indices, peaks.isfinite().all(1).tolist(), strict=True):
            if not good:
                raise NonFiniteError(
                    f"losses: every score must be finite, found NaN or infinity for task {task!r}, batch {number}, "
                    "parameter "
                    f"{self._names[index]} (criterion {self._rule.name!r}); check for a division by zero, a square "
                    "root at zero or an "
                    "overflow in the loss"
                )
