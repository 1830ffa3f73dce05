"""How much is pruned: a fraction or a count becomes an exact number of entries."""

from __future__ import annotations

import numbers

from .._support.user_warning import warn_user
from ..errors import wrong

_COUNTED_BY_HAND = 500  # up to so many, who passes 90 counts


def check_amount(amount: float, what: str = "amount") -> None:
    """Check an ``amount`` as far as that is possible without knowing the number of entries.

    Args:
        amount: A float in [0, 1] (a fraction) or a non-negative int (a count). The int ``1`` is one entry, the float
            ``1.0`` all.
        what: What messages call it.

    Raises:
        TypeError: If it is neither an int nor a float (a bool is neither).
        ValueError: If it is out of range.

    Example:
        >>> check_amount(0.9)
        >>> check_amount(1.5)
        Traceback (most recent call last):
        ValueError: amount: a float must be a fraction in [0, 1], found 1.5; 90 % is amount=0.9, a count is an int
    """
    if isinstance(amount, bool) or not isinstance(amount, numbers.Real):
        raise TypeError(
            f"{what}: must be a float (fraction) or an int (count), found {wrong(amount)}; 90 % is amount=0.9"
        )
    if isinstance(amount, numbers.Integral):
        if amount < 0:
            raise ValueError(
                f"{what}: an int must be a count of at least 0, found {amount}; pass how many entries to prune"
            )
    elif not 0.0 <= float(amount) <= 1.0:
        raise ValueError(
            f"{what}: a float must be a fraction in [0, 1], found {amount}; 90 % is amount=0.9, a count is an int"
        )


def count_to_prune(amount: float, alive: int, what: str = "amount") -> int:
    """Turn an ``amount`` into the exact number of entries to prune among those still alive.

    ``round(amount * alive)`` for a fraction, as ``torch.nn.utils.prune`` counts; the int itself for a count.

    Raises:
        TypeError: As :func:`check_amount`.
        ValueError: As :func:`check_amount`, or if a count is larger than ``alive``.

    Example:
        >>> count_to_prune(0.9, 1005), count_to_prune(17, 1005)
        (904, 17)
    """
    check_amount(amount, what)
    if not isinstance(amount, numbers.Integral):
        return round(float(amount) * alive)
    if amount > alive:
        raise ValueError(
            f"{what}: a count must be at most the number of entries still alive, found {amount} with {alive} alive; "
            f"pass at most {alive}"
        )
    return int(amount)


def percentage_meant(amount: object, alive: int, what: str = "amount", unit: str = "weights") -> str | None:
    """Tell whether a count may be meant as a percentage: 1 to 100 that is below 1 %, or 50 to 100 of more than 500.

    Shares that are pruned are mostly of 50 % and more; a count of that size is then less than a fifth of the share.

    Returns:
        What to say about it, or None.

    Example:
        >>> percentage_meant(90, 832)
        'amount: 90 is a number of weights, 11 % of 832; for 90 % pass 0.9, for 90 weights 90 / 832'
        >>> percentage_meant(90, 500), percentage_meant(20, 832), percentage_meant(0.9, 832)
        (None, None, None)
    """
    count = int(amount) if isinstance(amount, numbers.Integral) else 0
    tiny, like_a_share = 100 * count < alive, count >= 50 and alive > _COUNTED_BY_HAND
    if not 0 < count <= 100 or not (tiny or like_a_share):
        return None
    return (
        f"{what}: {count} is a number of {unit}, {100 * count / alive:.2g} % of {alive:,}; for {count} % pass "
        f"{count / 100:g}, for {count} {unit} {count} / {alive}"
    )


def warn_of_percentage(amount: object, alive: int, what: str = "amount", unit: str = "weights") -> None:
    """Warn, at the user's line, of a count that may be meant as a percentage."""
    if (message := percentage_meant(amount, alive, what, unit)) is not None:
        warn_user(message)


def refuse_percentage(amount: float, alive: int) -> None:
    """Refuse a count that may be meant as a percentage if it is below 1 %: training would run for hours with it.

    Raises:
        ValueError: If it is.
    """
    if 100 * amount < alive and (message := percentage_meant(amount, alive)) is not None:
        raise ValueError(message)
