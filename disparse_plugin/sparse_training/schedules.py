"""How much changes when: functions of the number of optimizer steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TypeAlias

# From the number of completed optimizer steps to a fraction in [0, 1].
Schedule: TypeAlias = Callable[[int], float]


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
        if not 0.0 <= self.start <= 1.0:
            raise ValueError(f"drop_fraction: must be in [0, 1], found {self.start}; 0.5 is usual, 0.0 never updates")

    def __call__(self, step: int) -> float:
        """Return the fraction at a step."""
        if step >= self.stop_at:
            return 0.0
        return self.start / 2 * (1 + math.cos(math.pi * step / self.stop_at))


@dataclasses.dataclass(frozen=True)
class CubicSparsity:
    """The total sparsity of automated gradual pruning: fast at first, slow at the end.

    ``final + (initial - final) * (1 - (t - start_at) / (stop_at - start_at)) ** 3`` between the two steps (Zhu and
    Gupta, 2017, equation 1).

    Attributes:
        final: The sparsity from ``stop_at`` on.
        stop_at: The step at which it is reached.
        start_at: The step at which pruning begins.
        initial: The sparsity there.

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
        if not 0.0 <= self.initial <= self.final <= 1.0:
            raise ValueError(
                f"final: must be in [initial, 1] with initial >= 0, found initial={self.initial}, final={self.final}"
            )
        if not 0 <= self.start_at < self.stop_at:
            raise ValueError(
                f"stop_at: must be above start_at >= 0, found start_at={self.start_at}, stop_at={self.stop_at}"
            )

    def __call__(self, step: int) -> float:
        """Return the sparsity at a step."""
        if step < self.start_at:
            return 0.0
        passed = min(1.0, (step - self.start_at) / (self.stop_at - self.start_at))
        return self.final + (self.initial - self.final) * (1 - passed) ** 3


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


def check_steps(argument: str, value: int) -> int:
    """Check a number of steps.

    Raises:
        TypeError: If it is not an int.
        ValueError: If it is below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument}: must be an int (optimizer steps), found {type(value).__name__}: {value!r}")
    if value < 1:
        raise ValueError(f"{argument}: must be at least 1 optimizer step, found {value}")
    return value


def describe(choice: object) -> str | float:
    """Describe a number, name, schedule or arbiter such that equal settings give equal descriptions in any process.

    Example:
        >>> describe(0.5), describe("unanimous"), describe(CosineDecay(0.5, 10)), describe(math.cos)
        (0.5, 'unanimous', 'CosineDecay(start=0.5, stop_at=10)', 'cos')
    """
    if isinstance(choice, str | int | float):
        return choice
    if dataclasses.is_dataclass(choice):
        return repr(choice)
    return str(getattr(choice, "__qualname__", type(choice).__qualname__))
