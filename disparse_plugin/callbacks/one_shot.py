"""Prune once during a fit: score, then mask.

Nothing here imports Lightning or transformers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from .._support.distributed import check_same_tensors
from ..arbiters import Arbiter
from ..criteria import Criterion
from ..masks.in_place import attach_in_place
from ..parameters import ParameterKey, is_masked
from ..scoring.losses import Batch, TaskLosses
from ..scoring.score import score_tasks
from ..sparse_training.schedules import check_steps
from .base import LossesFor, PruningInFit


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
