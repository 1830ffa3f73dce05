"""What kind of thing an argument must be, so that none fails further inside with an error about something else."""

from __future__ import annotations

import numbers
from types import UnionType
from typing import Any

import numpy as np

from .errors import wrong


def check_kind(argument: str, value: object, kind: type[Any] | UnionType, called: str) -> None:
    """Check that an argument is an object of a class.

    Args:
        argument: What messages call it.
        value: What the user passed.
        kind: The class, or several joined by ``|``.
        called: What messages call an object of it, with its article.

    Raises:
        TypeError: If it is none.

    Example:
        >>> check_kind("masks", [], dict, "a mapping of names to masks")
        Traceback (most recent call last):
        TypeError: masks: must be a mapping of names to masks, found list: []
    """
    if not isinstance(value, kind):
        raise TypeError(f"{argument}: must be {called}, found {_shown(value)}")


def check_flag(argument: str, value: object, *, otherwise: str = "") -> None:
    """Check an option that is True or False; text, None or a number would silently count as one of them.

    Args:
        argument: What messages call it.
        value: What the user passed.
        otherwise: What else the option may be, for the message, e.g. ``" or None"``.

    Raises:
        TypeError: If it is no bool, of Python or of numpy.

    Example:
        >>> check_flag("fold", True)
        >>> check_flag("fold", "no")
        Traceback (most recent call last):
        TypeError: fold: must be True or False, found str: 'no'
    """
    check_kind(argument, value, bool | np.bool_, f"True or False{otherwise}")


def whole_number(argument: str, value: object, *, least: int | None = None, otherwise: str = "") -> int:
    """Return an option as an int.

    Args:
        argument: What messages call it.
        value: What the user passed.
        least: The smallest value that is allowed, if there is one.
        otherwise: What else the option may be, for the message, e.g. ``" or None"``.

    Raises:
        TypeError: If it is not a whole number: an int, or one of numpy's.
        ValueError: If it is smaller than ``least``.

    Example:
        >>> import numpy as np
        >>> whole_number("k", np.int64(3), least=1)
        3
        >>> whole_number("k", True, least=1)
        Traceback (most recent call last):
        TypeError: k: must be an int, found bool: True
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{argument}: must be an int{otherwise}, found {type(value).__name__}: {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{argument}: must be at least {least}, found {value}")
    return int(value)


def check_number(argument: str, value: object, called: str = "a number") -> None:
    """Check that an argument is a real number.

    Args:
        argument: What messages call it.
        value: What the user passed.
        called: What messages call a right one.

    Raises:
        TypeError: If it is none; a bool is none.

    Example:
        >>> check_number("initial", "0.1")
        Traceback (most recent call last):
        TypeError: initial: must be a number, found str: '0.1'
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{argument}: must be {called}, found {_shown(value)}")


def check_fraction(argument: str, value: object, advice: str = "") -> None:
    """Check a number from 0 to 1.

    Args:
        argument: What messages call it.
        value: What the user passed.
        advice: What to do, for the message.

    Raises:
        TypeError: If it is no real number (a bool is none).
        ValueError: If it is out of range.

    Example:
        >>> check_fraction("start", 0.5)
        >>> check_fraction("start", float("nan"))
        Traceback (most recent call last):
        ValueError: start: must be in [0, 1], found nan
    """
    check_number(argument, value, "a number in [0, 1]")
    if not 0 <= value <= 1:  # type: ignore[operator]
        raise ValueError(f"{argument}: must be in [0, 1], found {value}{advice}")


def _shown(value: object) -> str:
    """Describe a wrong argument; of what is long, such as a model or a tensor, its type."""
    return wrong(value) if len(repr(value)) <= 60 else type(value).__name__
