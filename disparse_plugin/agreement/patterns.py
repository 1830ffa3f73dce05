"""The shape of what is removed: single weights, n of every m, or whole channels.

A pattern is the last choice along the line, beside the criterion and the arbiter. It says what is one *unit*, turns
scores of weights into scores of units, and units that go into masks of weights.

==============  =====================================  ==================================================
name            unit                                   ``amount`` counts
==============  =====================================  ==================================================
``weights``     a weight                               weights (DiSparse)
``n:m``         a weight; n of every m inputs stay     nothing: left out, or ``1 - n / m``
``channels``    an output channel                      channels
==============  =====================================  ==================================================
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..arbiters import Arbiter
from ..errors import did_you_mean, wrong
from ..sorting import positions
from .amounts import count_to_prune
from .budgets import Budget
from .candidates import Candidates
from .consequences import warn_of_empty_tensors, warn_of_ties_at_zero
from .cut import lowest_in_budget
from .percentiles import agreement
from .ranking import distinct
from .tallies import count_true


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the units of one parameter lie.

    Attributes:
        name: Qualified name of the parameter.
        shape: Its shape.
        alive: Which entries are alive (bool, of that shape), or None where all are.
        inputs_first: 0 where dimension 0 holds the outputs, or else in how many groups it holds the inputs, as in
            :func:`~disparse_plugin.parameters.inputs_first`.
    """

    name: str
    shape: torch.Size
    alive: Tensor | None
    inputs_first: int = 0

    @functools.cached_property
    def positions(self) -> Tensor:
        """Where the alive entries lie, in row-major order; found once, because a device has to be waited for."""
        assert self.alive is not None
        return positions(self.alive.reshape(-1))


class Pattern(ABC):
    """What goes or stays as a whole, and how it is cut."""

    name: str

    @abstractmethod
    def units(self, values: Tensor, place: Place) -> Tensor:
        """Turn scores of weights into scores of the units alive; 1-D."""

    def magnitudes(self, weight: Tensor, place: Place) -> Tensor:
        """Turn weights into what decides between units of equal scores; 1-D, the sign does not matter."""
        return self.units(weight, place)

    @abstractmethod
    def sizes(self, place: Place) -> int:
        """Return how many units a parameter has, pruned ones included."""

    @abstractmethod
    def mask(self, keep: Tensor, place: Place) -> Tensor:
        """Turn what is kept of the units alive (bool, 1-D) into a mask of the parameter's shape."""

    def check(self, places: Sequence[Place]) -> None:
        """Check that all parameters can be pruned like this.

        Raises:
            ValueError: If one cannot; its message lists all of them, to be excluded.
        """
        unfit = [place for place in places if not self._fits(place)]
        if unfit:
            names = ", ".join(repr(place.name) for place in unfit)
            raise ValueError(
                f"pattern: {self._rule()}, found {unfit[0].name} of shape {tuple(unfit[0].shape)}; leave out what does "
                f"not fit: exclude=[{names}]"
            )

    def check_budget(self, budget: Budget) -> None:
        """Check a budget as far as that is possible without scores.

        Raises:
            TypeError: If there is no amount and the pattern does not say it.
            ValueError: If the budget has something that the pattern cannot do.
        """
        budget.required_amount()

    def removed(
        self, candidates: Candidates, tasks: Sequence[str], arbiter: Arbiter, budget: Budget, places: Sequence[Place]
    ) -> list[Tensor]:
        """Mark the units that go: bool, 1-D, one for each parameter.

        Raises:
            ValueError: As :meth:`Budget.quotas`.
        """
        floors = [
            budget.kept_of(self.sizes(place), alive) for place, alive in zip(places, candidates.sizes, strict=True)
        ]
        quotas = budget.quotas(candidates, tasks, floors)
        gone = lowest_in_budget(candidates, tasks, arbiter, quotas, floors)
        warn_of_ties_at_zero(candidates, gone)
        warn_of_empty_tensors([place.name for place in places], candidates.scores, gone, unit=self.name)
        return gone

    def _fits(self, place: Place) -> bool:  # noqa: ARG002
        return True

    def _rule(self) -> str:
        return f"{self.name!r} must fit every parameter"


