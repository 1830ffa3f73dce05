"""Running sums of scores of weights that are spread over ranks, each rank of what it has."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._support.distributed import check_same, failing_together, gathered, several_ranks, this_rank, total_counts
from .._support.shards import beside, is_sharded, local, owns, reshard
from .._support.undisturbed import undisturbed
from ..agreement.shared_out import lamp_among_all
from ..agreement.tallies import count_true
from ..criteria import Criterion, lamp_scores
from ..parameters import ParameterKey, alive_mask, stored, unwrap
from ..sorting import positions
from .losses import Batch, TaskLosses, check_losses
from .shards import ShardedWeights, any_sharded
from .sums import GradientObserver, ScoreSums, run
from .task_scores import TaskScores

_END = object()


def sums_for(keys: Sequence[ParameterKey], names: Sequence[str], rule: Criterion, **options: Any) -> ScoreSums:
    """Make the sums that fit the parameters: of whole weights, or of what lies on this rank.

    Args:
        keys: The ``(module, name)`` pairs.
        names: Their qualified names.
        rule: The criterion.
        **options: As :class:`ScoreSums` takes them.

    Raises:
        ValueError: If the criterion cannot score a part of a weight.

    Example:
        >>> from disparse_plugin.criteria import resolve
        >>> type(sums_for([(nn.Linear(2, 1), "weight")], ["weight"], resolve("snip"))).__name__
        'ScoreSums'
    """
    kind = ShardedSums if any_sharded(keys) else ScoreSums
    return kind(keys, names, rule, **options)


class ShardedSums(ScoreSums):
    """As :class:`ScoreSums`, of what lies on this rank; all ranks score together, one batch of each at a time."""

    def __init__(self, keys: Sequence[ParameterKey], names: Sequence[str], rule: Criterion, **options: Any) -> None:
        """Start with no batch.

        Args:
            keys: As :class:`ScoreSums`.
            names: As :class:`ScoreSums`.
            rule: The criterion; it must score every entry by itself.
            **options: As :class:`ScoreSums`.

        Raises:
            ValueError: If the criterion looks at more than one entry at a time.
        """
        super().__init__(keys, names, rule, **options)
        if not rule.elementwise or rule.per_layer not in (None, lamp_scores):
            raise ValueError(
                f"criterion: must score every entry by itself where weights are sharded, found {rule.name!r}; if it "
                "does, say so: criteria.register(name, elementwise=True)"
            )
        # Taken now: during a forward, what fully_shard has gathered stands in their place.
        self._stored = [stored(*key) for key in keys]

    def together(self) -> contextlib.AbstractContextManager[None]:
        """Return nothing to be done around :meth:`add_batches`, which communicates and fails together by itself."""
        return contextlib.nullcontext()

    def add_batches(
        self,
        model: nn.Module,
        losses: TaskLosses,
        batches: Iterable[Batch],
        *,
        same_tasks: bool = True,
        observe: GradientObserver | None = None,
    ) -> None:
        """Score batches as :meth:`ScoreSums.add_batches` does; one batch is the batches of all ranks.

        Raises:
            ValueError: On all ranks, if they have different numbers of batches, or other tasks in one.
        """
        if observe is not None:
            raise ValueError("observe: must be None where weights are sharded, found one; no rank has whole gradients")
        tasks: tuple[str, ...] | None = None
        root, source = unwrap(model), iter(batches)
        used = ShardedWeights(root, self._keys, self._names)
        with contextlib.ExitStack() as stack:
            stack.callback(reshard, root)
            stack.enter_context(undisturbed(model, self._keys))
            stack.enter_context(used.recording())
            for number in itertools.count():
                if (batch := _next_of_all(source)) is _END:
                    break
                used.begin()
                by_task = _losses_of_all(losses, root, batch, number, tasks)
                tasks = tuple(by_task) if same_tasks else None
                by_task = self._turn.of(by_task)
                self._add_losses(by_task)
                for task, grads in used.gradients(by_task):
                    self._add(task, grads)
                self._leave_out(used.unfit)
        with failing_together():
            self._check_finite()

    def add_ranks(self) -> None:
        """Leave out what one rank has left out; the gradients are those of all ranks already."""
        for others in gathered(self._skipped):
            self._skipped.update(others)
        self._forget()

    def _add(self, task: str, grads: dict[int, Tensor]) -> None:
        for index in [index for index, grad in grads.items() if not grad.numel()]:  # fewer rows than ranks
            self.by_task[task][index] = grads.pop(index)
        super()._add(task, grads)

    def _effective(self, index: int) -> Tensor:
        weight = self._stored[index]
        return local(weight) if is_sharded(weight) else getattr(*self._keys[index])

    def _may_run_in_threads(self) -> bool:
        return False  # the ranks communicate, all in one order

    def _completed(self, index: int, total: Tensor) -> Tensor:
        """Take the criterion's last steps on what is alive of one parameter on all ranks."""
        weight, alive = local(self._stored[index].detach()), alive_mask(*self._keys[index])
        if self._rule.finish is None and self._rule.per_layer is None:
            return beside(total, self._stored[index])
        here = slice(None) if alive is None else positions(local(alive).reshape(-1))
        values = total.reshape(-1)[here]
        if self._rule.finish is not None:
            values = self._rule.finish(weight.reshape(-1)[here].to(values.dtype, copy=True), values)
        if self._rule.per_layer is not None:
            owned = owns(self._stored[index], this_rank())
            values = lamp_among_all(values, torch.full_like(values, owned, dtype=torch.bool))
        result = torch.zeros_like(total)
        result.view(-1)[here] = values
        return beside(result, self._stored[index])

    def _warn_of_zeros(self, scores: TaskScores, task: str) -> None:
        zeros = alive = 0
        for key, score in scores[task].items():
            mask, here = alive_mask(*key), local(score)
            counted = torch.ones_like(here, dtype=torch.bool) if mask is None else local(mask)
            factor = int(owns(stored(*key), this_rank()))
            zeros += factor * count_true(counted & (here == 0))
            alive += factor * count_true(counted)
        self._tell_of_zeros(task, *total_counts([zeros, alive]))


