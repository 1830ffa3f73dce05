"""How much changes when: functions of the number of optimizer steps."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import TypeAlias

from .. import arbiters
from ..agreement.amounts import count_to_prune, refuse_percentage, warn_of_percentage
from ..agreement.patterns import WEIGHTS, Pattern
from ..arbiters import Arbiter
from ..errors import wrong
from ..kinds import check_fraction, check_number, whole_number

# From the number of completed optimizer steps to a fraction in [0, 1]; of what is pruned, also to a count (int).
Schedule: TypeAlias = Callable[[int], float]

# The share of a training after which masks are exchanged no more, where nothing else is said: the convention of RigL
# and DiSparse (Evci et al., ICML 2020; Sun et al., CVPR 2022), not a result of this package.
STOP_AFTER = 0.75
# The same of gradual pruning: ahead of a cut at a quarter and of stages until three quarters on yeast, on validation
# and on test data, and level with them on clothes and digits (docs/results_long_regime.md, "Asked again").
PRUNED_AFTER = 0.5


@dataclasses.dataclass(frozen=True)
class CosineDecay:
    """The drop fraction of RigL and DiSparse: ``start / 2 * (1 + cos(pi * t / stop_at))``, 0 from ``stop_at`` on.

    Source: Evci et al., ICML 2020, section 3(2); the same in the DiSparse authors' code.

    Attributes:
        start: The fraction at step 0.
        stop_at: The step at which it reaches 0.

    Example:
        >>> decay = CosineDecay(0.5, 100)
        >>> decay(0), decay(50), decay(100)
        (0.5, 0.25, 0.0)
    """

    start: float
    stop_at: int

    def __post_init__(self) -> None:
        check_fraction("start", self.start)
        check_steps("stop_at", self.stop_at)

    def __call__(self, step: int) -> float:
        """Return the fraction at a step."""
        if step >= self.stop_at:
            return 0.0
        return self.start / 2 * (1 + math.cos(math.pi * step / self.stop_at))


@dataclasses.dataclass(frozen=True)
class CubicSparsity:
    """The total sparsity of automated gradual pruning: fast at first, slow at the end.

    ``final + (initial - final) * (1 - (t - start_at) / (stop_at - start_at)) ** 3`` between the two steps, ``initial``
    before and ``final`` after (Zhu and Gupta, 2017, equation 1). With ``start_at == stop_at`` it is a single cut.

    Attributes:
        final: The sparsity from ``stop_at`` on.
        stop_at: The step at which it is reached.
        start_at: The step at which pruning begins.
        initial: The sparsity there, and before.

    Example:
        >>> schedule = CubicSparsity(0.8, stop_at=100)
        >>> [round(schedule(t), 4) for t in (0, 50, 100, 150)]
        [0.0, 0.7, 0.8, 0.8]
    """

    final: float
    stop_at: int
    start_at: int = 0
    initial: float = 0.0

    def __post_init__(self) -> None:
        check_number("initial", self.initial)
        check_number("final", self.final)
        if not 0.0 <= self.initial <= self.final <= 1.0:
            raise ValueError(
                f"final: must be in [initial, 1] with initial >= 0, found initial={self.initial}, final={self.final}"
            )
        check_window(self.start_at, self.stop_at)

    def __call__(self, step: int) -> float:
        """Return the sparsity at a step."""
        if step >= self.stop_at:
            return self.final
        passed = max(0, step - self.start_at) / max(1, self.stop_at - self.start_at)
        return self.final + (self.initial - self.final) * (1 - passed) ** 3


def check_schedule(argument: str, value: object) -> None:
    """Check that there is a number or a function of the step.

    Raises:
        TypeError: If there is something else, such as the class of a schedule.

    Example:
        >>> check_schedule("drop_fraction", "0.5")
        Traceback (most recent call last):
        TypeError: drop_fraction: must be a number or a function of the step, found str: '0.5'
    """
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number and (not callable(value) or isinstance(value, type)):
        raise TypeError(f"{argument}: must be a number or a function of the step, found {wrong(value)}")


def check_drop_fraction(value: object) -> None:
    """Check the share to exchange: a fraction, or a function of the step.

    Raises:
        TypeError: If it is something else.
        ValueError: If it is out of range.
    """
    check_schedule("drop_fraction", value)
    if not callable(value):
        check_fraction("drop_fraction", value, "; 0.5 is usual, 0.0 never updates")


def check_when(argument: str, when: float, least: int = 1) -> float:
    """Check a step, or a fraction of the training.

    Raises:
        TypeError: If it is neither an int nor a float.
        ValueError: If a step is below ``least``, or a fraction is not in [0, 1].

    Example:
        >>> check_when("stop_at", 1.5)
        Traceback (most recent call last):
        ValueError: stop_at: a float must be a fraction of the training in [0, 1], found 1.5; a step is an int
    """
    if isinstance(when, bool) or not isinstance(when, numbers.Real):
        raise TypeError(f"{argument}: must be an int (step) or a float (fraction of the training), found {wrong(when)}")
    if isinstance(when, numbers.Integral):
        return check_steps(argument, int(when), least)
    if not 0.0 <= float(when) <= 1.0:
        raise ValueError(
            f"{argument}: a float must be a fraction of the training in [0, 1], found {when}; a step is an int"
        )
    return float(when)


def step_of(argument: str, when: float, total_steps: int | None, least: int = 1) -> int:
    """Turn a step or a fraction of the training into a step.

    Raises:
        TypeError: As :func:`check_when`.
        ValueError: As :func:`check_when`, or if there is a fraction and no ``total_steps``.

    Example:
        >>> step_of("stop_at", 0.75, 1000), step_of("stop_at", 600, None)
        (750, 600)
    """
    when = check_when(argument, when, least)
    total_steps = None if total_steps is None else check_steps("total_steps", total_steps)
    if isinstance(when, int):
        return when
    if total_steps is None:
        raise ValueError(
            f"total_steps: must be given where {argument} is a fraction of the training, found None with {argument}="
            f"{when}; pass the optimizer steps of the training, or {argument} as a step (int)"
        )
    return max(least, int(when * total_steps + 1e-9))


def check_window(start_at: int, stop_at: int) -> None:
    """Check that a window of steps does not end before it begins.

    Raises:
        ValueError: If it does, or begins below 0.
    """
    if not 0 <= whole_number("start_at", start_at) <= whole_number("stop_at", stop_at):
        raise ValueError(
            f"stop_at: must be at least start_at, and that at least 0, found start_at={start_at}, stop_at={stop_at}"
        )


def checked(schedule: Schedule, step: int, argument: str) -> float:
    """Evaluate a schedule that may be the user's own.

    Raises:
        ValueError: If the value is not a fraction.

    Example:
        >>> checked(lambda step: 2.0, 7, "drop_fraction")
        Traceback (most recent call last):
        ValueError: drop_fraction: a schedule must return a fraction in [0, 1], found 2.0 at step 7
    """
    value = float(schedule(step))
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{argument}: a schedule must return a fraction in [0, 1], found {value} at step {step}")
    return value


def cubic(amount: float, total: int, start_at: int, stop_at: int) -> CubicSparsity:
    """Make the default schedule of gradual pruning for a fraction or a count of ``total`` weights.

    Raises:
        TypeError: If ``amount`` is neither int nor float.
        ValueError: If it is out of range, or a count that looks like a percentage.

    Example:
        >>> schedule = cubic(700, 1000, start_at=0, stop_at=10)
        >>> schedule, count_at(schedule, 10, 1000)
        (CubicSparsity(final=0.7, stop_at=10, start_at=0, initial=0.0), 700)
    """
    count = checked_count(amount, total)
    warn_of_percentage(amount, total)
    final = count / total if isinstance(amount, numbers.Integral) else float(amount)
    return CubicSparsity(final, stop_at, start_at)


def count_at(schedule: Schedule, step: int, total: int) -> int:
    """Return how many of ``total`` weights a schedule wants masked at a step.

    Raises:
        ValueError: If it returns neither a fraction (float) nor a count (int). Counts may be small: a ramp begins so.

    Example:
        >>> count_at(lambda step: 0.5, 7, 1000), count_at(lambda step: 500, 7, 1000)
        (500, 500)
    """
    value = schedule(step)
    if isinstance(value, numbers.Integral):
        return count_to_prune(value, total)
    return round(checked(lambda _: value, step, "amount") * total)


def checked_count(amount: float, total: int) -> int:
    """Turn an amount into a count of ``total``; refuse whole numbers that can only be meant as percentages.

    Raises:
        TypeError: If ``amount`` is neither int nor float.
        ValueError: If it is out of range, or a count of 1 to 100 that is below 1 % of the whole.

    Example:
        >>> checked_count(90, 5000), checked_count(0.5, 50_000)
        (90, 25000)
    """
    count = count_to_prune(amount, total)
    refuse_percentage(amount, total)
    return count


def check_steps(argument: str, value: int, least: int = 1) -> int:
    """Check a number of steps, and return it as an int of Python.

    Raises:
        TypeError: If it is not an int.
        ValueError: If it is below ``least``.

    Example:
        >>> check_steps("update_every", 0)
        Traceback (most recent call last):
        ValueError: update_every: must be at least 1, found 0
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{argument}: must be an int, found {wrong(value)}")
    if value < least:
        raise ValueError(f"{argument}: must be at least {least}, found {value}")
    return int(value)


