"""Prune once during a fit: score, then mask."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .._support.distributed import check_same_tensors
from .._support.user_warning import warn_user
from ..agreement.amounts import count_to_prune
from ..agreement.budgets import Budget
from ..agreement.patterns import NofM, Pattern
from ..arbiters import Arbiter
from ..criteria import Criterion
from ..maskable import select
from ..masks.in_place import attach_in_place
from ..parameters import Exclude, ParameterKey, is_masked
from ..scoring.losses import Batch
from ..scoring.score import score_tasks
from ..scoring.task_scores import TaskScores
from ..sparse_training.schedules import step_of
from .base import Fit, PruningInFit


class OneShot(PruningInFit):
    """Score once, prune once: before the first step, or after step ``start_at``."""

    def __init__(
        self,
        amount: float | None,
        criterion: Criterion,
        arbiter: str | Arbiter,
        pattern: Pattern,
        *,
        min_keep: float = 0,
        num_batches: int = 16,
        start_at: float = 0,
    ) -> None:
        """Take the options, checked; see :class:`disparse_plugin.lightning.DiSparsePruning`."""
        self._amount, self._criterion, self._arbiter, self._min_keep = amount, criterion, arbiter, min_keep
        self._pattern = pattern
        self._count, self._when, self._start = num_batches, start_at, 0
        self._done = False
        self._steps: int | None = None  # those of earlier fits included; a trainer may count each by itself
        self._begun = 0  # of these, those before this fit
        self._earlier = 0  # how many more these are than the trainer says
        self._fit: Fit | None = None
        self._keys: Sequence[ParameterKey] = ()
        self._exclude: Exclude = ()
        self._skipped: list[str] = []
        self._recent: deque[Batch] = deque(maxlen=self._count)

    @property
    def keys(self) -> Sequence[ParameterKey]:
        """What is scored."""
        return self._keys

    def begin(self, fit: Fit, exclude: Exclude) -> None:
        """Start a fit."""
        self._fit, self._exclude = fit, [*exclude, *self._skipped] if self._skipped else exclude
        self._keys = select(fit.model, None, self._exclude).keys
        if isinstance(self._when, float) and fit.total_steps is None:
            raise ValueError(
                f"start_at: must be a step (int) when it is not known where the training ends, found {self._when}; "
                "pass optimizer steps"
            )
        self._start = step_of("start_at", self._when, fit.total_steps, least=0)
        if fit.resumed and any(is_masked(*key) for key in self._keys):
            self._done = True  # a checkpoint of a pruned model, whoever wrote it, is not pruned once more

    def before_training(self, batches: Iterable[Batch], step: int) -> bool:
        """Prune, if it is time already."""
        self._earlier = 0 if self._steps is None else self._steps - step
        self._steps = self._begun = step + self._earlier
        return not self._done and self._steps >= self._start and self._prune(batches)

    def after_batch(self, batch: Batch, step: int) -> bool:
        """Prune, if it is time."""
        assert self._fit is not None
        self._steps = step + self._earlier
        if self._done:
            return False
        if self._fit.draws:
            return self._steps >= self._start and self._prune([batch])
        # A second pass over the data would disturb the loader that is being read, so the last batches are kept.
        if self._steps + self._count >= self._start:
            self._recent.append(batch)
        return self._steps >= self._start and self._prune_on_recent()

    def _prune_on_recent(self) -> bool:
        """Prune on the last batches, and say if there are fewer than in a fit that had begun earlier."""
        found = len(self._recent)
        if found < self._count and self._begun > 0:
            last = max(0, self._start - self._count)
            warn_user(
                f"num_batches: must have passed in this fit when start_at comes, found {found} of {self._count}: it "
                f"began at step {self._begun} of {self._start}, and no checkpoint holds batches; the masks are of "
                f"these {found}, not those of one long fit, for which resume from step {last} at the latest"
            )
        return self._prune(list(self._recent), found)

    def _prune(self, batches: Iterable[Batch], count: int | None = None) -> bool:
        assert self._fit is not None
        scores = score_tasks(
            self._fit.model,
            self._fit.losses_for(scaled=False),
            batches,
            criterion=self._criterion,
            exclude=self._exclude,
            num_batches=self._count if count is None else count,
            cycle=True,
        )
        if masks := self._masks(scores):
            check_same_tensors("masks", list(masks.values()), "keep the weights of all ranks equal")
            attach_in_place(self._fit.model, masks)
        self._keys, self._skipped = scores.parameters, list(scores.skipped)
        self._done = True
        self._recent.clear()
        return True

    def _masks(self, scores: TaskScores) -> dict[ParameterKey, Tensor]:
        """Choose what goes besides what is masked already; nothing if that is as much as was asked for, or more.

        The amount of a callback is one of all weights, that of a one-shot call is one of those alive.
        """
        places, form = scores.places(), self._pattern
        # n:m says by itself what goes, and takes nothing from a block that has no more than n.
        if isinstance(form, NofM) or all(place.alive is None for place in places):
            return scores.masks(self._amount, self._arbiter, min_keep=self._min_keep, pattern=form)
        assert self._amount is not None  # the pattern has seen to it
        total, alive = sum(map(form.sizes, places)), sum(scores.candidates(form, places).sizes)
        missing = count_to_prune(self._amount, total) - (total - alive)
        if missing <= 0:
            return {}
        return scores.masks(Budget(missing, self._min_keep), self._arbiter, pattern=form)

    def unfinished(self, step: int) -> str | None:
        """Say that the time to prune has not come."""
        if self._done:
            return None
        steps = step + self._earlier
        return (
            f"start_at: must be a step of the training, found {self._start} with {steps} optimizer steps: nothing was "
            f"pruned; pass a start_at below {steps}, or go on with another fit"
        )

    def end(self) -> None:
        """Let go of the fit and of what was gathered."""
        self._fit, self._keys = None, ()
        self._recent.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return whether the model has been pruned, what of it could not be, and how many steps it was trained."""
        return {"done": self._done, "skipped": self._skipped, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over whether the model has been pruned, and the steps."""
        self._done = bool(state["done"])
        self._skipped, self._steps = list(state.get("skipped", ())), state.get("steps")  # older states have none
