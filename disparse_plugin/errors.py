"""Errors that callers may want to tell apart, and how messages help with names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NonFiniteError(ValueError):
    """A loss or a score is NaN or infinite."""


class TiesWarning(UserWarning):
    """The cut falls among weights that no task tells apart: their magnitude decides."""


class EmptyTensorWarning(UserWarning):
    """A cut leaves nothing of a tensor, so that nothing passes through its layer."""


def wrong(value: object) -> str:
    """Describe an argument of a wrong type, for messages.

    Example:
        >>> wrong("9"), wrong(dict)
        ("str: '9'", 'the class dict, not an object of it')
    """
    if isinstance(value, type):
        return f"the class {value.__name__}, not an object of it"
    return f"{type(value).__name__}: {value!r}"


def did_you_mean(found: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'NAME'?"``, or nothing where no known name is near.

    Example:
        >>> did_you_mean("magnitud", ["magnitude", "snip"]), did_you_mean("x", ["snip"])
        ("; did you mean 'magnitude'?", '')
    """
    near = difflib.get_close_matches(found, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
