"""The numbers that a module holds as attributes: alone, in tuples, and in lists."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..parameters import plain_attributes


def stored_numbers(module: nn.Module) -> dict[str, Any]:
    """Return numbers, and tuples of whole numbers, by the name of the attribute; a list is returned as a tuple.

    Example:
        >>> pool = nn.AvgPool2d((2, 3))
        >>> pool.splits = [4, 4]
        >>> stored_numbers(pool)["kernel_size"], stored_numbers(pool)["splits"]
        ((2, 3), (4, 4))
    """
    lists = {name: tuple(value) for name, value in vars(module).items() if _is_list(value)}
    return {**plain_attributes(module), **lists}


def _is_list(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(entry) is int for entry in value)


def set_number(module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute as :func:`stored_numbers` returns it; what was a list stays one."""
    setattr(module, name, list(value) if isinstance(getattr(module, name), list) else value)
