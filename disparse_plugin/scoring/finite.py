"""Whether tensors are finite: found where they lie, and read back with one wait for each device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..agreement.tallies import extremes


def peaks(tensors: Sequence[Tensor]) -> Tensor:
    """Reduce each tensor to values that are finite only if all of its entries are.

    Nothing is read back to the host.

    Args:
        tensors: Floating point, of one device and type, none empty.

    Returns:
        One row for each tensor, on their device.

    Example:
        >>> peaks([torch.ones(3), torch.tensor([1.0, torch.nan])]).isfinite().tolist()
        [[True, True], [False, False]]
    """
    if tensors[0].device.type == "cpu":
        return torch.stack([extremes(tensor) for tensor in tensors])
    # One call for all: the largest absolute value of each, NaN if one entry is.
    return torch.stack(torch._foreach_norm(list(tensors), torch.inf)).unsqueeze(1)


def all_finite(rows: Sequence[Tensor]) -> list[list[bool]]:
    """Tell which rows are finite, with one wait for each accelerator.

    Args:
        rows: Of two dimensions each, floating point, as :func:`peaks` makes them.

    Returns:
        For each tensor, one bool for each of its rows.

    Example:
        >>> all_finite([torch.tensor([[1.0, 2.0], [0.0, torch.inf]]), torch.tensor([[torch.nan]])])
        [[True, False], [False]]
    """
    found: dict[int, list[bool]] = {}
    for device in {part.device for part in rows}:
        there = [index for index, part in enumerate(rows) if part.device == device]
        values = iter(torch.cat([rows[index].isfinite().all(1) for index in there]).tolist())
        found.update({index: [next(values) for _ in range(len(rows[index]))] for index in there})
    return [found[index] for index in range(len(rows))]


def finite_tensors(tensors: Sequence[Tensor]) -> list[bool]:
    """Tell which tensors are finite, with one wait for each accelerator.

    Example:
        >>> finite_tensors([torch.ones(3), torch.tensor([1.0, torch.nan], dtype=torch.float64)])
        [True, False]
    """
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.numel():
            groups.setdefault((tensor.device, tensor.dtype), []).append(index)
    found = dict.fromkeys(range(len(tensors)), True)
    flags = all_finite([peaks([tensors[index] for index in group]) for group in groups.values()])
    for group, good in zip(groups.values(), flags, strict=True):
        found.update(zip(group, good, strict=True))
    return list(found.values())
