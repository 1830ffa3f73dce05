"""What schedulers of masks share: counting optimizer steps, knowing when it is time, and going on after a stop."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from .._support.distributed import failing_together, gathered, numbers_of_ranks
from ..kinds import check_kind
from ..maskable import Obstacle, refusal, warn_of_skipped
from ..scoring.losses import Batch, TaskLosses
from ..scoring.uses import computed_instead
from .completed_steps import CompletedSteps
from .live_masks import LiveMasks

_Report = TypeVar("_Report")


def given(here: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a method was called with: of its ``locals()``, as long as there are no others."""
    return {name: value for name, value in here.items() if name not in ("self", "__class__")}


class MaskScheduler(ABC, Generic[_Report]):
    """Change masks every so many completed optimizer steps.

    Attributes:
        completed: Number of completed optimizer steps.
        masks: The masks, with ``keys`` and ``names`` of the masked parameters.
        skipped: What is left out because it cannot be masked: qualified name to reason. The first step may add to it.
    """

    def __init__(
        self,
        model: nn.Module,
        losses: TaskLosses,
        masks: LiveMasks,
        optimizer: Optimizer,
        settings: Mapping[str, Any],
        first: int | None,
        *,
        skipped: Mapping[str, str],
        begin_again: Callable[[Sequence[str]], None] | None,
    ) -> None:
        """Start counting.

        Args:
            model: The model, as the caller has it.
            losses: As in :func:`~disparse_plugin.score_tasks`.
            masks: The masks.
            optimizer: Whose steps count.
            settings: Everything that a run must have in common with the one that it goes on from; plain values.
            first: The step of the first change, or None if there is none.
            skipped: What is left out so far, with the reason.
            begin_again: Makes this object anew, leaving out some names besides what was excluded; None if nothing may
                be left out. Needs ``revocable`` masks.
        """
        self._model, self._losses = model, losses
        self.masks = masks
        self.skipped = dict(skipped)
        self.completed = 0
        self._next = first
        self._settings = dict(settings)
        self._steps = CompletedSteps(optimizer)
        self._begin_again = begin_again  # until a step has shown what can be masked
        self._settled = False
        self._left_out: dict[str, str] = {}  # what it has begun again without

    def step(self, *batches: Batch) -> _Report | None:
        """Call once after every optimizer step; changes the masks when it is time.

        A call without an optimizer step since the last one (a step that ``GradScaler`` skipped, a micro-batch of an
        accumulated step) does nothing.

        Args:
            *batches: The batch of the step; several if its gradient was accumulated over several. They are passed to
                ``losses`` one by one, and their scores are added up.

        Returns:
            What was done, or None if it was not time.

        Raises:
            TypeError: If there is no batch.
            ValueError: If a loss or a score is not finite, a weight is not used by its own module, something else
                changed the masks, or the ranks have completed different numbers of steps. The model is as before.
            RuntimeError: If another rank has failed.
        """
        done = self._newly_completed(batches)
        self.completed += done
        if done:
            self.masks.hold()
        if not done or self._next is None or self.completed < self._next:
            return None
        report = self._change(batches)
        if report is not None:
            self._next = self._following()
        return report

    def _newly_completed(self, batches: Sequence[Batch]) -> int:
        """Return how many steps were completed since the last call, the same on all ranks.

        A rank that counts otherwise (it skipped a step, or its checkpoint is of another one) would make its masks when
        the others train: each would wait for what never comes.
        """
        problem: Exception | None = None
        done, found = 0, dict[str, Obstacle]()
        try:
            if not batches and self._needs_batches():
                raise TypeError("batch: step() needs the batch of the optimizer step, found none; call step(batch)")
            done = self._steps.take()
            if done and not self._settled:
                found = self._misread(batches)
        except Exception as error:  # noqa: BLE001  # raised below, when all ranks know
            problem = error
        completed = numbers_of_ranks(-1 if problem else self.completed + done)
        if -1 in completed:
            self._steps.waiting += done  # they are counted when the next call looks again
            with failing_together():
                if problem:
                    raise problem
        if len(set(completed)) > 1:
            raise ValueError(
                f"step: all ranks must have completed the same number of optimizer steps, found {completed}; load "
                "checkpoints of the same step on all, and skip a step on all or on none"
            )
        if done and not self._settled:
            self._settle(found)
        return done

    def _misread(self, batches: Sequence[Batch]) -> dict[str, Obstacle]:
        """Return the weights that the first step shows not to be maskable.

        Raises:
            ValueError: If they were listed or came with masks.
        """
        if self.completed:  # the run that it goes on from has found them out
            return {}
        found = self.masks.misread()
        # A forward of sharded weights takes all ranks, and whether all are here is not known yet: the first update
        # finds out.
        if batches and self._needs_batches() and not self.masks.sharded:
            found |= computed_instead(self._model, self._losses, batches[0], self.masks.keys, self.masks.names)
        if found and (self._begin_again is None or self.masks.came_masked(found)):
            raise refusal(found, pasteable=True)
        return found

    def _settle(self, found: Mapping[str, Obstacle]) -> None:
        """Leave out what some rank has found not to be maskable, by beginning again; from then on nothing more."""
        together: dict[str, Obstacle] = {}
        for of_rank in gathered(found):
            together.update(of_rank)
        if together:
            reasons = {name: together[name].reason for name in self.masks.names if name in together}
            self._begin_without({**self._left_out, **reasons})
            warn_of_skipped(reasons, len(self.masks.keys))
        self._settled, self._begin_again = True, None
        self.masks.settle()

    def _begin_without(self, left_out: Mapping[str, str]) -> None:
        """Begin again, leaving out some names; if that fails, as it was.

        Args:
            left_out: Qualified name to reason.
        """
        assert self._begin_again is not None
        before = self._left_out
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # all has been said when it began first
            try:
                self._made_anew(left_out)
            except Exception:
                self._made_anew(before)
                raise

    def _made_anew(self, left_out: Mapping[str, str]) -> None:
        begin_again = self._begin_again
        assert begin_again is not None
        if self._steps.stop():
            self.masks.let_go()
        begin_again(list(left_out))
        self._begin_again, self._left_out = begin_again, dict(left_out)  # as the first call knows what was excluded
        self.skipped.update(left_out)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy goes on with, which goes with the model and the optimizer that are copied along.

        It cannot begin again: what cannot be masked must be excluded, if no step has shown it yet.
        """
        return {**vars(self), "_begin_again": None}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that decides how the run goes on: step, masks (as bits), random state, settings.

        Save it together with the states of the model and the optimizer; see
        :func:`disparse_plugin.sparse_training.save_checkpoint`.

        Returns:
            A dict of tensors and plain values that ``torch.load(weights_only=True)`` reads.

        Raises:
            ValueError: If the masks are gone, as after :func:`~disparse_plugin.fold`.
        """
        return {
            "completed": self.completed,
            "waiting": self._steps.waiting,
            "next": self._next,
            "masks": self.masks.packed(),
            "left_out": dict(self._left_out),
            "settings": dict(self._settings),
            "own": self._own_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of a scheduler with the same options for the same model.

        Build the model, the optimizer and the scheduler first; then load the three states, this one first: what the
        first step of that run has left out loses its mask again, so that the names of the model's state fit.

        Args:
            state: What :meth:`state_dict` returned.

        Raises:
            TypeError: If it is no mapping.
            KeyError: If something is missing, as in what is no state of this class. Nothing is changed.
            ValueError: If the options or the model differ, or the masks are gone. Nothing is changed.
        """
        check_kind("state", state, Mapping, "what state_dict() of a scheduler returned")
        _check_has(state, dict.fromkeys(("completed", "waiting", "next", "masks", "settings", "own")))
        completed, waiting = int(state["completed"]), int(state["waiting"])
        following = None if state["next"] is None else int(state["next"])
        before = self._left_out
        masks = self._masks_of(state)
        try:
            _check_has(state["own"], self._own_state(), "own.")
            self._load_own_state(state["own"])
        except Exception:
            self._leave_out_as(before)
            raise
        self.masks.restore(masks)
        self.completed, self._next, self._steps.waiting = completed, following, waiting

    def _masks_of(self, state: Mapping[str, Any]) -> list[Tensor]:
        """Check a state, leave out what its run has left out, and return its masks."""
        self._check_settings(state["settings"], besides=("alive",))
        before = self._left_out
        self._leave_out_as(state.get("left_out", before))  # older states do not say
        try:
            self._check_settings(state["settings"])
            return self.masks.unpacked(state["masks"])
        except Exception:
            self._leave_out_as(before)
            raise

    def _leave_out_as(self, left_out: Mapping[str, str]) -> None:
        """Leave out what another run has left out, and nothing else that the first step shows."""
        inside = [name for name in left_out if name in self.masks.names]
        if not inside and (self._begin_again is None or self._left_out.keys() <= left_out.keys()):
            return
        if self._begin_again is None:
            raise ValueError(
                f"state_dict: must be of a scheduler of the same parameters, found that its run left out {inside}, "
                f"which cannot be masked; pass exclude={inside} too"
            )
        self._begin_without(left_out)

    def _check_settings(self, saved: Mapping[str, Any], besides: Sequence[str] = ()) -> None:
        different = [
            f"{option} {self._settings.get(option)!r} (saved: {saved.get(option)!r})"
            for option in {**saved, **self._settings}
            if option not in besides and saved.get(option) != self._settings.get(option)
        ]
        if different:
            raise ValueError(
                f"state_dict: must be of a scheduler with the same options, found other {', '.join(different)}; build "
                "the scheduler as it was built"
            )

    def unfinished(self) -> str | None:
        """Say what is still to be done if the training ends now, and how to get it done; None if nothing is.

        The callbacks of trainers warn of it. Exchanges that are still to come leave nothing undone.
        """
        return None

    def __repr__(self) -> str:
        """Name the options that decide what happens, and how far it has come."""
        options = {name: value for name, value in self._settings.items() if name != "alive"}
        shown = ", ".join(f"{name}={value!r}" for name, value in options.items())
        return f"{type(self).__name__}({shown}; {len(self.masks.keys)} tensors, {self.completed} steps completed)"

    @abstractmethod
    def _change(self, batches: Sequence[Batch]) -> _Report | None:
        """Change the masks; None puts it off to the next step."""

    @abstractmethod
    def _following(self) -> int | None:
        """Return the step of the next change, or None if there is none."""

    @abstractmethod
    def _needs_batches(self) -> bool: ...

    @abstractmethod
    def _own_state(self) -> dict[str, Any]: ...

    @abstractmethod
    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`_own_state` returned, or raise and take over nothing."""


def _check_has(state: object, wanted: Mapping[str, Any], inside: str = "") -> None:
    """Check that a state has the names that another has.

    Args:
        state: The state.
        wanted: The other.
        inside: Where in the whole it stands.

    Raises:
        KeyError: If one is missing.
    """
    found = state if isinstance(state, Mapping) else {}
    if missing := [inside + name for name in wanted if name not in found]:
        raise KeyError(
            f"state_dict: must be all that state_dict() of such a scheduler returned, found no {', '.join(missing)}; "
            "load another checkpoint, or begin anew"
        )
    for name, value in wanted.items():
        if isinstance(value, Mapping):
            _check_has(found[name], value, f"{inside}{name}.")
