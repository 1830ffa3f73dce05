"""The labels of the tensors of a run, as the rules of operations see them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from .labels import Labels, Row, Rows


class Noted(Protocol):
    """The labels of the tensors of a run.

    Attributes:
        labels: All of them.
        whole: As in :meth:`Labels.reshaped`.
        unknown: What labels met that cannot be followed, in words.
    """

    labels: Labels
    whole: bool
    unknown: set[str]

    def rows(self, tensor: Tensor) -> Rows:
        """Return the labels of each dimension of a tensor."""

    def is_made(self, tensor: Tensor) -> bool:
        """Tell whether a tensor was made from nothing (zeros, a range), and so would be made in another size."""


# From the arguments and the result to the labels of the result, one for each tensor in it.
Rule: TypeAlias = Callable[[Noted, Sequence[Any], dict[str, Any], Any], list[Rows]]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from tensors_in(entry)


def broadcast(noted: Noted, inputs: Sequence[Tensor], shape: Sequence[int]) -> Rows:
    """Unite the labels of what stands in the same place; a dimension of size one goes with anything."""
    found: list[Row | None] = []
    for back in range(len(shape), 0, -1):
        own = [t for t in inputs if t.dim() >= back and t.shape[-back] == shape[-back] > 1]
        found.append(noted.labels.merged([noted.rows(t)[-back] for t in own]))
    return tuple(found)


def elementwise(noted: Noted, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> list[Rows]:
    """Unite what stands in the same place; a dimension of size one goes with anything."""
    inputs = [t for t in tensors_in([*args, *kwargs.values()]) if not noted.is_made(t)]
    return [broadcast(noted, inputs, result.shape) for result in tensors_in(out)]
