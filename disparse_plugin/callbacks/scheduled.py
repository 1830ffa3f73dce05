"""Change masks now and then during a fit, by a scheduler of sparse training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from ..parameters import ParameterKey, is_masked
from ..scoring.losses import Batch
from ..sparse_training.mask_scheduler import MaskScheduler
from .base import Fit, PruningInFit

# The share of a training after which masks stay as they are, where nothing else is said; as in RigL and DiSparse.
STOP_AFTER = 0.75


class Scheduled(PruningInFit):
    """Change masks now and then, by a scheduler of :mod:`disparse_plugin.sparse_training` made anew for each fit."""

    def __init__(self, scheduler: Callable[..., MaskScheduler[Any]], options: Mapping[str, Any]) -> None:
        """Take the class of the scheduler and its options; ``stop_at`` may be missing."""
        self._make, self._options = scheduler, dict(options)
        self._state: Mapping[str, Any] | None = None
        self._scheduler: MaskScheduler[Any] | None = None
        self._step = 0
        self._batches: list[Batch] = []

    def begin(self, fit: Fit, keys: Sequence[ParameterKey]) -> None:
        """Make the scheduler for this fit's optimizer, and let it go on from the last one."""
        options = {**self._options, "parameters": keys, "stop_at": self._stop_at(fit)}
        if "exempt" in options:
            inside = dict(fit.model.named_modules())
            options["exempt"] = [inside.get(name, name) for name in options["exempt"]]
        goes_on = self._state is not None or fit.resumed
        if "distribution" in options and goes_on and any(is_masked(*key) for key in keys):
            options.update(distribution="existing", amount=None)
        losses = fit.losses_for(scaled=True)
        scheduler = self._make(fit.model, _only(fit.optimizers), losses, grad_scaler=fit.grad_scaler, **options)
        if self._state is not None:
            scheduler.load_state_dict(self._state)
        self._scheduler = scheduler

    def _stop_at(self, fit: Fit) -> int:
        if "stop_at" in self._options:
            return int(self._options["stop_at"])
        if self._state is not None:
            return int(self._state["settings"]["stop_at"])
        if fit.total_steps is None:
            raise ValueError(
                "stop_at: must be given when it is not known where the training ends, found None; pass optimizer steps"
            )
        return max(1, int(STOP_AFTER * fit.total_steps))

    def before_training(self, batches: Iterable[Batch], step: int) -> bool:  # noqa: ARG002
        """Note the step, which is restored by now; the scheduler counts by itself."""
        self._step = step
        return False

    def after_batch(self, batch: Batch, step: int) -> bool:
        """Let the scheduler count, and change masks when it is time."""
        assert self._scheduler is not None
        self._batches.append(batch)
        report = self._scheduler.step(*self._batches)
        if step != self._step:  # else more batches are accumulated into the same step
            self._step = step
            self._batches.clear()
        return report is not None

    def unfinished(self, step: int) -> str | None:  # noqa: ARG002
        """Say what the scheduler still had to do."""
        return None if self._scheduler is None else self._scheduler.unfinished()

    def end(self) -> None:
        """Keep the scheduler's state only."""
        self._state = self.state_dict()["scheduler"]
        self._scheduler, self._step = None, 0
        self._batches.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the scheduler's state."""
        return {"scheduler": self._state if self._scheduler is None else self._scheduler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give the next scheduler this state."""
        self._state, self._scheduler = state["scheduler"], None


def _only(optimizers: Sequence[Optimizer]) -> Optimizer:
    if len(optimizers) != 1:
        raise ValueError(
            f"optimizers: gradual and dynamic pruning need exactly one, found {len(optimizers)}; use one optimizer "
            "with several parameter groups, or mode='static' or 'pretrained'"
        )
    return optimizers[0]
