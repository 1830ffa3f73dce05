"""From scores to exact ranks, with one tie rule everywhere.

**Tie rule.** Of two equal scores the one that comes first (in the order of the parameters, then in row-major order
inside a parameter) ranks lower and is pruned first. A stable ascending sort does exactly that, on every device.

On a CPU numpy sorts several times faster than ``torch.sort``; on an accelerator the scores never leave it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Finding the few highest: below this size, or from this share on, sampling gains nothing.
SMALLEST = 2**14
LARGEST_SHARE = 1 / 8
# Every so many-th value is sampled: a prime, so that the places of a kernel (9, 25, 49) all come in turn.
STRIDE = 61


def ranks(values: Tensor) -> Tensor:
    """Rank each entry from 0 (lowest) to n-1 (highest).

    Args:
        values: 1-D, floating point, no NaN.

    Returns:
        int64 (int32 for up to 2^31 entries), same shape and device: a permutation of ``0..n-1``.

    Example:
        >>> ranks(torch.tensor([0.5, 0.1, 0.5, 0.0])).tolist()
        [2, 1, 3, 0]
    """
    size = values.numel()
    dtype = torch.int32 if size < 2**31 else torch.int64
    if values.device.type == "cpu" and values.dtype == torch.float32 and size < 2**32:
        order = _packed_order(values)
    else:
        order = values.argsort(stable=True)
    result = torch.empty(size, dtype=dtype, device=values.device)
    result[order] = torch.arange(size, dtype=dtype, device=values.device)
    return result


def _packed_order(values: Tensor) -> Tensor:
    """Argsort float32 by one in-place sort of integers holding the value's bits above the entry's index."""
    # Adding zero turns -0.0 into 0.0, so that the two tie as they compare.
    bits = (values.contiguous() + 0.0).numpy().view(np.uint32)
    # Negative floats order backwards by their bits, so all bits flip; positive ones only need to come after them.
    bits ^= np.where(bits >> np.uint32(31), np.uint32(0xFFFFFFFF), np.uint32(0x80000000))
    keys = bits.astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= np.arange(keys.size, dtype=np.uint64)
    keys.sort()
    keys &= np.uint64(0xFFFFFFFF)
    return torch.from_numpy(keys.view(np.int64))


def lowest(values: Tensor, count: int) -> Tensor:
    """Mark the ``count`` lowest entries; ties by the rule of this module.

    Args:
        values: 1-D, floating point, no NaN.
        count: How many, at most ``values.numel()``.

    Returns:
        bool, same shape and device, with exactly ``count`` True.

    Example:
        >>> lowest(torch.tensor([0.5, 0.1, 0.5, 0.0]), 3).tolist()
        [True, True, False, True]
    """
    if count <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    if count >= values.numel():
        return torch.ones_like(values, dtype=torch.bool)
    threshold = kth_lowest(values, count)
    chosen = values < threshold
    ties = positions(values == threshold)
    chosen[ties[: count - count_true(chosen)]] = True
    return chosen


def count_true(mask: Tensor) -> int:
    """Count the True entries of a bool tensor; on a CPU numpy does it thirty times faster than ``sum``."""
    return int(np.count_nonzero(mask.numpy())) if mask.device.type == "cpu" else int(mask.sum())


def positions(mask: Tensor) -> Tensor:
    """Return the positions of the True entries of a 1-D bool tensor; on a CPU numpy finds them seven times faster.

    Example:
        >>> positions(torch.tensor([False, True, True])).tolist()
        [1, 2]
    """
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().flatten()


def extremes(values: Tensor) -> Tensor:
    """Return the lowest and the highest entry, both NaN if any entry is; both finite only if all entries are.

    One pass without a temporary: on a CPU sixteen times faster than ``isfinite().all()``, and twenty times faster than
    ``torch.linalg.vector_norm(values, ord=inf)``. Nothing is read back to the host.

    Args:
        values: Any shape but empty, floating point.

    Returns:
        ``[lowest, highest]``, the type and device of ``values``.

    Example:
        >>> extremes(torch.tensor([[0.5, -2.0], [3.0, 0.0]])).tolist()
        [-2.0, 3.0]
        >>> extremes(torch.tensor([0.5, torch.nan, torch.inf])).isfinite().tolist()
        [False, False]
    """
    return torch.stack(values.aminmax())


def kth_lowest(values: Tensor, count: int) -> float:
    """Return the ``count``-th lowest value (counted from 1) of a 1-D tensor."""
    if values.device.type == "cpu" and not _mostly_ties(values):
        return float(np.partition(values.numpy(), count - 1)[count - 1])
    return float(values.kthvalue(count).values)


def _mostly_ties(values: Tensor) -> bool:
    """Tell from a sample whether many entries are equal, which slows numpy's partition down twentyfold, not torch's."""
    sample = values[:: max(1, values.numel() // 1024)]
    return bool(2 * sample.unique().numel() < sample.numel())


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
