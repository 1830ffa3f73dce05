"""Add one batch's scores of one parameter to their running sum."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..agreement.ranking import extremes
from ..criteria import Criterion
from ..parameters import score_dtype

# Entries scored at a time on a CPU: a piece of the weight, gradient, score and sum together stay in its cache, and no
# temporary of the weight's size is made, whose fresh memory costs more than the arithmetic.
PIECE = 2**18


def accumulate(rule: Criterion, weight: Tensor, grad: Tensor, total: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
    """Score one parameter on one batch and add the scores to ``total`` in place.

    Nothing is read back to the host.

    Args:
        rule: The criterion.
        weight: The effective weight.
        grad: The gradient of one task's loss with respect to it, same shape.
        total: The sum so far, or None before the first batch.
        name: What messages call the parameter.

    Returns:
        The sum, float32 (float64 for float64 weights) and of the weight's shape, and the :func:`extremes` of what was
        added.

    Raises:
        ValueError: If the criterion returns something else than a floating point tensor of the weight's shape.

    Example:
        >>> from disparse_plugin.criteria import resolve
        >>> accumulate(resolve("snip"), torch.tensor([2.0, -3.0]), torch.tensor([1.0, 1.0]), torch.ones(2), "w")
        (tensor([3., 4.]), tensor([2., 3.]))
    """
    dtype = score_dtype(weight)
    fresh = total is None
    total = torch.empty_like(weight, dtype=dtype) if total is None else total
    found = []
    for w, g, part in _pieces(rule, weight.detach(), grad.detach(), total):
        score = _checked(rule, w.to(dtype), g.to(dtype), name).to(dtype)
        found.append(extremes(score))
        part.copy_(score) if fresh else part.add_(score)
    return total, found[0] if len(found) == 1 else extremes(torch.stack(found))


def _pieces(rule: Criterion, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of one shape along their first axis, where pieces may be scored apart and it is worth it."""
    shape, count = tensors[0].shape, tensors[0].numel()
    if not rule.elementwise or count <= PIECE or tensors[0].device.type != "cpu":
        return iter([tensors])
    rows = max(1, PIECE * shape[0] // count)
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _checked(rule: Criterion, weight: Tensor, grad: Tensor, name: str) -> Tensor:
    score = rule.score(weight, grad)
    if not isinstance(score, Tensor) or score.shape != weight.shape or not score.is_floating_point():
        found = f"{score.dtype} {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
        raise ValueError(
            f"criterion: {rule.name} must return a floating point tensor of the weight's shape {tuple(weight.shape)}, "
            f"found {found} for {name}"
        )
    return score.detach()
