"""How alike two score tables order the weights, whatever the scores' scale (Spearman, Am. J. Psychol. 15, 1904)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..agreement.ranking import ranks


def average_ranks(values: Tensor) -> Tensor:
    """Rank from 0 (lowest) to n-1; equal values share the mean of their ranks.

    The first-come tie rule of :mod:`..agreement.ranking` would make tables full of equal scores look
    alike.

    Args:
        values: 1-D, floating point, no NaN.

    Returns:
        float64, same shape and device.

    Example:
        >>> average_ranks(torch.tensor([0.5, 0.1, 0.5, 0.0])).tolist()
        [2.5, 1.0, 2.5, 0.0]
    """
    place = ranks(values).long()
    ordered = torch.empty_like(values)
    ordered[place] = values
    _, group, counts = ordered.unique_consecutive(return_inverse=True, return_counts=True)
    last = counts.cumsum(0) - 1
    means: Tensor = (last - (counts - 1) / 2).double()
    return means[group][place]


def standard_ranks(values: Tensor) -> Tensor:
    """Return :func:`average_ranks` with mean 0 and length 1, so that a dot product is Spearman's correlation.

    All zeros where the values are all equal, whose correlation with anything is undefined.

    Example:
        >>> a, b = standard_ranks(torch.tensor([1.0, 2.0, 9.0])), standard_ranks(torch.tensor([5.0, 7.0, 6.0]))
        >>> round(float(a @ b), 3)
        0.5
    """
    centred = average_ranks(values)
    centred -= centred.mean()
    length = torch.linalg.vector_norm(centred)
    return centred / length if bool(length > 0) else centred


def spearman(a: Tensor, b: Tensor) -> float:
    """Return Spearman's rank correlation from standard ranks; NaN where one of the two is constant.

    Args:
        a: From :func:`standard_ranks`.
        b: From :func:`standard_ranks`, same shape.
    """
    if not bool(a.any()) or not bool(b.any()):
        return float("nan")
    return float(a @ b.to(a.device))
