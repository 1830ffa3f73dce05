"""How each mode of the callbacks prunes during one ``fit``; one object per mode, kept from fit to fit.

Nothing here imports Lightning or transformers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from .._support.distributed import check_same_tensors
from ..arbiters import Arbiter
from ..criteria import Criterion
from ..masks.in_place import attach_in_place
from ..parameters import ParameterKey, is_masked
from ..scoring.losses import Batch, TaskLosses
from ..scoring.score import score_tasks
from ..sparse_training.mask_scheduler import MaskScheduler
from ..sparse_training.schedules import check_steps

# The share of a training after which masks stay as they are, where nothing else is said; as in RigL and DiSparse.
STOP_AFTER = 0.75


class LossesFor(Protocol):
    """Makes the losses per task as the core calls them, in the precision of the training."""

    def __call__(self, *, scaled: bool) -> TaskLosses:
        """Return them; ``scaled`` tells whether the caller scales them as a ``GradScaler`` does."""


class PruningInFit(ABC):
    """What a callback asks of a mode."""

    @abstractmethod
    def begin(self, trainer: Any, model: nn.Module, keys: Sequence[ParameterKey], losses_for: LossesFor) -> None:
        """Start a fit: weights and masks are loaded, optimizers exist; their states may be loaded later.

        Args:
            trainer: Lightning's, or an object with the same ``ckpt_path`` (None unless the fit goes on from a
                checkpoint), ``global_step``, ``estimated_stepping_batches``, ``optimizers`` and
                ``precision_plugin.scaler``; read during the whole fit.
            model: What is pruned, unwrapped.
            keys: The parameters that may be pruned.
            losses_for: Makes the losses.
        """

    @abstractmethod
    def before_training(self, batches: Iterable[Batch]) -> bool:
        """Act before the first step; ``batches`` can be read over again. Tells whether masks changed."""

    @abstractmethod
    def after_batch(self, batch: Batch) -> bool:
        """Act after a training batch. Tells whether masks changed."""

    @abstractmethod
    def end(self) -> None:
        """Let go of the trainer, and keep what the next fit needs."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values from which a later fit goes on."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state at the next :meth:`begin`."""


class OneShot(PruningInFit):
    """Score once, prune once: before the first step, or after step ``start_at``."""

    def __init__(
        self,
        amount: float,
        criterion: Criterion,
        arbiter: str | Arbiter,
        *,
        min_keep: float = 0,
        num_batches: int = 16,
        start_at: int = 0,
    ) -> None:
        """Take the options; see :class:`disparse_plugin.lightning.DiSparsePruning`."""
        self._amount, self._criterion, self._arbiter, self._min_keep = amount, criterion, arbiter, min_keep
        self._count = check_steps("num_batches", num_batches)
        self._start = start_at and check_steps("start_at", start_at)
        self._done = False
        self._trainer: Any = None
        self._model: nn.Module | None = None
        self._losses: TaskLosses | None = None
        self._keys: Sequence[ParameterKey] = ()
        self._recent: deque[Batch] = deque(maxlen=self._count)

    def begin(self, trainer: Any, model: nn.Module, keys: Sequence[ParameterKey], losses_for: LossesFor) -> None:
        """Start a fit."""
        self._trainer, self._model, self._keys = trainer, model, keys
        self._losses = losses_for(scaled=False)
        if trainer.ckpt_path is not None and any(is_masked(*key) for key in keys):
            self._done = True  # a checkpoint of a pruned model, whoever wrote it, is not pruned once more

    def before_training(self, batches: Iterable[Batch]) -> bool:
        """Prune, if it is time already."""
        if self._done or self._trainer.global_step < self._start:
            return False
        return self._prune(batches)

    def after_batch(self, batch: Batch) -> bool:
        """Prune, if it is time."""
        # A second pass over the data would disturb the loader that is being read, so the last batches are kept.
        if self._done:
            return False
        if self._trainer.global_step + self._count >= self._start:
            self._recent.append(batch)
        return self._trainer.global_step >= self._start and self._prune(list(self._recent))

    def _prune(self, batches: Iterable[Batch]) -> bool:
        assert self._model is not None
        assert self._losses is not None
        scores = score_tasks(
            self._model,
            self._losses,
            batches,
            criterion=self._criterion,
            parameters=self._keys,
            num_batches=self._count,
            cycle=True,
        )
        masks = scores.masks(self._amount, self._arbiter, min_keep=self._min_keep)
        check_same_tensors("masks", list(masks.values()), "keep the weights of all ranks equal")
        attach_in_place(self._model, masks)
        self._done = True
        self._recent.clear()
        return True

    def end(self) -> None:
        """Let go of the trainer and of what was gathered."""
        self._trainer, self._model, self._losses, self._keys = None, None, None, ()
        self._recent.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return whether the model has been pruned."""
        return {"done": self._done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over whether the model has been pruned."""
        self._done = bool(state["done"])


class Scheduled(PruningInFit):
    """Change masks now and then, by a scheduler of :mod:`disparse_plugin.sparse_training` made anew for each fit."""

    def __init__(self, scheduler: Callable[..., MaskScheduler[Any]], options: Mapping[str, Any]) -> None:
        """Take the class of the scheduler and its options; ``stop_at`` may be missing."""
        self._make, self._options = scheduler, dict(options)
        self._state: Mapping[str, Any] | None = None
        self._scheduler: MaskScheduler[Any] | None = None
        self._trainer: Any = None
        self._step = 0
        self._batches: list[Batch] = []

    def begin(self, trainer: Any, model: nn.Module, keys: Sequence[ParameterKey], losses_for: LossesFor) -> None:
        """Make the scheduler for this fit's optimizer, and let it go on from the last one."""
        self._trainer = trainer
        options = {**self._options, "parameters": keys, "stop_at": self._stop_at(trainer)}
        if "exempt" in options:
            inside = dict(model.named_modules())
            options["exempt"] = [inside.get(name, name) for name in options["exempt"]]
        goes_on = self._state is not None or trainer.ckpt_path is not None
        if "distribution" in options and goes_on and any(is_masked(*key) for key in keys):
            options.update(distribution="existing", amount=None)
        scheduler = self._make(
            model,
            _only_optimizer(trainer.optimizers),
            losses_for(scaled=True),
            grad_scaler=getattr(trainer.precision_plugin, "scaler", None),
            **options,
        )
        if self._state is not None:
            scheduler.load_state_dict(self._state)
        self._scheduler = scheduler

    def _stop_at(self, trainer: Any) -> int:
        if "stop_at" in self._options:
            return int(self._options["stop_at"])
        if self._state is not None:
            return int(self._state["settings"]["stop_at"])
        steps = trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("stop_at: must be given when the training has no end, found None; pass optimizer steps")
        return max(1, int(STOP_AFTER * steps))

    def before_training(self, batches: Iterable[Batch]) -> bool:  # noqa: ARG002
        """Note the trainer's step, which is restored by now; the scheduler counts by itself."""
        self._step = self._trainer.global_step
        return False

    def after_batch(self, batch: Batch) -> bool:
        """Let the scheduler count, and change masks when it is time."""
        assert self._scheduler is not None
        self._batches.append(batch)
        report = self._scheduler.step(*self._batches)
        if self._trainer.global_step != self._step:  # else more batches are accumulated into the same step
            self._step = self._trainer.global_step
            self._batches.clear()
        return report is not None

    def end(self) -> None:
        """Keep the scheduler's state only."""
        self._state = self.state_dict()["scheduler"]
        self._scheduler, self._trainer, self._step = None, None, 0
        self._batches.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the scheduler's state."""
        return {"scheduler": self._state if self._scheduler is None else self._scheduler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give the next scheduler this state."""
        self._state, self._scheduler = state["scheduler"], None


def _only_optimizer(optimizers: Sequence[Any]) -> Any:
    if len(optimizers) != 1:
        raise ValueError(
            f"optimizers: gradual and dynamic pruning need exactly one, found {len(optimizers)}; use one optimizer "
            "with several parameter groups, or mode='static' or 'pretrained'"
        )
    return optimizers[0]
