"""Stable order, fast on a CPU: what ranks and shares are made from.

On a CPU numpy sorts several times faster than ``torch.sort``; on an accelerator nothing leaves it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def stable_order(values: Tensor) -> Tensor:
    """Return the positions of the entries from the lowest to the highest; equal ones stay in their order.

    Args:
        values: 1-D, floating point without NaN, or int64 counts below 2^32.

    Returns:
        int64, same shape and device.

    Example:
        >>> stable_order(torch.tensor([0.5, 0.1, 0.5, -0.0, 0.0])).tolist()
        [3, 4, 1, 0, 2]
    """
    if values.device.type != "cpu" or values.numel() >= 2**32:
        return values.argsort(stable=True)
    if values.dtype == torch.int64:  # counts that fit into half of the bits
        return _packed_order(values.numpy().astype(np.uint32))
    return _packed_order(_ordered_bits(values)) if values.dtype == torch.float32 else values.argsort(stable=True)


def _ordered_bits(values: Tensor) -> npt.NDArray[np.uint32]:
    """Map float32 to integers in the same order."""
    # Adding zero turns -0.0 into 0.0, so that the two tie as they compare.
    bits: npt.NDArray[np.uint32] = (values.contiguous() + 0.0).numpy().view(np.uint32)
    # Negative floats order backwards by their bits, so all bits flip; positive ones only need to come after them.
    bits ^= np.where(bits >> np.uint32(31), np.uint32(0xFFFFFFFF), np.uint32(0x80000000))
    return bits


def _packed_order(bits: npt.NDArray[np.uint32]) -> Tensor:
    """Argsort stably by one in-place sort of integers holding the value's bits above the entry's index."""
    keys = bits.astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= np.arange(keys.size, dtype=np.uint64)
    keys.sort()
    keys &= np.uint64(0xFFFFFFFF)
    return torch.from_numpy(keys.view(np.int64))
