"""Where scores are compared: on their own device, or on the CPU where that knows no float64, as Apple's ``mps``."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def double_device(device: torch.device) -> torch.device:
    """Return the device if it knows float64, else the CPU.

    Example:
        >>> double_device(torch.device("cpu"))
        device(type='cpu')
    """
    if device.type not in ("cpu", "cuda"):  # which do
        try:
            torch.zeros(1, dtype=torch.float64, device=device)
        except (RuntimeError, TypeError):
            return torch.device("cpu")
    return device


def knows_double(device: torch.device) -> bool:
    """Tell whether a device knows float64."""
    return double_device(device) == device


def in_known_type(values: Tensor, device: torch.device) -> Tensor:
    """Move float64 to a device, rounded to float32 where it knows nothing wider."""
    return values.to(device, torch.float64 if knows_double(device) else torch.float32)


def comparable(values: Tensor) -> Tensor:
    """Return a tensor where float64 is known."""
    there = double_device(values.device)
    return values if there == values.device else values.to(there)
