"""Counting the steps of an optimizer that really were taken."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from .._support.user_warning import warn_user

# Calls in a row without an optimizer step before it is said that something is not connected.
PATIENCE = 1000


class CompletedSteps:
    """Steps of an optimizer since they were last taken; those that a ``GradScaler`` skipped do not count.

    A ``GradScaler`` that found an infinite gradient does not call ``step``; only with fused optimizers it does, and
    tells them through ``optimizer.found_inf``.

    Example:
        >>> import torch
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> steps = CompletedSteps(sgd)
        >>> sgd.step(); sgd.step(); steps.take(), steps.take()
        (2, 0)
    """

    def __init__(self, optimizer: Optimizer) -> None:
        """Start counting from now.

        Args:
            optimizer: The optimizer.
        """
        self.waiting = 0
        self._idle = 0
        self._counts = True
        self._optimizer = optimizer
        self._handle = optimizer.register_step_post_hook(self._count)

    def __getstate__(self) -> dict[str, Any]:
        """Return all but the hook, which no copy of an optimizer has."""
        return {name: value for name, value in vars(self).items() if name != "_handle"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Go on counting, the steps of the optimizer that was copied along."""
        vars(self).update(state)
        self._handle = self._optimizer.register_step_post_hook(self._count)
        if not self._counts:
            self._handle.remove()

    def stop(self) -> bool:
        """Count no more; tell whether that is new."""
        self._handle.remove()
        counted, self._counts = self._counts, False
        return counted

    def _count(self, optimizer: Optimizer, *_: Any) -> None:
        skipped = getattr(optimizer, "found_inf", None)
        if skipped is None or not bool(skipped):
            self.waiting += 1

    def take(self) -> int:
        """Return the number of steps since the last call.

        Warns:
            UserWarning: After many calls in a row without a step: probably another optimizer is stepped.
        """
        steps, self.waiting = self.waiting, 0
        self._idle = 0 if steps else self._idle + 1
        if self._idle == PATIENCE:
            warn_user(
                f"optimizer: must be the one whose step() trains the model, found no step of it in {PATIENCE} calls; "
                "pass the inner torch.optim.Optimizer of a wrapper, and for another optimizer make another scheduler"
            )
        return steps
