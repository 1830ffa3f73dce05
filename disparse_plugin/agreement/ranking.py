"""From scores to exact ranks, with one tie rule everywhere.

**Tie rule.** Of two equal scores the one of the smaller magnitude ``abs(w)`` ranks lower and is pruned first; of equal
magnitudes too, the one that comes first (in the order of the parameters, then in row-major order inside a parameter).
Saturated units, dead units and weights that are zero already score exactly zero for every task, in trained networks up
to half of all weights: among those the magnitude says more than the place in a tensor. The rule is exact, and the same
on every device. Without magnitudes the order alone decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..sorting import positions, stable_order, stable_sort, taken

# Finding the few highest: below this size, or from this share on, sampling gains nothing.
SMALLEST = 2**14
LARGEST_SHARE = 1 / 8
# Every so many-th value is sampled: a prime, so that the places of a kernel (9, 25, 49) all come in turn.
STRIDE = 61
# On an accelerator, up to this size, to sort again takes less time than to let the host wait for what a sort found.
SORTED_AT_ONCE = 2**24
# Length of the rows in which an accelerator finds a running maximum.
ROW = 2**10


def ranks(values: Tensor, magnitudes: Tensor | None = None) -> Tensor:
    """Rank each entry from 0 (lowest) to n-1 (highest).

    Args:
        values: 1-D, floating point, no NaN.
        magnitudes: What decides between equal values: weights of any floating point type, by their absolute values;
            same shape.

    Returns:
        int64 (int32 for up to 2^31 entries), same shape and device: a permutation of ``0..n-1``.

    Example:
        >>> ranks(torch.tensor([0.5, 0.1, 0.5, 0.0])).tolist()
        [2, 1, 3, 0]
        >>> ranks(torch.tensor([0.5, 0.1, 0.5, 0.0]), torch.tensor([9.0, 1.0, 2.0, 3.0])).tolist()
        [3, 1, 2, 0]
    """
    size = values.numel()
    dtype = torch.int32 if size < 2**31 else torch.int64
    numbers = torch.arange(size, dtype=dtype, device=values.device)
    return torch.empty_like(numbers).scatter_(0, ascending(values, magnitudes), numbers)


def ascending(values: Tensor, magnitudes: Tensor | None = None) -> Tensor:
    """Return the positions of the entries from the lowest to the highest, int64.

    Args:
        values: 1-D, floating point, no NaN.
        magnitudes: As in :func:`ranks`.
    """
    return arranged(values, magnitudes)[1]


def arranged(values: Tensor, magnitudes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the entries from the lowest to the highest, and their positions.

    Only the entries that share their value with another are compared a second time, by magnitude.

    Args:
        values: 1-D, floating point, no NaN.
        magnitudes: As in :func:`ranks`.

    Returns:
        The values, zeros without their sign, and int64.
    """
    if magnitudes is None:
        return stable_sort(values)
    if _sorts_at_once(values):
        first = stable_order(absolute(magnitudes))
        ordered, places = stable_sort(values[first])
        return ordered, first[places]
    ordered, order = stable_sort(values)
    same = ordered[1:] == ordered[:-1]
    shared = torch.zeros_like(values, dtype=torch.bool)
    shared[1:] = same
    shared[:-1] |= same
    places = positions(shared)
    if places.numel():
        entries, shared_values = taken(order, places), taken(ordered, places)
        runs = torch.zeros_like(places)
        torch.cumsum(shared_values[1:] != shared_values[:-1], 0, out=runs[1:])
        order[places] = taken(entries, _order_in_runs(runs, absolute(taken(magnitudes, entries))))
    return ordered, order


def _order_in_runs(runs: Tensor, sizes: Tensor) -> Tensor:
    """Order by the number of the run (ascending already), then by size, then as they come."""
    if sizes.dtype == torch.float32:  # the bits of floats that are not negative are in the order of the floats
        return stable_order((runs << 32) | sizes.view(torch.int32).long())
    first = stable_order(sizes)
    return first[stable_order(runs[first])]


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
    ordered, order = arranged(values, magnitudes)
    if not bool((ordered[1:] == ordered[:-1]).any()):
        return values
    # The bits of positive floats are in the order of the floats, and the next float has the next bits.
    steps = torch.arange(values.numel(), device=values.device)
    raised = _running_maximum(ordered.view(torch.int64) - steps) + steps
    one = torch.ones((), dtype=torch.float64, device=values.device).view(torch.int64)
    return torch.empty_like(values).scatter_(0, order, torch.minimum(raised, one - steps.flip(0)).view(torch.float64))


def count_true(mask: Tensor) -> int:
    """Count the True entries of a bool tensor; on a CPU numpy does it thirty times faster than ``sum``."""
    return int(np.count_nonzero(mask.numpy())) if mask.device.type == "cpu" else int(mask.sum())


def counts_true(masks: Sequence[Tensor]) -> list[int]:
    """Count the True entries of each of several bool tensors, with one wait for each accelerator.

    Example:
        >>> counts_true([torch.tensor([True, False]), torch.tensor([[True, True]])])
        [1, 2]
    """
    found: dict[int, int] = {}
    for device in {mask.device for mask in masks}:
        there = [index for index, mask in enumerate(masks) if mask.device == device]
        if device.type == "cpu":
            found.update({index: count_true(masks[index]) for index in there})
        else:
            found.update(zip(there, torch.stack([masks[index].sum() for index in there]).tolist(), strict=True))
    return [found[index] for index in range(len(masks))]


def count_zeros(tensors: Iterable[Tensor]) -> int:
    """Count the entries that are zero in all of several tensors together, with one wait for each accelerator.

    Example:
        >>> count_zeros([torch.tensor([0.0, 1.0]), torch.tensor([-0.0])])
        2
    """
    total = 0
    nonzero: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.device.type == "cpu":
            total += count_true(tensor == 0)
        else:
            total += tensor.numel()
            nonzero.setdefault(tensor.device, []).append(tensor.count_nonzero())
    return total - sum(int(torch.stack(counts).sum()) for counts in nonzero.values())


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


def _running_maximum(values: Tensor) -> Tensor:
    if values.device.type == "cpu":  # without the indices that torch makes too
        return torch.from_numpy(np.maximum.accumulate(values.numpy()))
    if values.numel() <= ROW:
        return values.cummax(0).values
    # An accelerator takes one row after the other, but many rows at once.
    rows = torch.nn.functional.pad(values, (0, -values.numel() % ROW), value=torch.iinfo(values.dtype).min)
    within = rows.view(-1, ROW).cummax(1).values
    before = _running_maximum(within[:-1, -1].contiguous())
    torch.maximum(within[1:], before.unsqueeze(1), out=within[1:])
    return within.view(-1)[: values.numel()]


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
