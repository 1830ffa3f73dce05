"""What the pruning methods share: scores that are given, checked before anything changes, and masks of one type."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import prune

from .._support.double import comparable, double_device, knows_double
from ..agreement.percentiles import fractions
from ..agreement.ranking import in_single, ranks
from ..maskable import check_tensor
from ..parameters import alive_mask, stored


class ScoredPruning(prune.BasePruningMethod):
    """A method of ``torch.nn.utils.prune`` that is told the scores of the tensor that it prunes."""

    @classmethod
    def _on_one_tensor(
        cls, module: nn.Module, name: str, importance_scores: Tensor | None, *options: Any
    ) -> prune.BasePruningMethod:
        """Prune one tensor: check all there is to check, then let torch do it.

        Args:
            module: The module.
            name: The tensor's name in it.
            importance_scores: As the user gave them.
            *options: What the constructor of the method takes.

        Returns:
            The hook that is now on the module.
        """
        check_tensor(module, name)
        weight = getattr(module, name).detach()
        scores = _checked_scores(importance_scores, weight, cls.__name__)
        method = cls(*options)
        method._check(scores, alive_mask(module, name))
        order = method._ordered(scores, comparable(weight))
        order = (order if knows_double(weight.device) else in_single(order)).to(weight.device)
        hook: prune.BasePruningMethod = super().apply(  # type: ignore[no-untyped-call]
            module, name, *options, importance_scores=order
        )
        keep_mask_type(module, name)
        return hook

    @abstractmethod
    def _check(self, scores: Tensor, alive: Tensor | None) -> None:
        """Refuse what :meth:`compute_mask` could not do, before the module is touched."""

    def _ordered(self, scores: Tensor, weight: Tensor) -> Tensor:
        """Put scores of any range into agreement scores in the same order; of equal ones the smaller ``abs(w)`` first.

        Ranks are agreement scores of a set of one tensor: in (0, 1], no two equal.
        """
        return fractions(ranks(scores.reshape(-1), weight.reshape(-1)), scores.numel()).reshape(scores.shape)


def keep_mask_type(module: nn.Module, name: str) -> None:
    """Give a mask the weight's type, as the first one has; the next ones torch makes in the type of the scores."""
    mask = module._buffers[f"{name}_mask"]
    assert mask is not None
    module._buffers[f"{name}_mask"] = mask.to(stored(module, name).dtype)


def _checked_scores(scores: Tensor | None, weight: Tensor, method: str) -> Tensor:
    if scores is None:
        raise ValueError(
            f"importance_scores: {method} needs scores, found None; pass importance_scores=scores.importance()[module, "
            f"name], with scores = score_tasks(model, losses, data), or bind them: {method}.bind(scores).apply(module, "
            "name, amount)"
        )
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        found = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"importance_scores: must be a floating point tensor, found {found}")
    if scores.shape != weight.shape:
        raise ValueError(
            f"importance_scores: must have the tensor's shape {tuple(weight.shape)}, found {tuple(scores.shape)}; were "
            "they made for another parameter?"
        )
    if not bool(scores.isfinite().all()):
        raise ValueError(
            "importance_scores: must be finite, found NaN or infinity; check the losses they were made from"
        )
    return scores.detach().to(double_device(weight.device))