def _next_of_all(source: Iterator[Batch]) -> Batch:
    """Return the next batch, or that there is none on any rank.

    Raises:
        ValueError: On all ranks, if only some have one.
    """
    with failing_together():
        batch = next(source, _END)
    there = gathered(batch is not _END)
    if len(set(there)) > 1:
        without = [rank for rank, more in enumerate(there) if not more]
        raise ValueError(
            f"data: all ranks must have the same number of batches where weights are sharded, found that ranks "
            f"{without} have no more; drop or repeat some"
        )
    return batch


def _losses_of_all(
    losses: TaskLosses, root: nn.Module, batch: Batch, number: int, tasks: Sequence[str] | None
) -> dict[str, Tensor]:
    """Run the model on the batches of all ranks at once, and check what comes out on all of them.

    A forward gathers weights from all ranks. If it breaks off on one, that one cannot tell the others, which wait for
    it inside theirs; it raises, and they do when its process ends. After the forward, all fail together.
    """
    finished: list[bool] = []
    problem: Exception | None = None
    found: object = None
    with contextlib.ExitStack() as stack:
        stack.callback(root.register_forward_hook(lambda *_: finished.append(True)).remove)
        try:
            found = run(losses, root, batch, number)
        except Exception as error:
            if not finished and several_ranks():
                error.add_note(
                    "raised before the model had finished its forward: the other ranks, whose weights are gathered "
                    "from this one too, end when this process does"
                )
                raise
            problem = error
    with failing_together():
        if problem is not None:
            raise problem
        by_task = check_losses(found, tasks, number)
    advice = "return a zero loss for a task without labels: all ranks run each task's backward together"
    check_same("losses", sorted(by_task), advice)
    order: list[str] = gathered(list(by_task))[0]
    return {task: by_task[task] for task in order}
