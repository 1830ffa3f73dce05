"""From scores to exact ranks, with one tie rule everywhere.

**Tie rule.** Of two equal scores the one of the smaller magnitude ``abs(w)`` ranks lower and is pruned first; of equal
magnitudes too, the one that comes first (in the order of the parameters, then in row-major order inside a parameter).
Saturated units, dead units and weights that are zero already score exactly zero for every task, in trained networks up
to half of all weights: among those the magnitude says more than the place in a tensor. The rule is exact, and the same
on every device. Without magnitudes the order alone decides.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..sorting import PIECE, order_and_ties, positions, put, sorted_values, stable_order, taken
from .tallies import count_true

# Finding the few highest: below this size, or from this share on, sampling gains nothing.
SMALLEST = 2**14
LARGEST_SHARE = 1 / 8
# Every so many-th value is sampled: a prime, so that the places of a kernel (9, 25, 49) all come in turn.
STRIDE = 61
# On an accelerator, up to this size, to sort again takes less time than to let the host wait for what a sort found.
SORTED_AT_ONCE = 2**24
# Of 1.0, as float64 and as float32.
BITS_OF_ONE = 0x3FF0000000000000
_BITS_OF_ONE_IN_SINGLE = 0x3F800000
# Length of the rows in which an accelerator finds a running maximum.
ROW = 2**10


def _number_type(size: int) -> torch.dtype:
    return torch.int32 if size < 2**31 else torch.int64


def _inverse(order: Tensor) -> Tensor:
    """Number the entries of an order, each at its place."""
    result = torch.empty(order.numel(), dtype=_number_type(order.numel()), device=order.device)
    if order.device.type != "cpu":
        return result.scatter_(0, order, torch.arange(order.numel(), dtype=result.dtype, device=order.device))
    into = result.numpy()
    for start in range(0, order.numel(), PIECE):
        part = order[start : start + PIECE].numpy()
        into[part] = np.arange(start, start + part.size, dtype=into.dtype)
    return result


def ranks(values: Tensor, magnitudes: Tensor | None = None) -> Tensor:
    """Rank each entry from 0 (lowest) to n-1 (highest).

    Args:
        values: 1-D, floating point, no NaN.
        magnitudes: What decides between equal values: weights of any floating point type, by their absolute values;
            same shape.

    Returns:
        int32 (int64 from 2^31 entries on), same shape and device: a permutation of ``0..n-1``.

    Example:
        >>> ranks(torch.tensor([0.5, 0.1, 0.5, 0.0])).tolist()
        [2, 1, 3, 0]
        >>> ranks(torch.tensor([0.5, 0.1, 0.5, 0.0]), torch.tensor([9.0, 1.0, 2.0, 3.0])).tolist()
        [3, 1, 2, 0]
    """
    return _inverse(ascending(values, magnitudes))


def ascending(values: Tensor, magnitudes: Tensor | None = None, known: Tensor | None = None) -> Tensor:
    """Return the positions of the entries from the lowest to the highest, int64.

    Args:
        values: 1-D, floating point, no NaN.
        magnitudes: As in :func:`ranks`.
        known: The values in order, where they are known.
    """
    if magnitudes is not None and _sorts_at_once(values):
        by_magnitude = stable_order(absolute(magnitudes))
        return by_magnitude[stable_order(values[by_magnitude])]
    order, tied = order_and_ties(values, magnitudes, known)
    if magnitudes is not None:
        _order_ties(order, tied, magnitudes)
    return order


def _order_ties(order: Tensor, tied: Tensor, magnitudes: Tensor) -> None:
    """Bring entries of equal values in the order of their magnitudes, in place.

    Args:
        order: The entries' positions, as :func:`disparse_plugin.sorting.order_and_ties` returns them.
        tied: Whether each of these is to be compared with the one before.
        magnitudes: By position.
    """
    later = positions(tied)
    if not later.numel():
        return
    apart = later.diff() != 1
    alone = torch.nn.functional.pad(apart, (1, 0), value=True) & torch.nn.functional.pad(apart, (0, 1), value=True)
    _order_pairs(order, taken(later, positions(alone)), magnitudes)
    more = taken(later, positions(~alone))
    if not more.numel():
        return
    member = torch.zeros_like(tied)
    member[more] = member[more - 1] = True
    places = positions(member)
    units = taken(order, places)
    by_magnitude = stable_order(absolute(taken(magnitudes, units)))
    runs = (~tied[places]).cumsum(0)
    put(order, places, taken(units, by_magnitude[stable_order(taken(runs, by_magnitude))]))


def _order_pairs(order: Tensor, seconds: Tensor, magnitudes: Tensor) -> None:
    """Exchange two entries of equal values, and no third, where the second has the smaller magnitude."""
    for places in seconds.split(PIECE if order.device.type == "cpu" else max(1, seconds.numel())):
        first, second = taken(order, places - 1), taken(order, places)
        wrong = absolute(taken(magnitudes, first)) > absolute(taken(magnitudes, second))
        put(order, places - 1, torch.where(wrong, second, first))
        put(order, places, torch.where(wrong, first, second))


def _sorts_at_once(values: Tensor) -> bool:
    return values.device.type != "cpu" and values.numel() <= SORTED_AT_ONCE


def absolute(values: Tensor) -> Tensor:
    """Return the absolute values in a type in which they are compared: float64 stays, all else is float32.

    Example:
        >>> absolute(torch.tensor([-2.0, 1.0], dtype=torch.bfloat16))
        tensor([2., 1.])
    """
    return values.abs() if values.dtype == torch.float64 else values.float().abs()


def lowest(values: Tensor, count: int, magnitudes: Tensor | None = None) -> Tensor:
    """Mark the ``count`` lowest entries; ties by the rule of this module.

    Args:
        values: 1-D, floating point, no NaN.
        count: How many, at most ``values.numel()``.
        magnitudes: As in :func:`ranks`.

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
    if _sorts_at_once(values):
        chosen = torch.zeros_like(values, dtype=torch.bool)
        return chosen.index_fill_(0, ascending(values, magnitudes)[:count], True)
    threshold = kth_lowest(values, count)
    chosen = values < threshold
    ties = positions(values == threshold)
    wanted = count - count_true(chosen)
    if magnitudes is None or wanted == ties.numel():
        chosen[ties[:wanted]] = True
    else:
        chosen[ties[lowest(absolute(magnitudes[ties]), wanted)]] = True
    return chosen


