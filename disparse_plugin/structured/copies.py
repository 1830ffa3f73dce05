"""Copies of a model on which things are tried, in double precision where it runs in that."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy of a model."""
    try:
        return copy.deepcopy(model)
    except RuntimeError:
        # Some models cache tensors of a graph in their evaluation mode; a change of mode drops them.
        modes = [(module, module.training) for module in model.modules()]
        model.train(not model.training)
        model.train(not model.training)
        for module, mode in modes:
            module.training = mode
        return copy.deepcopy(model)


def doubled(value: Any) -> Any:
    """Copy a batch, with every floating point tensor in it in double precision.

    Tuples, lists, mappings and dataclasses are looked through; anything else is copied as it is.

    Example:
        >>> doubled({"x": torch.ones(1), "n": torch.ones(1, dtype=torch.int64)})
        {'x': tensor([1.], dtype=torch.float64), 'n': tensor([1])}
    """
    if isinstance(value, Tensor):
        return value.detach().double() if value.is_floating_point() else value.clone()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(doubled(entry) for entry in value))
    if isinstance(value, list | tuple):
        return type(value)(doubled(entry) for entry in value)
    if type(value) is dict:
        return {key: doubled(entry) for key, entry in value.items()}
    if isinstance(value, Mapping) and hasattr(value, "data") and isinstance(value.data, dict):  # BatchEncoding
        other = copy.copy(value)
        other.data = doubled(value.data)
        return other
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: doubled(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **fields)
    return copy.deepcopy(value)


def in_double(model: nn.Module) -> nn.Module:
    """Turn a model to double precision, in place; complex, whole and boolean tensors stay.

    Raises:
        RuntimeError, TypeError: If the device knows no double precision.
    """
    return model.to(torch.float64)
