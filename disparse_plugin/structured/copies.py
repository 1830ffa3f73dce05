"""Copies of a model on which things are tried, in double precision where it runs in that."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._support.kept_graphs import of_graph


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy of a model; of tensors of a graph that modules keep (activations), a copy without the graph.

    Raises:
        ValueError: If something in it cannot be copied.
    """
    try:
        memo = {id(t): t.detach().clone() for module in model.modules() for t in of_graph(list(vars(module).values()))}
        return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            "model: must be one that copy.deepcopy can copy, because a removal is tried on copies, found "
            f"{type(error).__name__}: {' '.join(str(error).split())[:120]}; keep locks, files and the like out of the "
            "modules, or set them to None meanwhile"
        ) from error


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
    """Turn a model to double precision, in place; complex, whole and boolean tensors stay."""
    return model.to(torch.float64)
