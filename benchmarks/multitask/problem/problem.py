"""What a multi-task problem is: its tasks with their losses and metrics, and its pictures in three splits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

from torch import Tensor
from torchmetrics import MetricCollection

Batch: TypeAlias = tuple[Tensor, dict[str, Tensor]]  # inputs, and the target of each task
Direction: TypeAlias = Literal["higher", "lower"]


class Split(Protocol):
    """Samples of a data set, in memory or on disk."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def batch(self, which: Tensor) -> Batch:
        """Return the samples of these indices (int64, one axis): float32 inputs ready for a network, and targets."""


@dataclass(frozen=True)
class Task:
    """One task: how many outputs it has, how it is trained and how it is judged.

    Outputs of dense tasks may be smaller than their targets; ``loss`` and ``metrics`` resize them.
    """

    name: str
    outputs: int  # classes, or channels of a map
    loss: Callable[[Tensor, Tensor], Tensor]  # output, target -> a scalar, the mean over what is labelled
    metrics: Callable[[], MetricCollection]  # makes a fresh collection to call update(output, target) on
    better: Mapping[str, Direction]  # the direction of every metric; relative changes are signed by it
    weight: float = 1.0  # of the task's loss in the sum that is trained


@dataclass(frozen=True)
class Problem:
    """Tasks over the same inputs, with a split to train on, one for every choice, and one to touch once."""

    name: str
    tasks: tuple[Task, ...]
    train: Split
    validation: Split
    test: Split
    shape: tuple[int, ...]  # of one input
    note: str = ""  # what every page with numbers from it must say
    facts: Mapping[str, str] = field(default_factory=dict)  # where the data come from, how they were split
