"""Prune a network little by little while it trains, scoring it anew at each stage."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from .. import arbiters, damped_shares
from .._support.distributed import check_same, failing_together
from .._support.shards import local, reshard
from ..agreement import patterns
from ..agreement.amounts import count_to_prune, refuse_percentage
from ..agreement.budgets import Budget, check_room
from ..agreement.patterns import Channels, NofM, Pattern, Place
from ..agreement.tallies import count_true
from ..arbiters import Arbiter
from ..criteria import Criterion, ScoreFunction, resolve
from ..maskable import select, warn_of_skipped
from ..parameters import Exclude, ParameterKey, present_mask, stored, unwrap
from ..scoring.losses import Batch, TaskLosses, check_callable_losses
from ..scoring.task_scores import TaskScores
from .blocks import OnTheWay, above, check_amount_of
from .initial_masks import places_of
from .live_masks import LiveMasks, check_goes_with_shards, counts_of
from .mask_scheduler import MaskScheduler, given
from .schedules import (
    PRUNED_AFTER,
    Schedule,
    check_schedule,
    check_steps,
    check_window,
    count_at,
    cubic,
    describe,
    describe_arbiter,
    given_since,
    step_of,
)
from .step_scores import StepScores, check_grad_scaler


@dataclasses.dataclass(frozen=True)
class PruningStage:
    """What one stage of gradual pruning did.

    Attributes:
        step: The number of completed optimizer steps.
        sparsity: The share of all listed weights that is masked now.
        pruned: For each layer, how many weights were newly masked.
    """

    step: int
    sparsity: float
    pruned: Mapping[str, int]


class GradualPruning(MaskScheduler[PruningStage]):
    """Reach a total sparsity in stages during training (iterative DiSparse).

    At steps ``start_at, start_at + update_every, ..., stop_at`` the alive weights are scored on the batch of the step,
    once per task, and the lowest agreement scores over all layers are masked until ``amount(step)`` of all weights is.
    Every task must be in it: where a batch holds one, pass one of each, ``step(*batches)``. The default is the cubic
    schedule of automated gradual pruning (Zhu and Gupta, 2017). Masks change in place, and masked weights are exactly
    0, as with :class:`DiSparseScheduler`; none comes back.

    ``joint(losses)`` with ``criterion="magnitude"`` is plain gradual magnitude pruning; with :meth:`prune_to` and a
    :class:`.RewindPoint` it is iterative magnitude pruning with rewinding
    (Frankle et al., ICML 2020).

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> def losses(model, x):
        ...     out = model(x)
        ...     return {"a": out[:, 0].square().mean(), "b": (out[:, 1] - 1).square().mean()}
        >>> pruning = GradualPruning(net, optimizer, losses, amount=0.75, update_every=2, stop_at=8)
        >>> for _ in range(8):
        ...     batch = torch.randn(32, 8)
        ...     optimizer.zero_grad()
        ...     sum(losses(net, batch).values()).backward()
        ...     optimizer.step()
        ...     stage = pruning.step(batch)
        >>> stage.step, stage.sparsity
        (8, 0.75)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        losses: TaskLosses,
        *,
        amount: float | Schedule | None = None,
        update_every: int = 100,
        start_at: float = 0,
        stop_at: float = PRUNED_AFTER,
        total_steps: int | None = None,
        criterion: str | Criterion | ScoreFunction = damped_shares.CRITERION,
        arbiter: str | Arbiter | None = None,
        pattern: str | Pattern = "weights",
        min_keep: float = 0,
        parameters: Iterable[ParameterKey] | None = None,
        exclude: Exclude = (),
        grad_scaler: GradScaler | None = None,
    ) -> None:
        """Put hooks on the model; nothing is masked yet, but masks that are there stay.

        Args:
            model: The model; wrappers are looked through.
            optimizer: What trains it; of a kind in :mod:`disparse_plugin.sparse_training.optimizer_state`.
            losses: As in :class:`DiSparseScheduler`.
            amount: How much is masked in the end: a fraction (float) or a count (int) of all listed weights, also of
                those that no task reaches (the one-shot calls leave them out; so does ``exclude``); or a
                function from the step to that. Left out with an ``n:m`` pattern.
            update_every: Optimizer steps between stages.
            start_at: The step of the first stage (int), or the fraction of the training after which it is (float); at
                0, the first stage is at ``update_every``.
            stop_at: The step of the last stage (int), or the fraction of the training after which it is (float); a
                half did best on yeast, and as well as others on pictures. The same as ``start_at`` prunes once, then.
            total_steps: The optimizer steps of the training; needed for fractions.
            criterion: A name, a criterion or a callable; see :mod:`disparse_plugin.criteria`. The default is that of
                :func:`~disparse_plugin.disparse_pretrained`, because what is cut is being trained.
            arbiter: How the tasks agree; None is ``"sum"`` with the default criterion, and ``"unanimous"`` with others.
            pattern: ``"weights"``; ``"channels"``: whole output channels are masked, and ``amount`` and ``min_keep``
                count channels; or any ``"n:m"``: the stages take what n:m would remove, so that after the last of every
                m weights along the input dimension n are alive. See :mod:`disparse_plugin.agreement.patterns`.
            min_keep: How many weights stay in every tensor at least (int), or which fraction of it (float in (0, 1)),
                as in :meth:`disparse_plugin.TaskScores.masks`.
            parameters: ``(module, name)`` pairs; by default those of :func:`~disparse_plugin.prunable_parameters` that
                can be masked.
            exclude: Modules, names or glob patterns, as in :func:`~disparse_plugin.prunable_parameters`: neither
                scored nor pruned nor counted.
            grad_scaler: As in :class:`DiSparseScheduler`.

        Raises:
            TypeError: If an argument is of the wrong type, or the optimizer is not known.
            ValueError: If a value is out of range or does not fit the model. The model is as before.
        """
        arguments = given(locals())
        root, exclude = unwrap(model), tuple(exclude) if isinstance(exclude, Iterator) else exclude
        reshard(root)
        with failing_together():
            self._every = check_steps("update_every", update_every)
            self._start = step_of("start_at", start_at, total_steps, least=0)
            self._stop = step_of("stop_at", stop_at, total_steps)
            check_window(self._start, self._stop)
            arbiter = damped_shares.arbiter_for(criterion, arbiter)
            self._arbiter, rule = arbiters.resolve(arbiter), resolve(criterion)
            form = patterns.resolve(pattern)
            self._pattern = OnTheWay(form.n, form.m) if isinstance(form, NofM) else form
            check_callable_losses(losses)
            check_grad_scaler(grad_scaler)
            self._min_keep = min_keep
            selection = select(root, parameters, exclude)
            first = {key: local(present_mask(key)) for key in selection.keys}
            check_goes_with_shards(selection.keys, form, grad_scaler)
            self._places, self._total = self._counted(places_of(selection.keys, selection.names))
            self._amount = self._schedule(amount)
            settings = self._described(amount, rule, arbiter)
        check_same("settings", settings, "give all ranks the same options")
        self._check_room([stored(*key) for key in first], list(first.values()))
        warn_of_skipped(selection.skipped, len(first))
        masks = LiveMasks(root, optimizer, first, revocable=not selection.listed)

        def begin_again(names: Sequence[str]) -> None:
            GradualPruning.__init__(self, **{**arguments, "exclude": [*exclude, *names]})

        self._root = root
        self._scores = StepScores(model, losses, rule, masks, grad_scaler, every_batch=True)
        super().__init__(
            model, self._scores.noted, masks, optimizer, settings, self._start or min(self._every, self._stop),
            skipped=selection.skipped, begin_again=None if selection.listed else begin_again,
        )  # fmt: skip

    def _described(self, amount: float | Schedule | None, rule: Criterion, arbiter: str | Arbiter) -> dict[str, Any]:
        """Return what a run that goes on from this one must have in common with it."""
        return {
            "update_every": self._every,
            "start_at": self._start,
            "stop_at": self._stop,
            "amount": describe(amount),
            "criterion": rule.name,
            "arbiter": describe_arbiter(arbiter),
            **given_since(min_keep=self._min_keep, pattern=self._pattern),
        }

    def _counted(self, places: Sequence[Place]) -> tuple[list[Place], int]:
        """Check that the pattern fits, and return the places without their masks, and how many units they have."""
        self._pattern.check(places)
        bare = [dataclasses.replace(place, alive=None) for place in places]
        return bare, sum(self._pattern.sizes(place) for place in places)

    def _check_room(self, parameters: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
        """Check that ``min_keep`` leaves enough for the last stage, which would else be the first to find out."""
        if not self._min_keep:
            return
        budget, units = Budget(0, self._min_keep), self._units_alive(parameters, masks)
        pairs = zip(self._places, units, strict=True)
        protected = sum(budget.kept_of(self._pattern.sizes(place), alive) for place, alive in pairs)
        masked = self._total - sum(units)
        check_room(count_at(self._amount, self._stop, self._total) - masked, sum(units), protected)

    def prune_to(self, amount: float, *batches: Batch) -> PruningStage | None:
        """Mask now, whatever the schedule says, until a total of ``amount`` is masked.

        Args:
            amount: A fraction (float) or count (int) of all listed weights, those already masked included.
            *batches: What to score on.

        Returns:
            What was done; None if a ``GradScaler`` is used and gradients overflowed. Then call it again.

        Raises:
            TypeError: If ``amount`` is neither int nor float, or there is no batch.
            ValueError: If ``amount`` is out of range, a loss or score is not finite, or more is to be masked than the
                tasks in the batches reach and ``min_keep`` leaves. The model is as before.
            RuntimeError: If another rank has failed.
        """
        with failing_together():
            if not batches:
                raise TypeError("batches: at least one is needed to score on, found none")
            alive = self.masks.current()
            target = count_to_prune(amount, self._total)
        units = self._alive(alive)
        with failing_together():
            count = self._missing(target, alive, units)
        check_same("amount", count, "give all ranks the same amount, or the same function of the step")
        new: Sequence[Tensor] = alive
        if count > 0:
            sums = self._scores.on(batches)
            if sums is None:
                return None
            with sums.together():
                keep = self._kept(sums.scores(self._root, sums.tables(strict=False)), count)
                new = [local(keep.get(key, mask)) for key, mask in zip(self.masks.keys, alive, strict=True)]
            self.masks.check_alike(new, "keep the weights of all ranks equal (DistributedDataParallel does)")
            self.masks.rewrite(new)
        pruned = self.masks.counts([before & ~after for before, after in zip(alive, new, strict=True)])
        weights = sum(parameter.numel() for parameter in self.masks.parameters())
        sparsity = (weights - sum(self.masks.counts(new))) / weights
        return PruningStage(self.completed, sparsity, dict(zip(self.masks.names, pruned, strict=True)))

    def _kept(self, scores: TaskScores, count: int) -> dict[ParameterKey, Tensor]:
        """Mask ``count`` more units of what the tasks reach."""
        try:
            return scores.masks(Budget(count, self._min_keep), self._arbiter, pattern=self._pattern)
        except ValueError as error:
            if not scores.unreached:
                raise
            raise ValueError(
                f"{error}. The amount counts all listed weights, and no task reaches {', '.join(scores.unreached)}: "
                f"pass exclude={[*scores.unreached]!r}, so that it is of the others"
            ) from error

    def unfinished(self) -> str | None:
        """Say how much is still to be masked if the training ends now, and how to get it done."""
        final = count_at(self._amount, self._stop, self._total)
        masked = self._total - self._alive([local(present_mask(key)) for key in self.masks.keys])
        if self._next is None or masked >= final:
            return None
        units = "channels" if isinstance(self._pattern, Channels) else "weights"
        stop = max(1, 3 * self.completed // 4)
        start = f"start_at={stop // 2}, " if self._start > stop else ""
        return (
            f"stop_at: must come before the training ends, found stop_at={self._stop} with {self.completed} optimizer "
            f"steps: {masked / self._total:.1%} of the {units} are masked, of {final / self._total:.1%}; pass e.g. "
            f"{start}stop_at={stop}, or train on"
        )

    def _schedule(self, amount: float | Schedule | None) -> Schedule:
        """Check the amount, and make a schedule of it."""
        if isinstance(self._pattern, NofM):
            self._pattern.check_budget(Budget(min_keep=self._min_keep))
            check_amount_of(self._pattern, amount, self._total)
            return cubic(1 - self._pattern.n / self._pattern.m, self._total, self._start, self._stop)
        if callable(amount):
            check_schedule("amount", amount)
            self._pattern.check_budget(Budget(0, self._min_keep))
            if isinstance(final := amount(self._stop), numbers.Integral):
                refuse_percentage(final, self._total)
            return amount
        self._pattern.check_budget(Budget(amount, self._min_keep))
        assert amount is not None  # the pattern has seen to it
        return cubic(amount, self._total, self._start, self._stop)

    def _missing(self, target: int, alive: Sequence[Tensor], units: int) -> int:
        """Return how many more units are to be masked such that ``target`` are, with ``units`` of them alive."""
        form = self._pattern
        if isinstance(form, NofM):
            final = count_at(self._amount, self._stop, self._total)
            if target > final:
                raise ValueError(
                    f"amount: must be at most {1 - form.n / form.m:.12g} with pattern={form.name!r}, found more"
                )
            if target == final:  # also where a block had fewer than n at first
                return sum(above(mask, form.n, form.m) for mask in alive)
        return target - (self._total - units)

    def _alive(self, masks: Sequence[Tensor]) -> int:
        """Count the units alive."""
        return sum(self._units_alive(self.masks.parameters(), masks))

    def _units_alive(self, parameters: Sequence[Tensor], masks: Sequence[Tensor]) -> list[int]:
        """Count the units alive of each parameter."""
        if isinstance(self._pattern, Channels):
            channels = [
                self._pattern.alive(dataclasses.replace(place, alive=mask))
                for place, mask in zip(self._places, masks, strict=True)
            ]
            return [count_true(alive) for alive in channels if alive is not None]
        return counts_of(parameters, masks)

    def _change(self, batches: Sequence[Batch]) -> PruningStage | None:
        with failing_together():
            count = count_at(self._amount, self.completed, self._total)
        return self.prune_to(count, *batches)

    def _following(self) -> int | None:
        if self.completed >= self._stop:
            return None
        passed = (self.completed - self._start) // self._every
        return min(self._start + (passed + 1) * self._every, self._stop)

    def _needs_batches(self) -> bool:
        return True

    def _own_state(self) -> dict[str, Any]:
        return {"scores": self._scores.state_dict()}

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        self._scores.load_state_dict(state["scores"])
