"""Damped scores with a tensor's mean added to the gradients: what no gradient reaches is told apart by magnitude.

Tried and not adopted; the page on the long regime says what came out.
"""

from __future__ import annotations

from torch import Tensor

from disparse_plugin.criteria import Criterion, gradient, lamp_scores


def mean_added(exponent: float) -> Criterion:
    """Score by ``abs(w) * (A + mean of A)^e``, layer by layer.

    ``A`` is the sum over the batches of ``abs(g)``, its mean that of the alive weights of the tensor. Without the mean
    it is ``layer_adaptive(damped("taylor", e))``, by which all weights whose ``A`` is zero tie at zero.

    Example:
        >>> import torch
        >>> mean_added(0.5).finish(torch.tensor([2.0, -3.0]), torch.tensor([0.0, 2.0]))
        tensor([2.0000, 5.1962])
    """

    def finish(weight: Tensor, total: Tensor) -> Tensor:
        return weight.abs() * (total + total.mean()) ** exponent

    return Criterion(f"mean added, {exponent:g}", gradient, finish=finish, per_layer=lamp_scores)
