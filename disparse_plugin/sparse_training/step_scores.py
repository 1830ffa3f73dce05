"""What each task says of all weights, masked ones included, on the batches of one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from .._support.distributed import on_any_rank
from .._support.user_warning import warn_user
from ..criteria import Criterion
from ..errors import NonFiniteError
from ..scoring.losses import Batch, TaskLosses
from ..scoring.sharded_sums import sums_for
from ..scoring.sums import ScoreSums
from .live_masks import LiveMasks

# How often an update whose half precision gradients overflow is put off, the loss scale halved each time.
PATIENCE = 24


class StepScores:
    """Scores of the masked parameters, from one forward and one backward per task and batch.

    The modules compute with ``mask * weight``, so the gradient with respect to that product is dense: at a masked place
    it tells how the loss of the sparse network would change if the weight came back.

    Attributes:
        tasks: All tasks seen so far, in the order in which they were seen.
    """

    def __init__(
        self,
        model: nn.Module,
        losses: TaskLosses,
        rule: Criterion,
        masks: LiveMasks,
        grad_scaler: GradScaler | None,
        *,
        every_batch: bool,
    ) -> None:
        """Remember what to score.

        Args:
            model: The model, as the caller has it.
            losses: As in :func:`~disparse_plugin.score_tasks`.
            rule: The criterion.
            masks: The masked parameters.
            grad_scaler: Scales the losses, or None.
            every_batch: Whether every batch is expected to have all tasks.
        """
        self._model = model
        self._losses = losses
        self._rule = rule
        self._masks = masks
        self._scaler = grad_scaler if grad_scaler is not None and grad_scaler.is_enabled() else None
        self._every_batch = every_batch
        self._put_off = 0
        self._told: set[str] = set()
        self._heard: dict[str, None] = {}
        self.tasks: tuple[str, ...] = ()

    def on(self, batches: Sequence[Batch]) -> ScoreSums | None:
        """Score on the batches of all ranks; the model is left as it was found.

        Args:
            batches: The batches of this rank.

        Returns:
            The sums; None if a gradient overflowed and it is to be tried again at the next step.

        Raises:
            ValueError: If a loss or a score is not finite (without a ``GradScaler``, or again and again with one), or
                the ranks have different numbers of batches.
            RuntimeError: If another rank has failed.

        Warns:
            UserWarning: If no task reaches a parameter, or no batch has a task that others had; once for each.
        """
        sums = sums_for(self._masks.keys, self._masks.names, self._rule)
        overflow = False
        with sums.together():
            try:
                sums.add_batches(self._model, self._scaled, batches, same_tasks=False)
            except NonFiniteError:
                if self._scaler is None or self._put_off >= PATIENCE:
                    raise
                overflow = True
        if on_any_rank(overflow):
            self._put_off += 1
            return None
        self._put_off = 0
        sums.add_ranks()
        self._warn_of_unreached(sums)
        self._warn_of_missing(sums)
        self.tasks = tuple(dict.fromkeys([*self.tasks, *sums.by_task]))
        return sums

    def _warn_of_unreached(self, sums: ScoreSums) -> None:
        # Where batches miss tasks by turns, what they do not reach now is reached at another time.
        if not self._every_batch and not (self.tasks and sums.by_task.keys() >= set(self.tasks)):
            return
        reached = {index for rows in sums.by_task.values() for index in rows}
        unreached = [name for index, name in enumerate(self._masks.names) if index not in reached]
        if new := [name for name in unreached if name not in self._told]:
            self._told.update(new)
            warn_user(
                f"parameters: {len(unreached)} of {len(self._masks.names)} are reached by no task's loss, and their "
                f"masks stay as they are: {', '.join(new)}; if that is meant, leave them out with exclude=[...]"
            )

    def noted(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Call the losses, and remember which tasks there are: those of the first step may be missing in a stage."""
        losses = self._losses(model, batch)
        if isinstance(losses, Mapping):
            self._heard.update(dict.fromkeys(losses))
        return losses

    def _warn_of_missing(self, sums: ScoreSums) -> None:
        """Say which tasks have no say in a stage that is not made again."""
        known = {**dict.fromkeys(self.tasks), **self._heard}
        missing = [task for task in known if task not in sums.by_task and task not in self._told]
        if self._every_batch and missing:
            self._told.update(missing)
            warn_user(
                f"batches: must hold every task where weights are pruned for good, found none of {', '.join(missing)}: "
                f"{', '.join(sums.by_task)} alone decide; pass one batch of each task to step(*batches)"
            )

    def _scaled(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        losses = self._losses(model, batch)
        if self._scaler is None or not isinstance(losses, Mapping):
            return losses
        scale = self._scaler.get_scale() / 2**self._put_off
        # A loss of 16 bits would overflow that GradScaler, which multiplies by a tensor, scales as one of 32.
        return {
            task: loss.to(torch.promote_types(loss.dtype, torch.float32)) * scale if isinstance(loss, Tensor) else loss
            for task, loss in losses.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the tasks seen and how often the present update was put off."""
        return {"tasks": list(self.tasks), "put_off": self._put_off}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.tasks, self._put_off = tuple(state["tasks"]), int(state["put_off"])


def check_grad_scaler(grad_scaler: object) -> None:
    """Check that there is a ``GradScaler`` or None, before anything is changed.

    Raises:
        TypeError: If it is something else, such as its class.

    Example:
        >>> check_grad_scaler(torch.amp.GradScaler)
        Traceback (most recent call last):
        TypeError: grad_scaler: must be the GradScaler object of the training, or None, found the class GradScaler
    """
    methods = (getattr(grad_scaler, name, None) for name in ("is_enabled", "get_scale"))
    if isinstance(grad_scaler, type) or not (grad_scaler is None or all(map(callable, methods))):
        what = f"the class {grad_scaler.__name__}" if isinstance(grad_scaler, type) else type(grad_scaler).__name__
        raise TypeError(f"grad_scaler: must be the GradScaler object of the training, or None, found {what}")


def check_growth_criterion(rule: Criterion) -> Criterion:
    """Refuse a criterion that gives all masked weights the same score, because they are 0, or has a step after that.

    Layer-adaptive scores are accepted: within a layer, where weights grow, their order is that of the criterion itself.

    Raises:
        ValueError: If it does.

    Example:
        >>> from disparse_plugin.criteria import resolve
        >>> check_growth_criterion(resolve("gradient")).name
        'gradient'
    """
    if rule.finish is not None or (rule.per_layer is not None and not rule.shares):
        raise ValueError(
            f"criterion: must score the weights of a batch, found {rule.name!r}, whose last step on their sum is not "
            "taken where weights grow (damped scores of weights that are 0 are 0); use 'gradient' or 'random'"
        )
    scores = rule.score(torch.zeros(4, device="cpu"), torch.tensor([0.5, -2.0, 1.0, 3.0], device="cpu"))
    if bool((scores == scores.reshape(-1)[0]).all()):
        raise ValueError(
            f"criterion: must tell masked weights apart by their gradient, found {rule.name!r}, which is the same for "
            "all weights that are 0; use 'gradient' or 'random'"
        )
    return rule
