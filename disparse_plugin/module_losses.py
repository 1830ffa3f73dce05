"""The one method that a LightningModule needs: its losses task by task, as the core calls them. No Lightning here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from .scoring.losses import Batch, TaskLosses

METHOD = "task_losses"


def check_has_task_losses(model: nn.Module) -> None:
    """Check that a LightningModule tells its losses task by task.

    Raises:
        TypeError: If it does not.
    """
    if not callable(getattr(model, METHOD, None)):
        raise TypeError(
            f"model: must have a method {METHOD}(batch) that runs it once and returns one scalar loss per task, found "
            f"none in {type(model).__name__}; add e.g. def {METHOD}(self, batch): return {{'depth': ..., 'mask': ...}} "
            f"and use sum(self.{METHOD}(batch).values()) in training_step"
        )


def task_losses_in(trainer: Any, model: Any, *, scaled: bool) -> TaskLosses:
    """Make of ``model.task_losses`` what the core calls: in the precision of the training, and without logging.

    Args:
        trainer: The trainer.
        model: The LightningModule.
        scaled: Whether the caller scales the losses as a ``GradScaler`` does. Without, half precision gradients could
            vanish, so where training scales, full precision is used.
    """
    precision = trainer.precision_plugin
    context = precision.train_step_context
    if not scaled and getattr(precision, "scaler", None) is not None:
        context = contextlib.nullcontext

    def losses(_: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        with _not_logging(model), context():
            found: Mapping[str, Tensor] = getattr(model, METHOD)(batch)
        return found

    return losses


@contextlib.contextmanager
def _not_logging(model: nn.Module) -> Iterator[None]:
    """Let ``self.log`` do nothing: what is computed for scoring is no result of a training step."""
    vars(model)["log"] = lambda *_, **__: None
    try:
        yield
    finally:
        del vars(model)["log"]
