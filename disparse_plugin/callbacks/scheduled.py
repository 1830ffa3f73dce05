"""Change masks now and then during a fit, by a scheduler of sparse training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from ..maskable import select
from ..parameters import Exclude, ParameterKey, is_masked
from ..scoring.losses import Batch
from ..sparse_training.mask_scheduler import MaskScheduler
from ..sparse_training.schedules import step_of
from .base import Fit, PruningInFit

_WHEN = {"start_at": 0, "stop_at": 1}  # what may be a fraction of the training, and the least step of each


class Scheduled(PruningInFit):
    """Change masks now and then, by a scheduler of :mod:`disparse_plugin.sparse_training` made anew for each fit."""

    def __init__(self, scheduler: Callable[..., MaskScheduler[Any]], options: Mapping[str, Any]) -> None:
        """Take the class of the scheduler and its options."""
        self._make, self._options = scheduler, dict(options)
        self._state: Mapping[str, Any] | None = None
        self._scheduler: MaskScheduler[Any] | None = None
        self._step = 0
        self._batches: list[Batch] = []

    @property
    def keys(self) -> Sequence[ParameterKey]:
        """What the scheduler has masks on."""
        return () if self._scheduler is None else self._scheduler.masks.keys

    def begin(self, fit: Fit, exclude: Exclude) -> None:
        """Make the scheduler for this fit's optimizer, and let it go on from the last one."""
        options = {**self._options, "exclude": exclude, **self._steps(fit)}
        if "exempt" in options:
            inside = dict(fit.model.named_modules())
            options["exempt"] = [inside.get(name, name) for name in options["exempt"]]
        goes_on = self._state is not None or fit.resumed
        masked = any(is_masked(*key) for key in select(fit.model, None, exclude).keys)
        if "distribution" in options and goes_on and masked:
            options.update(distribution="existing", amount=None)
        losses = fit.losses_for(scaled=True)
        scheduler = self._make(fit.model, _only(fit.optimizers), losses, grad_scaler=fit.grad_scaler, **options)
        if self._state is not None:
            scheduler.load_state_dict(self._state)
        self._scheduler = scheduler

    def _steps(self, fit: Fit) -> dict[str, int]:
        """Turn fractions of the training into steps: of the first fit, if this one goes on from it."""
        given = {name: self._options[name] for name in _WHEN if name in self._options}
        steps = {}
        for name, when in given.items():
            if isinstance(when, float) and self._state is not None:
                steps[name] = int(self._state["settings"][name])
            elif isinstance(when, float) and fit.total_steps is None:
                raise ValueError(
                    f"{name}: must be a step (int) when it is not known where the training ends, found {when}; pass "
                    "optimizer steps"
                )
            else:
                steps[name] = step_of(name, when, fit.total_steps, least=_WHEN[name])
        return steps

    def before_training(self, batches: Iterable[Batch], step: int) -> bool:  # noqa: ARG002
        """Note the step, which is restored by now; the scheduler counts by itself."""
        self._step = step
        return False

    def after_batch(self, batch: Batch, step: int) -> bool:
        """Let the scheduler count, and change masks when it is time."""
        assert self._scheduler is not None
        self._batches.append(batch)
        masks = self._scheduler.masks
        report = self._scheduler.step(*self._batches)
        if step != self._step:  # else more batches are accumulated into the same step
            self._step = step
            self._batches.clear()
        return report is not None or masks is not self._scheduler.masks  # the first step may leave some out

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
