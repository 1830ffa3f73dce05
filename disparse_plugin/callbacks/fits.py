"""What the callbacks of all trainers do: follow the masks of checkpoints, prune in a mode, fold when a fit has ended.

Nothing here imports a trainer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import prune

from .._support.user_warning import warn_user
from ..masks.attach import masks_of
from ..masks.in_place import attach_in_place
from ..masks.state_dicts import follow_masks
from ..parameters import ParameterKey, is_masked, keys_by_name, present_mask, qualified_names
from ..scoring.losses import Batch
from .base import Fit, PruningInFit
from .modes import Options


class PrunedFits:
    """The pruning of a model over one fit, or several.

    Attributes:
        options: What the user chose.
        sparsity: The share of the listed weights that is masked.
    """

    def __init__(self, options: Options) -> None:
        """Check the options.

        Raises:
            TypeError: If one is of the wrong type.
            ValueError: If a value is out of range, a name is unknown, or an option is of another mode.
        """
        self.options = options
        self._new_pruning = options.maker()
        self._pruning: PruningInFit = self._new_pruning()
        self._model: nn.Module | None = None
        self._followed: nn.Module | None = None
        self._folded: dict[str, Tensor] | None = None
        self._handles: list[Any] = []
        self.sparsity = 0.0

    def follow(self, model: nn.Module | None) -> None:
        """Let a model, and no other any more, take the masks of the state dicts that it loads."""
        for handle in self._handles:
            handle.remove()
        self._handles = [] if model is None else follow_masks(model)
        self._followed = model

    def follows(self, model: nn.Module | None) -> bool:
        """Tell whether :meth:`follow` was called for this model last; None: for no model."""
        return self._followed is model

    def expect(self, model: nn.Module) -> None:
        """Let go of a fit that was interrupted; if the next one is of another model, start anew."""
        self._pruning.end()
        if self._model is not None and self._model is not model:
            self._pruning, self._folded = self._new_pruning(), None
        self._model = model

    def begin(self, fit: Fit) -> None:
        """Start a fit of the expected model."""
        if self._folded is not None:
            own, there = self._folded, masks_of(fit.model)
            attach_in_place(fit.model, {name: mask for name, mask in own.items() if name not in there})
        self._folded = None
        self._pruning.begin(fit, self.options.exclude)
        self._count()

    def before_training(self, batches: Iterable[Batch], step: int) -> None:
        """Prune before the first step, if it is time; as :meth:`PruningInFit.before_training`."""
        if self._pruning.before_training(batches, step):
            self._count()

    def after_batch(self, batch: Batch, step: int) -> None:
        """Change masks after a training batch, if it is time; as :meth:`PruningInFit.after_batch`."""
        if self._pruning.after_batch(batch, step):
            self._count()

    def end(self, model: nn.Module, step: int) -> None:
        """End a fit, and make the masks permanent if asked.

        Warns:
            UserWarning: If the fit ended before the pruning did, or the model is one of before.
        """
        reached, unfinished = self.sparsity, self._pruning.unfinished(step)
        self._count()  # a trainer may have loaded its best model since the last change
        own = self._pruning.keys
        self._pruning.end()
        if unfinished is not None:
            warn_user(unfinished)
        if self.sparsity < reached:
            warn_user(
                f"model: must be as pruned at the end of the fit as it was in it, found {self.sparsity:.1%} of the "
                f"weights masked, of {reached:.1%}: weights of before the pruning ended were loaded, as those of the "
                "best model; choose the best only after the last stage (the Trainer of transformers: eval_delay=...)"
            )
        self._make_permanent(model, own)

    def end_evaluation(self, model: nn.Module) -> None:
        """Count what is masked, for a checkpoint may have been loaded, and make the masks permanent if asked."""
        self.sparsity = _share_masked(list((masks_of(model) or self._folded or {}).values()))
        self._make_permanent(model, keys_by_name(model).values())

    def _make_permanent(self, model: nn.Module, keys: Iterable[ParameterKey]) -> None:
        """Fold masks if asked, and remember them; not those of another callback, which has not ended yet."""
        masked = [key for key in keys if is_masked(*key)] if self.options.fold else []
        if masked:
            masks = (present_mask(key).cpu() for key in masked)
            self._folded = dict(zip(qualified_names(model, masked), masks, strict=True))
        for key in masked:
            prune.remove(*key)

    def state_dict(self) -> dict[str, Any]:
        """Return what a later run goes on from; the masks themselves are in the model's state, unless folded."""
        return {"mode": self.options.mode, "pruning": self._pruning.state_dict(), "folded": self._folded}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. Of one made in another mode, only the masks are taken over."""
        self._folded = state_dict["folded"]
        if state_dict["mode"] == self.options.mode:
            self._pruning.load_state_dict(state_dict["pruning"])

    def _count(self) -> None:
        self.sparsity = _share_masked([present_mask(key) for key in self._pruning.keys])


def _share_masked(masks: Sequence[Tensor]) -> float:
    total = sum(mask.numel() for mask in masks)
    return 1 - sum(int(mask.sum()) for mask in masks) / total if total else 0.0
