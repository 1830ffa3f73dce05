"""A made-up problem of two tasks for the benchmark's harness: small enough to run every method on."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from multitask.data.splits import InMemory
from multitask.problem.problem import Problem, Task
from multitask.problem.tasks import classification
from multitask.training.bench import Budget, Setting
from multitask.training.networks import mlp

BUDGET = Budget(12, 6, batch_size=16, scored=2, rates=(1e-3, 1e-2), optimizer="adamw", update_every=3)


class Signs:
    """Whether sums of some features are positive, one task per group of features."""

    def __init__(self, count: int, seed: int) -> None:
        self.inputs = torch.randn(count, 12, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, which: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = self.inputs[which]
        return inputs, {"left": (inputs[:, :4].sum(1) > 0).long(), "right": (inputs[:, 4:].sum(1) > 0).long()}


def metrics() -> MetricCollection:
    return MetricCollection({"accuracy": MulticlassAccuracy(2, average="micro")})


def made_up(_: Path = Path()) -> Problem:
    tasks = tuple(Task(name, 2, F.cross_entropy, metrics, {"accuracy": "higher"}) for name in ("left", "right"))
    return Problem("signs", tasks, Signs(100, 0), Signs(40, 1), Signs(40, 2), (12,), note="Made up.")


def in_memory(_: Path = Path()) -> Problem:
    """The made-up problem with its samples as tensors."""
    problem = made_up()
    splits = {}
    for name in ("train", "validation", "test"):
        split = getattr(problem, name)
        inputs, targets = split.batch(torch.arange(len(split)))
        splits[name] = InMemory(inputs, targets, torch.zeros(12), torch.ones(12))
    tasks = (classification("left", 2), classification("right", 2, weight=3.0))
    return replace(problem, tasks=tasks, **splits)


SETTING = Setting("signs", made_up, mlp, BUDGET)


def command(out: Path, *more: str) -> list[str]:
    return ["--data", "signs", "--out", str(out), "--seeds", "2", "--amounts", "0.9", "0.98", *more]
