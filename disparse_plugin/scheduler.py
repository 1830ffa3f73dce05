"""Dynamic sparse training: drop the smallest weights, grow those that a task strongly asks for, at a constant count."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from . import arbiters
from .arbiters import Arbiter
from .completed_steps import CompletedSteps
from .criteria import Criterion, ScoreFunction, resolve
from .distributed import check_same, check_same_tensors, failing_together
from .gradients import Batch, TaskLosses
from .growth import Exchange, random_scores
from .growth_scores import GrowthScores, check_growth_criterion
from .initial_masks import initial_masks
from .live_masks import LiveMasks
from .parameters import ParameterKey, check_parameters, qualified_names, unwrap
from .schedules import CosineDecay, Schedule, check_steps, checked, describe

RANDOM = "random"


@dataclasses.dataclass(frozen=True)
class MaskUpdate:
    """What one update did.

    Attributes:
        step: The number of completed optimizer steps.
        drop_fraction: The share of each layer's alive weights that was to be exchanged.
        exchanged: For each layer, how many weights were dropped, and as many grown.
    """

    step: int
    drop_fraction: float
    exchanged: Mapping[str, int]


class DiSparseScheduler:
    """Train a sparse network and let it move its weights to where any task wants them (DiSparse dynamic).

    Every ``update_every`` optimizer steps, in each layer l with ``a_l`` alive of ``n_l`` weights::

        k_l     = min(round(f_t * a_l), n_l - a_l)       f_t = drop_fraction / 2 * (1 + cos(pi * t / stop_at))
        dropped = the k_l alive weights with the smallest abs(w)
        grown   = the k_l masked weights with the highest arbiter over tasks of percentile of abs(dL_task/dw)

    The gradients are those of the sparse network that is trained, on the batch of the step, from one forward and one
    backward per task; the percentiles of a task are among the layer's masked weights. Weights that are dropped in an
    update cannot grow in it. The number of alive weights of each layer never changes. (Sun et al., CVPR 2022, dynamic
    setting; Evci et al., ICML 2020, for one task.)

    Masks, weights and optimizer moments change in place: modules, Parameters, the optimizer, wrappers and compiled
    graphs stay. Masked weights are exactly 0 and stay so; regrown ones start at 0 with fresh moments.

    Special cases: ``joint(losses)`` in place of ``losses`` is RigL, ``criterion="random"`` is SET, ``drop_fraction=0``
    is static sparse training.

    Under ``torch.distributed``, make it and call :meth:`step` on every rank; the ranks' scores are added up and all
    make the same masks. An EMA (``AveragedModel``) is to be made after the scheduler and before the next forward.

    Attributes:
        completed: Number of completed optimizer steps.
        masks: The masks, with ``keys`` and ``names`` of the masked parameters.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> def losses(model, x):
        ...     out = model(x)
        ...     return {"a": out[:, 0].square().mean(), "b": (out[:, 1] - 1).square().mean()}
        >>> scheduler = DiSparseScheduler(net, optimizer, losses, amount=0.75, update_every=2, stop_at=8)
        >>> for _ in range(4):
        ...     batch = torch.randn(32, 8)
        ...     optimizer.zero_grad()
        ...     sum(losses(net, batch).values()).backward()
        ...     optimizer.step()
        ...     update = scheduler.step(batch)
        >>> update.step, sum(int(layer.weight_mask.sum()) for layer in (net[0], net[2]))
        (4, 40)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        losses: TaskLosses,
        *,
        amount: float | None = None,
        distribution: str | Mapping[ParameterKey | str, float] = "erk",
        drop_fraction: float | Schedule = 0.5,
        update_every: int = 100,
        stop_at: int,
        criterion: str | Criterion | ScoreFunction = "gradient",
        arbiter: str | Arbiter = "unanimous",
        parameters: Iterable[ParameterKey] | None = None,
        exempt: Iterable[nn.Module | str] = (),
        regrow_dropped: bool = False,
        grad_scaler: GradScaler | None = None,
        seed: int = 0,
    ) -> None:
        """Mask the model.

        Args:
            model: The model, dense or (with ``distribution="existing"``) pruned; wrappers are looked through.
            optimizer: What trains it; of a kind in :mod:`disparse_plugin.optimizer_state`.
            losses: ``losses(model, batch)`` runs the model once and returns one scalar loss per task. Batches may miss
                tasks; a layer that no task of an update reaches stays as it is.
            amount: How much of the weights is pruned: a fraction (float) or a count (int).
            distribution: ``"erk"``, ``"uniform"``, densities by pair or qualified name (layers without one share what
                is left by ERK), or ``"existing"`` for the masks that are on the model; see
                :mod:`disparse_plugin.densities`. Which weights of a layer stay at first is random.
            drop_fraction: The share to exchange at step 0, decaying by a cosine; or a function of the step.
            update_every: Optimizer steps between updates.
            stop_at: No update from this step on; three quarters of the training is usual.
            criterion: What a task asks for: a criterion that tells masked weights apart by their gradient, or
                ``"random"``.
            arbiter: How the tasks' wishes are joined.
            parameters: ``(module, name)`` pairs; by default :func:`~disparse_plugin.prunable_parameters`.
            exempt: Modules or qualified names that stay dense and count in the total.
            regrow_dropped: Whether a weight may be grown in the update that drops it, as in RigL's own code.
            grad_scaler: Scale the losses as training does, so that half precision gradients neither vanish nor
                overflow; an update whose gradients overflow is put off to the next step.
            seed: For the first masks and ``criterion="random"``.

        Raises:
            TypeError: If an argument is of the wrong type, or the optimizer is not known.
            ValueError: If a value is out of range or does not fit the model. The model is as before.
        """
        root = unwrap(model)
        self._generator = torch.Generator().manual_seed(seed)
        with failing_together():
            self._every, self._stop = check_steps("update_every", update_every), check_steps("stop_at", stop_at)
            self._fraction: Schedule = drop_fraction if callable(drop_fraction) else CosineDecay(drop_fraction, stop_at)
            self._arbiter, self._regrow = arbiters.resolve(arbiter), regrow_dropped
            rule = None if criterion == RANDOM else check_growth_criterion(resolve(criterion))
            keys = check_parameters(root, parameters)
            first = initial_masks(keys, qualified_names(root, keys), amount, distribution, exempt, self._generator)
            self._settings = {
                "alive": [int(mask.sum()) for mask in first.values()],
                "update_every": update_every,
                "stop_at": stop_at,
                "drop_fraction": describe(drop_fraction),
                "criterion": RANDOM if rule is None else rule.name,
                "arbiter": describe(arbiter),
                "regrow_dropped": regrow_dropped,
            }
        check_same("settings", self._settings, "give all ranks the same options")
        self.masks = LiveMasks(root, optimizer, {keys[index]: mask for index, mask in first.items()})
        self._growth = None if rule is None else GrowthScores(model, losses, rule, self.masks, grad_scaler)
        self._steps = CompletedSteps(optimizer)
        self.completed = 0
        self._next = update_every

    def step(self, *batches: Batch) -> MaskUpdate | None:
        """Call once after every optimizer step; updates the masks when it is time.

        A call without an optimizer step since the last one (a step that ``GradScaler`` skipped, a micro-batch of an
        accumulated step) does nothing.

        Args:
            *batches: The batch of the step; several if its gradient was accumulated over several. They are passed to
                ``losses`` one by one, and their scores are added up.

        Returns:
            What was done, or None if it was not time.

        Raises:
            TypeError: If there is no batch.
            ValueError: If a loss or a gradient is not finite, or something else changed the masks. The model is as
                before.
            RuntimeError: If another rank has failed.
        """
        if self._growth is not None and not batches:
            raise TypeError("batch: step() needs the batch of the optimizer step, found none; call step(batch)")
        done = self._steps.take()
        if done and not self.completed:
            self.masks.check_used()
        self.completed += done
        if not done or self.completed < self._next or self.completed >= self._stop:
            return None
        return self._update(batches)

    def _update(self, batches: Sequence[Batch]) -> MaskUpdate | None:
        with failing_together():
            fraction = checked(self._fraction, self.completed, "drop_fraction")
            alive = self.masks.current()
        tasks = () if self._growth is None else self._growth.tasks
        exchange = Exchange(fraction, self._arbiter, tasks, self._regrow)
        new = alive
        if any(exchange.count(mask) for mask in alive):
            scores = self._scores(batches, alive)
            if scores is None:
                return None
            tasks = (RANDOM,) if self._growth is None else self._growth.tasks
            exchange = dataclasses.replace(exchange, tasks=tasks)
            with failing_together():
                weights = self.masks.parameters()
                new = [exchange.new_mask(*layer) for layer in zip(weights, alive, scores, strict=True)]
            check_same_tensors("masks", new, "keep the weights of all ranks equal (DistributedDataParallel does)")
            self.masks.rewrite(new)
        self._next = (self.completed // self._every + 1) * self._every
        exchanged = [int((after & ~before).sum()) for before, after in zip(alive, new, strict=True)]
        return MaskUpdate(self.completed, fraction, dict(zip(self.masks.names, exchanged, strict=True)))

    def _scores(self, batches: Sequence[Batch], alive: Sequence[Tensor]) -> Sequence[Mapping[str, Tensor]] | None:
        if self._growth is None:
            return random_scores(alive, self._generator)
        return self._growth.on(batches)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that decides how the run goes on: step, masks (as bits), random state, settings.

        Save it together with the states of the model and the optimizer; see
        :func:`disparse_plugin.sparse_training.save_checkpoint`.

        Returns:
            A dict of tensors and plain values that ``torch.load(weights_only=True)`` reads.
        """
        return {
            "completed": self.completed,
            "waiting": self._steps.waiting,
            "next": self._next,
            "masks": self.masks.packed(),
            "generator": self._generator.get_state(),
            "growth": {} if self._growth is None else self._growth.state_dict(),
            "settings": dict(self._settings),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of a scheduler with the same options for the same model.

        Build the model, the optimizer and the scheduler first; then load the three states, in any order.

        Args:
            state: What :meth:`state_dict` returned.

        Raises:
            KeyError: If it is not a state of this class.
            ValueError: If the options or the model differ. Nothing is changed.
        """
        different = [
            f"{option} {value!r} (saved: {state['settings'].get(option)!r})"
            for option, value in self._settings.items()
            if state["settings"].get(option) != value
        ]
        if different:
            raise ValueError(
                f"state_dict: must be of a scheduler with the same options, found other {', '.join(different)}; build "
                "the scheduler as it was built"
            )
        masks = self.masks.unpacked(state["masks"])
        self._generator.set_state(state["generator"].cpu())
        if self._growth is not None:
            self._growth.load_state_dict(state["growth"])
        self.masks.restore(masks)
        self.completed, self._next = int(state["completed"]), int(state["next"])
        self._steps.waiting = int(state["waiting"])