def describe_arbiter(arbiter: str | Arbiter) -> str:
    """Describe an arbiter as :func:`describe` does; its object and its name as reports print it are the same.

    Example:
        >>> describe_arbiter("at_least(2)"), describe_arbiter("any")
        ('AtLeast(k=2)', 'any')
    """
    rule = arbiters.resolve(arbiter)
    return str(describe(rule if isinstance(rule, arbiters.AtLeast) else arbiter))


def given_since(*, min_keep: float = 0, pattern: Pattern) -> dict[str, str | float]:
    """Describe options that did not exist once, only where they are used: so states saved before then still load.

    Example:
        >>> given_since(min_keep=2, pattern=WEIGHTS)
        {'min_keep': 2}
    """
    return {
        **({"min_keep": describe(min_keep)} if min_keep else {}),
        **({} if pattern is WEIGHTS else {"pattern": pattern.name}),
    }


def describe(choice: object) -> str | float:
    """Describe a number, name, schedule or arbiter such that equal settings give equal descriptions in any process.

    Example:
        >>> describe(0.5), describe("unanimous"), describe(CosineDecay(0.5, 10)), describe(math.cos)
        (0.5, 'unanimous', 'CosineDecay(start=0.5, stop_at=10)', 'cos')
    """
    if isinstance(choice, str):
        return choice
    if isinstance(choice, numbers.Real):  # numpy's become Python's, which files of tensors and plain values can hold
        return int(choice) if isinstance(choice, numbers.Integral) else float(choice)
    if dataclasses.is_dataclass(choice):
        return repr(choice)
    return str(getattr(choice, "__qualname__", type(choice).__qualname__))
