"""Add up the scores of all batches, and of all ranks, and see that they are finite."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .._support.distributed import add_up, check_same, failing_together, gathered
from .._support.double import comparable
from .._support.undisturbed import undisturbed
from .._support.user_warning import warn_user
from ..agreement.consequences import LIKELY_CAUSES_OF_ZEROS
from ..agreement.percentiles import in_threads
from ..agreement.tallies import count_zeros, counts_true
from ..criteria import Criterion
from ..errors import NonFiniteError, TiesWarning
from ..maskable import Obstacle, refusal, warn_of_skipped
from ..parameters import ParameterKey, alive_mask, score_dtype, stored, unwrap
from ..sorting import positions
from .accumulate import accumulate
from .finite import all_finite
from .gradients import UsedWeights
from .hidden import refusing_wrappers
from .losses import Batch, TaskLosses, check_losses
from .storage import BESIDE, Storage, TasksInTurn
from .task_scores import TaskScores


class GradientObserver(Protocol):
    """Sees the gradients that scoring computes anyway, e.g. :class:`disparse_plugin.analysis.GradientConflict`."""

    def begin(self, keys: Sequence[ParameterKey], names: Sequence[str], losses: Mapping[str, Tensor]) -> None:
        """Start a batch; the losses still have their graphs."""

    def add(self, task: str, grads: Mapping[int, Tensor]) -> None:
        """Take one task's gradients, by the index of the parameter in ``keys``; they must not be changed."""


