"""The few highest of many values, exactly, without partitioning them all."""

from __future__ import annotations

from torch import Tensor

from .ranking import lowest

# Below this size, or from this share on, there is nothing to gain.
SMALLEST = 2**14
LARGEST_SHARE = 1 / 8
# Every so many-th value is sampled: a prime, so that the places of a kernel (9, 25, 49) all come in turn.
STRIDE = 61


def highest(values: Tensor, count: int) -> Tensor:
    """Find the positions of the ``count`` highest entries; of equal ones the last, by the rule of ``ranking``.

    A sample tells a value that about twice as many entries exceed. If at least ``count`` do, the highest are among
    them, and only those are compared with each other.

    Args:
        values: 1-D, floating point, no NaN.
        count: How many, at most ``values.numel()``.

    Returns:
        int64, ``count`` positions in ascending order.

    Example:
        >>> import torch
        >>> highest(torch.tensor([0.5, 0.1, 0.5, 0.0, 0.7]), 2).tolist()
        [2, 4]
    """
    near = _near_the_top(values, count)
    if near is None:
        return (~lowest(values, values.numel() - count)).nonzero().flatten()
    return near[~lowest(values[near], near.numel() - count)]


def _near_the_top(values: Tensor, count: int) -> Tensor | None:
    size = values.numel()
    if size < SMALLEST or count > LARGEST_SHARE * size:
        return None
    sample = values[::STRIDE].sort(descending=True).values
    guess = sample[min(2 * count // STRIDE + 10, sample.numel() - 1)]
    near = (values > guess).nonzero().flatten()
    return near if near.numel() >= count else None
