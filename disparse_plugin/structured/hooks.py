"""Hooks that see what enters a layer, whether it is passed by position or by keyword."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


def before_forward(layer: nn.Module, hook: Callable[[nn.Module, tuple[Any, ...]], None]) -> RemovableHandle:
    """Call ``hook(layer, inputs)`` before each forward.

    Args:
        layer: The layer.
        hook: Is given all arguments, those by keyword last.

    Example:
        >>> layer, seen = nn.Identity(), []
        >>> handle = before_forward(layer, lambda _, inputs: seen.append(inputs))
        >>> layer(1), layer(input=2), seen
        (1, 2, [(1,), (2,)])
    """
    return layer.register_forward_pre_hook(
        lambda module, args, kwargs: hook(module, (*args, *kwargs.values())), with_kwargs=True
    )


def after_forward(layer: nn.Module, hook: Callable[[nn.Module, tuple[Any, ...], Any], Any]) -> RemovableHandle:
    """Call ``hook(layer, inputs, output)`` after each forward; what it returns, if anything, is the output then.

    Args:
        layer: The layer.
        hook: Is given all arguments, those by keyword last.
    """
    return layer.register_forward_hook(
        lambda module, args, kwargs, output: hook(module, (*args, *kwargs.values()), output), with_kwargs=True
    )