class Weights(Pattern):
    """Single weights, wherever they lie."""

    name = "weights"

    def units(self, values: Tensor, place: Place) -> Tensor:
        """Take the alive entries, flat; without a mask that is a view."""
        flat = values.reshape(-1)
        return flat if place.alive is None else flat[place.positions]

    def sizes(self, place: Place) -> int:
        """Return the number of weights."""
        return place.shape.numel()

    def mask(self, keep: Tensor, place: Place) -> Tensor:
        """Put the alive entries back in place; False elsewhere."""
        return spread(keep, place)


@dataclasses.dataclass(frozen=True)
class NofM(Weights):
    """The n best of every m weights that follow each other along the input dimension, e.g. 2:4.

    Entries already pruned count as pruned: a block that has n or fewer alive loses nothing.
    """

    n: int
    m: int

    @property
    def name(self) -> str:  # type: ignore[override]
        """Return ``"n:m"``."""
        return f"{self.n}:{self.m}"

    def removed(
        self, candidates: Candidates, tasks: Sequence[str], arbiter: Arbiter, budget: Budget, places: Sequence[Place]
    ) -> list[Tensor]:
        """Mark, in each block, the lowest agreement scores of all but the n highest.

        Raises:
            ValueError: If the amount is not what the pattern makes.
        """
        kept = []
        magnitudes = candidates.magnitudes
        for index, (values, place) in enumerate(zip(agreement(candidates, tasks, arbiter), places, strict=True)):
            parted = distinct(values, None if magnitudes is None else magnitudes[index])
            full = spread(parted, place, fill=-torch.inf)
            kept.append(self.units(best_in_blocks(full, self.n, self.m), place))
        self._check_amount(budget, sum(keep.numel() - count_true(keep) for keep in kept), sum(candidates.sizes))
        return [~keep for keep in kept]

    def check_budget(self, budget: Budget) -> None:
        """Refuse floors and amounts per part: every block keeps n, in every part.

        Raises:
            ValueError: If there is one.
        """
        if budget.min_keep:
            raise ValueError(
                f"min_keep: must be left out with pattern={self.name!r}, found {budget.min_keep}; every block keeps "
                f"{self.n}"
            )
        if isinstance(budget.amount, Mapping):
            raise self.wrong_amount(dict(budget.amount))

    def _check_amount(self, budget: Budget, removed: int, alive: int) -> None:
        amount = budget.amount
        if amount is None or isinstance(amount, Mapping):
            return
        fitting = isinstance(amount, float) and math.isclose(amount, 1 - self.n / self.m)
        if not fitting and count_to_prune(amount, alive) != removed:
            raise self.wrong_amount(amount)

    def wrong_amount(self, found: object) -> ValueError:
        """Make the error about an amount that is not what the pattern makes of it."""
        fraction = 1 - self.n / self.m
        return ValueError(f"amount: must be left out with pattern={self.name!r} or be {fraction:.12g}, found {found}")

    def _fits(self, place: Place) -> bool:
        sizes = place.shape[:2]
        return len(sizes) > 0 and sizes[-1] % self.m == 0 and not place.inputs_first

    def _rule(self) -> str:
        return (
            f"with {self.name!r} every input dimension (dimension 1; transposed convolutions have no such) must be "
            f"divisible by {self.m}"
        )


