"""Ways to remove whole channels of a network in place: by this package, and by torch-pruning alone.

The amount is of all parameters of the network; both stop at the first channel that reaches it. What makes the outputs
of a task stays whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch_pruning as tp
from torch import nn

from disparse_plugin.scoring.losses import Batch
from disparse_plugin.structured import remove_channels

from ..training.bench import Bench
from .cuts import Cut, Seen

FLOOR = 0.5  # of the channels that an even removal would leave
STEPS = 400  # that torch-pruning takes to the last channel; it stops in between


def channels(seen: Seen, **options: Any) -> Cut:
    """Remove channels by scores of this package; ``across`` is None unless given, as when the results were made."""
    options = {"across": None, **options}

    def cut(bench: Bench, model: nn.Module, amount: float | int) -> None:
        losses = bench.losses if seen == "tasks" else bench.summed
        remove_channels(model, losses, bench.scored, _example(bench), amount, of="parameters", **options)

    return cut


def channels_with_floor(**options: Any) -> Cut:
    """Remove channels by each task's own scores, but leave every layer half of what an even removal leaves."""

    def cut(bench: Bench, model: nn.Module, amount: float | int) -> None:
        even = math.sqrt(1 - amount)  # a weight goes with its input or its output channel
        channels("tasks", max_pruning_ratio=1 - FLOOR * even, **options)(bench, model, amount)

    return cut


def by_torch_pruning(importance: Callable[[], Any], *, gradients: bool = False) -> Cut:
    """Remove channels with torch-pruning's own pruner and importance, over all layers at once, in small steps.

    With ``gradients``, those of the summed loss over all scored batches are there for the importance to see.
    """

    def cut(bench: Bench, model: nn.Module, amount: float | int) -> None:
        if gradients:
            for batch in bench.scored:
                bench.summed(model, batch)["joint"].backward()
        pruner = tp.pruner.BasePruner(
            model,
            _example(bench),
            importance=importance(),
            global_pruning=True,
            pruning_ratio=1.0,
            max_pruning_ratio=1.0,
            iterative_steps=STEPS,
            ignored_layers=[_last_layer(head) for head in model.heads.values()],
        )
        target = (1 - amount) * _size(model)
        for _ in range(STEPS):
            if _size(model) <= target:
                break
            pruner.step()
        model.zero_grad()

    return cut


def _example(bench: Bench) -> Any:
    batch: Batch = bench.scored[0]
    return batch[0][:1]


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _last_layer(head: nn.Module) -> nn.Module:
    return [module for module in head.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]
