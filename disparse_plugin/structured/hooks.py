"""Hooks that see what enters a layer, whether it is passed by position or by keyword."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


def before_forward(layer: nn.Module, hook: Callable[[nn.Module, tuple[Any, ...]], None]) -> RemovableHandle:
    """Call ``hook(layer, inputs)`` before each forward.

    Args:
        layer: The layer.
        hook: Is given all arguments, those by keyword last, as the forward lists them.

    Example:
        >>> layer, seen = nn.Identity(), []
        >>> handle = before_forward(layer, lambda _, inputs: seen.append(inputs))
        >>> layer(1), layer(input=2), seen
        (1, 2, [(1,), (2,)])
    """
    return layer.register_forward_pre_hook(
        lambda module, args, kwargs: hook(module, (*args, *_in_order(module, kwargs))), with_kwargs=True
    )


def after_forward(layer: nn.Module, hook: Callable[[nn.Module, tuple[Any, ...], Any], Any]) -> RemovableHandle:
    """Call ``hook(layer, inputs, output)`` after each forward; what it returns, if anything, is the output then.

    Args:
        layer: The layer.
        hook: Is given all arguments, those by keyword last, as the forward lists them.
    """
    return layer.register_forward_hook(
        lambda module, args, kwargs, output: hook(module, (*args, *_in_order(module, kwargs)), output), with_kwargs=True
    )


def _in_order(module: nn.Module, given: Mapping[str, Any]) -> list[Any]:
    """Return what is passed by keyword in the order of the forward's parameters; what that does not name comes last."""
    places = {name: place for place, name in enumerate(inspect.signature(module.forward).parameters)} if given else {}
    return [given[name] for name in sorted(given, key=lambda name: places.get(name, len(places)))]
