"""What is ranked and cut together: for each parameter, its units' scores by task, and their magnitudes.

A unit is what goes or stays as a whole: a single weight, or a channel. Only what is alive is a candidate.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .ranking import ranks


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The units of a model that are alive.

    Attributes:
        scores: For each parameter, what each task that reaches it scores: 1-D, floating point, in row-major order.
        magnitudes: For each parameter, 1-D, the weights (or sums of their absolute values): of equal scores the
            smaller absolute value goes first. None where the order alone decides.
        shares: Whether the scores are shares of their parameter already.
    """

    scores: Sequence[Mapping[str, Tensor]]
    magnitudes: Sequence[Tensor] | None = None
    shares: bool = False

    @functools.cached_property
    def sizes(self) -> list[int]:
        """How many units each parameter has."""
        return [first_of(rows).numel() for rows in self.scores]

    @property
    def devices(self) -> set[torch.device]:
        """Where the units lie."""
        return {first_of(rows).device for rows in self.scores}

    def magnitudes_of(self, parameters: Iterable[int]) -> list[Tensor] | None:
        """Return the magnitudes of some parameters, by index."""
        return None if self.magnitudes is None else [self.magnitudes[index] for index in parameters]

    def totals(self, tasks: Sequence[str]) -> dict[str, int]:
        """Return how many units each task reaches."""
        return {
            task: sum(size for size, rows in zip(self.sizes, self.scores, strict=True) if task in rows)
            for task in tasks
        }

    def ranks(self, task: str) -> dict[int, Tensor]:
        """Rank one task's scores among all that it reaches, from 0 on.

        Returns:
            For each parameter that the task reaches, by its index: whole numbers, 1-D, on the parameter's device.
        """
        return self.over_task(task, ranks)

    def over_task(self, task: str, function: Callable[[Tensor, Tensor | None], Tensor]) -> dict[int, Tensor]:
        """Apply a function to one task's scores over all parameters that it reaches, and hand each its part.

        Args:
            task: The task.
            function: From all scores of the task and their magnitudes, 1-D, to a tensor of that shape.

        Returns:
            The result for each parameter that the task reaches, by its index, on the parameter's device.
        """
        parts = {index: rows[task] for index, rows in enumerate(self.scores) if task in rows}
        if not parts:
            return {}
        joined = function(joined_on_one_device(parts.values()), self.joined_magnitudes(parts))
        split = joined.split([part.numel() for part in parts.values()])
        return {index: result.to(part.device) for (index, part), result in zip(parts.items(), split, strict=True)}

    def joined_magnitudes(self, parameters: Iterable[int]) -> Tensor | None:
        """Return the magnitudes of some parameters in one tensor, on the device of the first."""
        listed = self.magnitudes_of(parameters)
        return None if listed is None else joined_on_one_device(listed)


def first_of(rows: Mapping[str, Tensor]) -> Tensor:
    """Return the scores of the first task that reaches a parameter: for their number and device."""
    return next(iter(rows.values()))


def joined_on_one_device(parts: Iterable[Tensor]) -> Tensor:
    """Concatenate 1-D tensors on the device of the first."""
    listed = list(parts)
    return torch.cat([part.to(listed[0].device) for part in listed])
