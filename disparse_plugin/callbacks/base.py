"""What a mode is told of a training, and what a callback asks of a mode. No trainer is known here."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from ..parameters import Exclude, ParameterKey
from ..scoring.losses import Batch, TaskLosses


class LossesFor(Protocol):
    """Makes the losses per task as the core calls them, in the precision of the training."""

    def __call__(self, *, scaled: bool) -> TaskLosses:
        """Return them; ``scaled`` tells whether the caller scales them as a ``GradScaler`` does."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """What a mode has to know of one training; every trainer's callback fills it in.

    Attributes:
        model: What is pruned, unwrapped.
        losses_for: Makes the losses.
        optimizers: The optimizers of torch; their states may be loaded later.
        grad_scaler: What scales the losses, or None.
        resumed: Whether the training goes on from a checkpoint.
        draws: Whether a batch that the mode is given stands for as many, drawn at random, as are scored on.
        total_steps: At how many optimizer steps it ends, those before a checkpoint included; None where that is not
            known.
    """

    model: nn.Module
    losses_for: LossesFor
    optimizers: Sequence[Optimizer]
    grad_scaler: GradScaler | None
    resumed: bool
    draws: bool
    total_steps: int | None


class PruningInFit(ABC):
    """How one mode prunes during one ``fit``; an object is kept from fit to fit."""

    @property
    @abstractmethod
    def keys(self) -> Sequence[ParameterKey]:
        """The parameters that are pruned, as far as is known; none outside a fit."""

    @abstractmethod
    def begin(self, fit: Fit, exclude: Exclude) -> None:
        """Start a fit: weights and masks are loaded, optimizers exist.

        Args:
            fit: The training.
            exclude: What the user leaves out.
        """

    @abstractmethod
    def before_training(self, batches: Iterable[Batch], step: int) -> bool:
        """Act before the first step.

        Args:
            batches: The training data; can be read over again.
            step: The number of optimizer steps so far: 0, or that of the checkpoint.

        Returns:
            Whether masks changed.
        """

    @abstractmethod
    def after_batch(self, batch: Batch, step: int) -> bool:
        """Act after a training batch.

        Args:
            batch: The batch.
            step: The number of optimizer steps so far.

        Returns:
            Whether masks changed.
        """

    @abstractmethod
    def unfinished(self, step: int) -> str | None:
        """Say what is still to be done when a fit has ended after ``step`` steps, and how to get it done, or None."""

    @abstractmethod
    def end(self) -> None:
        """Let go of the fit, and keep what the next one needs."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values from which a later fit goes on."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state at the next :meth:`begin`."""