class ScoreSums:
    """Running sums of the scores per task and parameter, on the parameters' devices, without reading them back."""

    def __init__(
        self,
        keys: Sequence[ParameterKey],
        names: Sequence[str],
        rule: Criterion,
        *,
        skipped: Mapping[str, str] | None = None,
        listed: bool = True,
        to_mask: bool = True,
        turn: TasksInTurn | None = None,
    ) -> None:
        """Start with no batch.

        Args:
            keys: The ``(module, name)`` pairs.
            names: Their qualified names.
            rule: The criterion.
            skipped: What was left out before: qualified name to reason.
            listed: Whether a parameter that turns out not to be maskable is an error, or left out too.
            to_mask: Whether the weights are to be masked, so that it matters how their layers use them.
            turn: Which tasks are scored; by default all.
        """
        self._keys = keys
        self._names = names
        self._rule = rule
        self._listed = listed
        self._to_mask = to_mask
        self._turn = turn or TasksInTurn(None)
        self._skipped = dict(skipped or {})
        self.by_task: dict[str, dict[int, Tensor]] = {}
        self._losses: list[dict[str, Tensor]] = []
        # For each batch and task, on each device: which parameters, and the peaks of their scores.
        self._peaks: list[dict[str, list[tuple[tuple[int, ...], Tensor]]]] = []

    def together(self) -> contextlib.AbstractContextManager[None]:
        """Return what :meth:`add_batches` is to be called in, so that all ranks fail if one does."""
        return failing_together()

    def add_batches(
        self,
        model: nn.Module,
        losses: TaskLosses,
        batches: Iterable[Batch],
        *,
        same_tasks: bool = True,
        observe: GradientObserver | None = None,
    ) -> None:
        """Score batches, and check that all scores are finite; the model is left as it was found.

        Args:
            model: The model, as the caller has it.
            losses: As in :func:`score_tasks`.
            batches: The batches.
            same_tasks: Whether every batch must return the same tasks.
            observe: Shown every batch's gradients before they are scored and freed.
        """
        tasks: tuple[str, ...] | None = None
        root, used = unwrap(model), UsedWeights(self._keys, self._names, to_mask=self._to_mask)
        with undisturbed(model, self._keys), used.recording(), refusing_wrappers(root):
            for number, batch in enumerate(batches):
                used.begin()
                by_task = check_losses(run(losses, root, batch, number), tasks, number)
                tasks = tuple(by_task) if same_tasks else None
                by_task = self._turn.of(by_task)
                self._add_losses(by_task)
                if observe is not None:
                    observe.begin(self._keys, self._names, by_task)
                for task, grads in used.gradients(by_task):
                    if observe is not None:
                        observe.add(task, grads)
                    self._add(task, grads)
                self._leave_out(used.unfit)
        self._check_finite()

    def _leave_out(self, unfit: Mapping[int, Obstacle]) -> None:
        """Refuse, or forget, the parameters that a forward has shown not to be maskable."""
        obstacles = {self._names[index]: unfit[index] for index in sorted(unfit)}
        if obstacles and self._listed:
            raise refusal(obstacles, pasteable=True)
        self._skipped.update({name: obstacle.reason for name, obstacle in obstacles.items()})
        self._forget()

    def _forget(self) -> None:
        for rows in self.by_task.values():
            for index in [index for index in rows if self._names[index] in self._skipped]:
                del rows[index]

    def add_ranks(self) -> None:
        """Add the scores of the other ranks of ``torch.distributed``, if there are any.

        Raises:
            ValueError: On all ranks, if they have scored different numbers of batches.
        """
        check_same("data", len(self._losses), "give every rank the same number of batches (drop or repeat some)")
        for others in gathered(self._skipped):
            self._skipped.update(others)
        self._forget()
        add_up(self.by_task, self._zeros, self._rule.summed)

    def by_parameter(self) -> list[dict[str, Tensor]]:
        """Return, for each parameter, the sums of the tasks that reach it."""
        return [
            {task: rows[index] for task, rows in self.by_task.items() if index in rows}
            for index in range(len(self._keys))
        ]

    @property
    def skipped(self) -> dict[str, str]:
        """What was left out: qualified name to reason."""
        return dict(self._skipped)

    def _zeros(self, index: int) -> Tensor:
        weight = stored(*self._keys[index])
        return torch.zeros(weight.shape, dtype=score_dtype(weight), device=weight.device)

    def _add_losses(self, losses: dict[str, Tensor]) -> None:
        self._losses.append({task: loss.detach().clone() for task, loss in losses.items()})
        self._peaks.append({task: [] for task in losses})
        for task in losses:
            self.by_task.setdefault(task, {})

    def _add(self, task: str, grads: dict[int, Tensor]) -> None:
        """Add one task's scores on one batch; takes the gradients out of ``grads`` as it goes, to free them early."""
        sums = self.by_task[task]
        if not self._rule.summed:
            for index in sums:
                grads.pop(index, None)
        weights = {index: self._effective(index) for index in grads}
        self._peaks[-1][task] = accumulate(self._rule, weights, grads, sums, self._names)

    def _effective(self, index: int) -> Tensor:
        """Return the weight that the layer multiplied with, or what of it lies here."""
        weight: Tensor = getattr(*self._keys[index])
        return weight

    def finish(self, scores: TaskScores) -> TaskScores:
        """Hand over, and say which parameters no task reaches."""
        left = [name for name in self._names if name not in scores.skipped]
        warn_of_skipped(scores.skipped, len(left))
        if scores.unreached:
            warn_user(
                f"parameters: {len(scores.unreached)} of {len(left)} are reached by no task's loss and are left "
                f"out of scoring and pruning: {', '.join(scores.unreached)}"
            )
        for task in scores:
            self._warn_of_zeros(scores, task)
        return scores

    def _warn_of_zeros(self, scores: TaskScores, task: str) -> None:
        table = scores[task]
        total = sum(score.numel() for score in table.values())
        masks = [mask for key in table if (mask := alive_mask(*key)) is not None]
        dead = sum(counts_true([~mask for mask in masks]))
        self._tell_of_zeros(task, count_zeros(table.values()) - dead, total - dead)

    @staticmethod
    def _tell_of_zeros(task: str, zeros: int, alive: int) -> None:
        if 10 * zeros > 9 * alive:
            warn_user(
                f"scores: {zeros:,} of {alive:,} alive weights of task {task!r} score exactly zero; "
                f"where they do for every task, the smaller magnitudes go first. {LIKELY_CAUSES_OF_ZEROS}",
                TiesWarning,
            )

    def tables(
        self, storage: Storage = BESIDE, *, strict: bool = True, progress: bool = False
    ) -> dict[str, dict[ParameterKey, Tensor]]:
        """Take the criterion's last steps, and hand the scores over; unless strict, without tasks that reach nothing.

        Args:
            storage: How they are kept; each sum is given up as soon as its score is.
            strict: Whether every task must reach something.
            progress: Show a bar.
        """
        for task, sums in self.by_task.items():
            if strict and not sums:
                raise ValueError(_reaches_nothing(task, self._skipped))
        pairs = [(task, index) for task, sums in self.by_task.items() for index in sorted(sums)]
        tables: dict[str, dict[ParameterKey, Tensor]] = {task: {} for task, sums in self.by_task.items() if sums}
        for (task, index), score in zip(pairs, self._completed_all(pairs, storage, progress=progress), strict=True):
            tables[task][self._keys[index]] = score
        return tables

    def scores(self, root: nn.Module, tables: Mapping[str, Mapping[ParameterKey, Tensor]]) -> TaskScores:
        """Make scores of tables, of these sums and of others before them, without what these skipped."""
        left = [key for key, name in zip(self._keys, self._names, strict=True) if name not in self._skipped]
        return TaskScores(
            root,
            {task: {key: rows[key] for key in left if key in rows} for task, rows in tables.items()},
            parameters=left,
            criterion=self._rule.name,
            num_batches=len(self._losses),
            shares=self._rule.shares,
            skipped=self.skipped,
        )

    def _completed_all(self, pairs: Sequence[tuple[str, int]], storage: Storage, *, progress: bool) -> list[Tensor]:
        """Take the criterion's last steps, under a bar of their own: on large layers they take long."""
        shown = progress and self._rule.has_last_steps
        with tqdm(total=len(pairs), desc="last steps", unit="tensor", disable=not shown) as bar:

            def complete(pair: tuple[str, int]) -> Tensor:
                result = storage.keep(self._completed(pair[1], self.by_task[pair[0]].pop(pair[1])))
                bar.update()
                return result

            return in_threads(complete, pairs) if self._may_run_in_threads() else [complete(pair) for pair in pairs]

    def _may_run_in_threads(self) -> bool:
        return self._rule.has_last_steps and self._rule.may_run_in_threads

    def _completed(self, index: int, total: Tensor) -> Tensor:
        """Take the criterion's last steps on what is alive of one parameter."""
        if not self._rule.has_last_steps:
            return total
        alive, weight = alive_mask(*self._keys[index]), comparable(stored(*self._keys[index]).detach())
        total = comparable(total)
        if alive is None:
            return self._rule.complete(weight.reshape(-1), total.reshape(-1)).reshape(total.shape)
        places = positions(comparable(alive).reshape(-1))  # once: a bool index is looked for at every use
        result = total.new_zeros(total.shape)
        result.view(-1)[places] = self._rule.complete(weight.reshape(-1)[places], total.reshape(-1)[places])
        return result

    def _check_finite(self) -> None:
        """Read back, at once, whether all losses and scores are finite, and name the first that is not."""
        pairs = [(number, task) for number, losses in enumerate(self._losses) for task in losses]
        losses = [self._losses[number][task].reshape(1, 1) for number, task in pairs]
        scores = [found for number, task in pairs for _, found in self._peaks[number][task]]
        flags = iter(all_finite([*losses, *scores]))
        good = {pair: next(flags)[0] for pair in pairs}
        for number, task in pairs:
            if not good[number, task]:
                raise NonFiniteError(
                    f"losses: every loss must be finite, found {self._losses[number][task].item()} for task {task!r} "
                    f"in batch {number}; check the batch's labels, masks without valid pixels, or the precision"
                )
            for indices, _ in self._peaks[number][task]:
                self._check_scores(task, number, dict(zip(indices, next(flags), strict=True)))

    def _check_scores(self, task: str, number: int, good: Mapping[int, bool]) -> None:
        for index in sorted(good):
            if not good[index]:
                raise NonFiniteError(
                    f"losses: every score must be finite, found NaN or infinity for task {task!r}, batch {number}, "
                    f"parameter {self._names[index]} (criterion {self._rule.name!r}); check for a division by zero, a "
                    "square root at zero or an overflow in the loss"
                )


def _reaches_nothing(task: str, skipped: Iterable[str]) -> str:
    perhaps = f", or all it reaches is left out: {', '.join(skipped)}" if skipped else ""
    return (
        f"losses: every task must reach at least one parameter, found none for task {task!r}; its loss does not depend "
        f"on any of the given parameters (detached, constant, or computed from other parameters{perhaps}): fix it or "
        "leave the task out"
    )


def run(losses: TaskLosses, model: nn.Module, batch: Batch, number: int) -> object:
    """Call a user's losses; an error of theirs says on what."""
    try:
        return losses(model, batch)
    except Exception as error:
        error.add_note(
            f"raised by losses(model, batch) on batch {number} of data, a {type(batch).__name__}; data must be an "
            "iterable of batches, a single batch is data=[batch]"
        )
        raise
