"""What a callback asks of a mode: one object per mode prunes during one ``fit``, and is kept from fit to fit.

Nothing here imports Lightning or transformers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from ..parameters import ParameterKey
from ..scoring.losses import Batch, TaskLosses


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
