"""Options that count something: Python's ints and numpy's alike, and no bools."""

from __future__ import annotations

import numbers


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