def distinct(values: Tensor, magnitudes: Tensor | None = None) -> Tensor:
    """Part equal values by the rule of this module, so that whoever sorts them has the same order.

    Each of several equal values, from the second on, becomes the next larger float64. No order changes.

    Args:
        values: 1-D, float64, in [0, 1].
        magnitudes: As in :func:`ranks`.

    Returns:
        Same shape and type, in [0, 1], no two equal; ``values`` itself if none are.

    Example:
        >>> parted = distinct(torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([2.0, 1.0]))
        >>> bool(parted[1] == 0.5), bool(parted[0] > 0.5), float(parted[0])
        (True, True, 0.5000000000000001)
    """
    known = sorted_values(values).add_(0.0)
    if not bool((known[1:] == known[:-1]).any()):
        return values
    order = ascending(values, magnitudes, known)
    steps = torch.arange(values.numel(), device=values.device)
    _raise(known.view(torch.int64), steps, BITS_OF_ONE - values.numel() + 1)
    parted = torch.empty_like(values)
    put(parted, order, known)
    return parted


def in_single(values: Tensor) -> Tensor:
    """Round to float32 such that the order stays the same: what differs still does, what is equal stays equal.

    Args:
        values: Any shape, float64, in [0, 1], less than 2^30 of them different.

    Returns:
        Same shape, in [0, 1].

    Example:
        >>> in_single(torch.tensor([0.5, 0.5 + 2**-40, 0.5], dtype=torch.float64)).tolist()
        [0.5, 0.5000000596046448, 0.5]
    """
    flat = values.reshape(-1)
    order = stable_order(flat)
    known = taken(flat, order).add_(0.0)  # -0.0 equals 0.0, but its bits do not
    steps = torch.nn.functional.pad(known[1:] != known[:-1], (1, 0)).cumsum(0, dtype=torch.int32)
    rounded = known.float()
    if steps.numel():
        _raise(rounded.view(torch.int32), steps, _BITS_OF_ONE_IN_SINGLE - int(steps[-1]))
    result = torch.empty_like(rounded)
    put(result, order, rounded)
    return result.view(values.shape)


