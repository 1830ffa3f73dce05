"""How far two outputs are apart: entry by entry, each on the scale of what is around it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Difference:
    """The largest difference between two tensors.

    Attributes:
        size: Relative to the scale of the entry; infinite where no number can say it (other shapes, NaN elsewhere).
        where: What differs, in words.
    """

    size: float
    where: str


def difference(first: Tensor, second: Tensor, *, floor: float) -> Difference:
    """Compare two tensors entry by entry.

    Whole numbers and flags must be equal. Of floating point numbers, NaN and infinities must stand in the same places;
    the others are compared on the scale ``max(|a|, |b|, s)``. ``s`` is the least of the medians of ``|a|`` over the
    slices through the entry (its channel, its token, its row), so that boxes in pixels do not hide probabilities that
    are in the same tensor, and at least ``floor`` times the lower quartile of all. Values that stand in both tensors
    more than once do not count in these medians: fills (padding with -1e9) say nothing of the scale.

    Args:
        first: Any shape and dtype.
        second: The one to compare with.
        floor: The least scale, relative to the lower quartile of all magnitudes.

    Returns:
        The largest difference.

    Example:
        >>> one = torch.tensor([[300.0, 0.5], [310.0, 0.4], [320.0, 0.6]])
        >>> round(difference(one, one + torch.tensor([0.0, 0.1]), floor=1e-3).size, 2)
        0.2
    """
    if first.shape != second.shape:
        return Difference(math.inf, f"its shape is {tuple(second.shape)} instead of {tuple(first.shape)}")
    if not (first.is_floating_point() or first.is_complex()):
        unequal = int((first != second).sum())
        return Difference(math.inf if unequal else 0.0, f"{unequal} of {first.numel()} entries differ")
    if first.is_complex():
        first, second = torch.view_as_real(first), torch.view_as_real(second)
    a, b = first.detach().cpu().double(), second.detach().cpu().double()
    finite = a.isfinite()
    if not torch.equal(a.nan_to_num(0.0)[~finite], b.nan_to_num(0.0)[~finite]) or not torch.equal(finite, b.isfinite()):
        return Difference(math.inf, "NaN or infinities stand in other places")
    a, b = a.where(finite, 0.0), b.where(finite, 0.0)
    relative = (a - b).abs() / torch.maximum(torch.maximum(a.abs(), b.abs()), _scale(a, b, finite, floor))
    if not relative.numel():
        return Difference(0.0, "it is empty")
    relative = relative.where(a != b, 0.0)
    size, place = relative.flatten().max(0)
    index = tuple(int(i) for i in torch.unravel_index(place, relative.shape))
    return Difference(float(size), f"entry {list(index)} is {float(b[index]):.4g} instead of {float(a[index]):.4g}")


def narrowed(full: Tensor, left: Tensor, kept: Collection[tuple[int, Tensor]]) -> Tensor:
    """Take out of a tensor what another has lost, in every dimension that is longer.

    Args:
        full: Any shape.
        left: Of as many dimensions.
        kept: The numbers of channels that there were, each with the positions that are left (int64). Of several that
            fit a dimension, the one that brings the tensors closest is taken.

    Returns:
        ``full``, as short as ``left`` where something fits.

    Example:
        >>> full = torch.arange(6).reshape(2, 3)
        >>> narrowed(full, torch.zeros(2, 2), [(3, torch.tensor([0, 2])), (3, torch.tensor([1]))])
        tensor([[0, 2],
                [3, 5]])
    """
    for dim, (before, after) in enumerate(zip(full.shape, left.shape, strict=False)):
        if before == after:
            continue
        # Layers of one group have kept the same: each choice is tried once.
        fitting = {tuple(p.tolist()): p for count, p in kept if (count, p.numel()) == (before, after)}.values()
        tried = [full.index_select(dim, places.to(full.device)) for places in fitting]
        full = min(tried, key=lambda one: _apart(one, left), default=full)
    return full


def _apart(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().nan_to_num().max()) if first.shape == second.shape else math.inf


def _scale(a: Tensor, b: Tensor, finite: Tensor, floor: float) -> Tensor:
    if not a.numel():
        return torch.zeros_like(a)
    values, places, counts = a.unique(return_inverse=True, return_counts=True)
    typical = values.abs().kthvalue((len(values) + 3) // 4).values
    informative = a.abs().where(finite & ~((counts[places] > 1) & (a == b)), torch.nan)
    scale = torch.full_like(a, float(typical))
    for dim in range(a.dim()):
        rows = informative.movedim(dim, 0).reshape(a.shape[dim], -1)
        shape = [1] * a.dim()
        shape[dim] = -1
        middle = rows.nanmedian(1).values.view(shape) if rows.numel() else rows.new_zeros(shape)
        scale = torch.minimum(scale, torch.where(middle.isnan(), typical, middle))
    return scale.clamp_min(floor * float(typical)).clamp_min(torch.finfo(torch.float64).tiny)
