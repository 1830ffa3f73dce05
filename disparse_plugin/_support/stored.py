"""The numbers that a module holds as attributes: alone, in tuples, and in lists."""

from __future__ import annotations

from typing import Any

from torch import nn


def stored_numbers(module: nn.Module) -> dict[str, Any]:
    """Return numbers, and tuples of whole numbers, by the name of the attribute; a list is returned as a tuple.

    Example:
        >>> pool = nn.AvgPool2d((2, 3))
        >>> pool.splits = [4, 4]
        >>> stored_numbers(pool)["kernel_size"], stored_numbers(pool)["splits"]
        ((2, 3), (4, 4))
    """
    values = {name: tuple(value) if _is_list(value) else value for name, value in vars(module).items()}
    return {name: value for name, value in values.items() if is_number(value)}


def _is_list(value: object) -> bool:
    return isinstance(value, list) and bool(value)


def is_number(value: object) -> bool:
    """Tell whether a value is a number (no bool) or a tuple of whole numbers."""
    if isinstance(value, tuple):
        return all(type(entry) is int for entry in value)
    return type(value) in (int, float)


def set_number(module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute as :func:`stored_numbers` returns it; what was a list stays one."""
    setattr(module, name, list(value) if isinstance(getattr(module, name), list) else value)