def _raise(bits: Tensor, steps: Tensor, last: int) -> None:
    """Raise floats that are not above those of the steps before, in place; overwrites the steps.

    Args:
        bits: Their bits, in ascending order. Those of positive floats are in the order of the floats, and the next
            float has the next bits.
        steps: How many different ones there are before each.
        last: The bits of the highest, less its steps.
    """
    _running_maximum(bits.sub_(steps))
    bits += steps
    torch.minimum(bits, steps.add_(last), out=bits)


def kth_lowest(values: Tensor, count: int) -> float:
    """Return the ``count``-th lowest value (counted from 1) of a 1-D tensor.

    Example:
        >>> kth_lowest(torch.tensor([0.5, 0.25, 1.0]), 2)
        0.5
    """
    if values.device.type != "cpu":  # where kthvalue keeps one multiprocessor busy, for a hundred times as long
        found = None if values.numel() <= SORTED_AT_ONCE else _kth_by_a_sample(values, count)
        return float(values.sort().values[count - 1]) if found is None else found
    if not _mostly_ties(values):
        return float(np.partition(values.numpy(), count - 1)[count - 1])
    return float(values.kthvalue(count).values)


def _kth_by_a_sample(values: Tensor, count: int) -> float | None:
    """Sort only what lies in a narrow range that a sample tells; None if that misled, or too many lie there."""
    size = values.numel()
    sample = values[::STRIDE].sort().values
    last = sample.numel() - 1
    middle, margin = round(count / size * last), 4 * math.isqrt(last) + 1  # eight standard errors at most
    low, high = sample[max(0, middle - margin)], sample[min(last, middle + margin)]
    if middle - margin < 0:
        low = torch.full_like(low, -torch.inf)
    if middle + margin > last:
        high = torch.full_like(high, torch.inf)
    above = values >= low
    near = above & (values <= high)
    inside, over, limits_tie = torch.stack([near.sum(), above.sum(), low == high]).tolist()
    below = size - over
    if not below < count <= below + inside:
        return None
    if limits_tie:
        return float(low)
    return float(values[near].sort().values[count - below - 1]) if inside <= size // 4 else None


def _mostly_ties(values: Tensor) -> bool:
    """Tell from a sample whether many entries are equal, which slows numpy's partition down twentyfold, not torch's."""
    sample = values[:: max(1, values.numel() // 1024)]
    return bool(2 * sample.unique().numel() < sample.numel())


def _running_maximum(values: Tensor) -> None:
    """Raise each entry to the largest before it, in place."""
    if values.device.type == "cpu":  # without the indices that torch makes too
        np.maximum.accumulate(values.numpy(), out=values.numpy())
    elif values.numel() <= ROW:
        values.copy_(values.cummax(0).values)
    else:
        # An accelerator takes one row after the other, but many rows at once.
        rows = torch.nn.functional.pad(values, (0, -values.numel() % ROW), value=torch.iinfo(values.dtype).min)
        within = rows.view(-1, ROW).cummax(1).values
        before = within[:-1, -1].contiguous()
        _running_maximum(before)
        torch.maximum(within[1:], before.unsqueeze(1), out=within[1:])
        values.copy_(within.view(-1)[: values.numel()])


def highest(values: Tensor, count: int, magnitudes: Tensor | None = None) -> Tensor:
    """Find the positions of the ``count`` highest entries: those that :func:`lowest` marks last.

    A sample tells a value that about twice as many entries exceed. If at least ``count`` do, the highest are among
    them, and only those are compared with each other.

    Args:
        values: 1-D, floating point, no NaN.
        count: How many, at most ``values.numel()``.
        magnitudes: As in :func:`ranks`.

    Returns:
        int64, ``count`` positions in ascending order.

    Example:
        >>> highest(torch.tensor([0.5, 0.1, 0.5, 0.0, 0.7]), 2).tolist()
        [2, 4]
    """
    if _sorts_at_once(values):
        return ascending(values, magnitudes)[values.numel() - count :].sort().values
    near = _near_the_top(values, count)
    if near is None:
        return (~lowest(values, values.numel() - count, magnitudes)).nonzero().flatten()
    return near[~lowest(values[near], near.numel() - count, None if magnitudes is None else magnitudes[near])]


def _near_the_top(values: Tensor, count: int) -> Tensor | None:
    size = values.numel()
    if size < SMALLEST or count > LARGEST_SHARE * size:
        return None
    sample = values[::STRIDE].sort(descending=True).values
    guess = sample[min(2 * count // STRIDE + 10, sample.numel() - 1)]
    near = (values > guess).nonzero().flatten()
    return near if near.numel() >= count else None