class Channels(Pattern):
    """Whole output channels, masked; nothing gets smaller.

    A channel's score is the sum of the scores of its alive weights. Heads have channels too: exclude the layers that
    make the outputs, or their classes are masked.
    """

    name = "channels"

    def units(self, values: Tensor, place: Place) -> Tensor:
        """Sum over each channel that has an entry alive."""
        if place.alive is not None:
            values = values.masked_fill(~place.alive, 0)
        sums = _by_output(values, place).double().flatten(1).sum(1)
        alive = self.alive(place)
        return sums if alive is None else sums[alive]

    def magnitudes(self, weight: Tensor, place: Place) -> Tensor:
        """Sum the absolute values over each channel that has an entry alive."""
        return self.units(weight.abs(), place)

    def sizes(self, place: Place) -> int:
        """Return the number of output channels."""
        return place.inputs_first * place.shape[1] if place.inputs_first else place.shape[0]

    def mask(self, keep: Tensor, place: Place) -> Tensor:
        """Mask all weights of the channels that go."""
        channels = keep
        if (alive := self.alive(place)) is not None:
            channels = torch.zeros_like(alive)
            channels[alive] = keep
        if groups := place.inputs_first:
            inputs = channels.view(groups, 1, -1).expand(-1, place.shape[0] // groups, -1).flatten(0, 1)
        else:
            inputs = channels.view(-1, 1)
        mask = inputs.view(*inputs.shape, *[1] * (len(place.shape) - 2)).expand(place.shape)
        return mask.clone() if place.alive is None else mask & place.alive

    @staticmethod
    def alive(place: Place) -> Tensor | None:
        """Return which channels have a weight alive (bool, 1-D), or None where all weights are."""
        return None if place.alive is None else _by_output(place.alive, place).flatten(1).any(1)

    def _fits(self, place: Place) -> bool:
        return len(place.shape) > 1

    def _rule(self) -> str:
        return "with 'channels' every parameter must have two dimensions or more"


def _by_output(values: Tensor, place: Place) -> Tensor:
    """Return the values with the output channels along dimension 0."""
    if not place.inputs_first:
        return values
    by_output: Tensor = values.unflatten(0, (place.inputs_first, -1)).transpose(1, 2).flatten(0, 1)
    return by_output


def best_in_blocks(scores: Tensor, n: int, m: int) -> Tensor:
    """Mark the n highest of every m entries along the input dimension; of equal ones the last; -inf never.

    Args:
        scores: Any shape, floating point; dimension 1 (0 of a vector) is divisible by ``m``.
        n: How many of each block stay.
        m: Size of a block.

    Returns:
        bool, same shape.

    Example:
        >>> best_in_blocks(torch.tensor([[0.1, 0.9, 0.3, 0.8, 0.5, 0.6, 0.7, 0.2]]), 2, 4).int()
        tensor([[0, 1, 0, 1, 0, 1, 1, 0]], dtype=torch.int32)
    """
    dim = min(1, scores.dim() - 1)
    blocks = scores.movedim(dim, -1).unflatten(-1, (-1, m))
    # Ascending and stable: later ones of equal scores rank higher and stay.
    ranks = blocks.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
    keep = (ranks >= m - n).flatten(-2).movedim(-1, dim)
    best: Tensor = keep & (scores != -torch.inf)
    return best


def spread(values: Tensor, place: Place, fill: float = 0) -> Tensor:
    """Put values of the alive entries back in place; ``fill`` (0 is False) elsewhere."""
    if place.alive is None:
        return values.reshape(place.shape)
    full = values.new_full(place.shape, fill)
    full.view(-1)[place.positions] = values
    return full


WEIGHTS = Weights()
_BY_NAME: dict[str, Pattern] = {pattern.name: pattern for pattern in (WEIGHTS, Channels())}


def resolve(pattern: str | Pattern) -> Pattern:
    """Turn what a user passes as ``pattern`` into a :class:`Pattern`.

    Args:
        pattern: ``"weights"``, ``"channels"``, any ``"n:m"`` such as ``"2:4"``, or a pattern itself.

    Raises:
        TypeError: If it is neither a string nor a pattern.
        ValueError: If the name is unknown, or not ``1 <= n <= m``.

    Example:
        >>> resolve("2:4").name, resolve("weights").name
        ('2:4', 'weights')
    """
    if isinstance(pattern, Pattern):
        return pattern
    if not isinstance(pattern, str):
        raise TypeError(f"pattern: must be a name, found {wrong(pattern)}; e.g. '2:4'")
    if pattern in _BY_NAME:
        return _BY_NAME[pattern]
    if (found := re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", pattern)) is None:
        raise ValueError(
            f"pattern: must be one of {', '.join(_BY_NAME)}, n:m (e.g. 2:4), found "
            f"{pattern!r}{did_you_mean(pattern, _BY_NAME)}"
        )
    n, m = int(found[1]), int(found[2])
    if not 1 <= n <= m:
        raise ValueError(f"pattern: n of n:m must be from 1 to m, found {pattern!r}; 2:4 keeps two of every four")
    return NofM(n, m)
