"""A tensor in the place of a parameter or buffer, with all that was not its values."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def stand_in(old: Tensor, tensor: Tensor) -> Tensor:
    """Return a tensor as what can take the place of another: in its memory format, and a Parameter where it is one.

    Whether a Parameter wants gradients stays, and what others have written on it (``_no_weight_decay``, ...).

    Args:
        old: The parameter or buffer.
        tensor: Of as many dimensions, without gradients.

    Example:
        >>> stand_in(nn.Parameter(torch.ones(3), requires_grad=False), torch.ones(2))
        Parameter containing:
        tensor([1., 1.])
    """
    tensor = _in_format_of(old, tensor)
    if not isinstance(old, nn.Parameter):
        return tensor
    new = nn.Parameter(tensor, requires_grad=old.requires_grad)
    vars(new).update(vars(old))
    return new


def _in_format_of(old: Tensor, tensor: Tensor) -> Tensor:
    """Return the tensor as channels_last where the old one is that and nothing else."""
    last = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
    if tensor.dim() not in (4, 5) or old.is_contiguous() or not old.is_contiguous(memory_format=last):
        return tensor
    return tensor.contiguous(memory_format=last)
