"""The k lowest of values that no process has all of: a radix select, exact, by counts that are added up.

A float's bits, taken as a whole number, are in the order of the float once negative ones are flipped. So the k-th
lowest value is found digit by digit: count the values by their highest 16 bits, add up the counts of all processes, go
on with those in the bin where the k-th lies. Four rounds find a float64, two a float32, and only counts are sent.

Equal values are parted by their *turns*: whole numbers, no two equal, of which again the k-th lowest is found. With the
turns of :mod:`disparse_plugin.agreement.ranking` (smaller magnitude first, then as they come) the result is that of
:func:`disparse_plugin.agreement.ranking.lowest` on everything in one place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from ..sorting import ordered

# Adds up counts (int64, on the CPU) over the processes that select together.
Total: TypeAlias = Callable[[Tensor], Tensor]

_DIGIT = 16
_TURN_BITS = 48  # of more than 10^14 units
_BINS = 2**_DIGIT


def alone(counts: Tensor) -> Tensor:
    """Return the counts as they are: the total of one process."""
    return counts


def lowest(values: Tensor, count: int, turns: Tensor, owned: Tensor, total: Total = alone) -> Tensor:
    """Mark those of the ``count`` lowest of all values that are here.

    Args:
        values: What is here: 1-D, floating point, no NaN.
        count: How many of all values, those of the other processes included.
        turns: Which of equal values goes first: int64, not negative, no two of all equal.
        owned: bool, same shape: which of them count. A value that several processes hold counts at one of them, and is
            marked at all.
        total: Adds up over the processes; all of them must call this alike.

    Returns:
        bool, same shape and device.

    Example:
        >>> values = torch.tensor([0.5, 0.1, 0.5, 0.0])
        >>> lowest(values, 3, torch.arange(4), torch.ones(4, dtype=torch.bool)).tolist()
        [True, True, False, True]
    """
    keys = ordered(values)
    every = int(total(owned.sum().reshape(1).cpu()))
    if count <= 0 or count >= every:
        return torch.full_like(owned, count > 0)
    bits = 64 if values.dtype == torch.float64 else 32
    threshold, below = kth(keys[owned], count, bits, total)
    tied = keys == threshold
    last, _ = kth(turns[owned & tied], count - below, _TURN_BITS, total)
    return (keys < threshold) | (tied & (turns <= last))


def kth(keys: Tensor, count: int, bits: int, total: Total = alone) -> tuple[int, int]:
    """Find the ``count``-th lowest of all keys, counted from 1.

    Args:
        keys: What is here: int64, 1-D, from ``-2^(bits - 1)`` to ``2^(bits - 1) - 1``.
        count: From 1 to the number of all keys.
        bits: A multiple of 16.
        total: Adds up over the processes.

    Returns:
        The key, and how many of all keys are lower.

    Example:
        >>> kth(torch.tensor([5, -3, 5, 9]), 2, 32)
        (5, 1)
    """
    prefix, below = 0, 0
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        first = shift == bits - _DIGIT
        digits = (keys >> shift) + _BINS // 2 if first else (keys >> shift) & (_BINS - 1)
        upto = total(torch.bincount(digits, minlength=_BINS).cpu()).cumsum(0)
        digit = int(torch.searchsorted(upto, count - below))
        below += int(upto[digit - 1]) if digit else 0
        prefix = digit - _BINS // 2 if first else prefix << _DIGIT | digit
        keys = keys[digits == digit]
    return prefix, below
