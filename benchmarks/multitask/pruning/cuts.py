"""Ways to prune weights of a network in place: by scores of this package, and by what comes with torch.

What a method for a single task sees is the weighted sum of the losses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from torch import nn
from torch.nn.utils import prune

from disparse_plugin import prunable_parameters
from disparse_plugin.agreement.budgets import part_of

from ..training.bench import Bench

Seen: TypeAlias = Literal["tasks", "sum"]  # what the criterion sees: each task's loss, or their weighted sum
Cut: TypeAlias = Callable[[Bench, nn.Module, float | int], None]  # prunes a network in place

FLOOR = 0.25  # of the overall density


def scored(method: Callable[..., Any], seen: Seen, **options: Any) -> Cut:
    """Prune by scores of this package; ``seen="sum"`` makes it the method for a single task."""

    def cut(bench: Bench, model: nn.Module, amount: float | int) -> None:
        losses = bench.losses if seen == "tasks" else bench.summed
        method(model, losses, bench.scored, amount, **options)

    return cut


def with_floor(method: Callable[..., Any], **options: Any) -> Cut:
    """Prune by each task's own scores, but leave every tensor at least a part of the overall density."""

    def cut(bench: Bench, model: nn.Module, amount: float | int) -> None:
        method(model, bench.losses, bench.scored, amount, min_keep=FLOOR * (1 - amount), **options)

    return cut


def by_part(method: Callable[..., Any], **options: Any) -> Cut:
    """Prune by each task's own scores, the same share of the shared weights as of each task's own."""

    def cut(bench: Bench, model: nn.Module, amount: float | int) -> None:
        parts = {part_of(tasks): amount for tasks in bench.parts.values()}
        method(model, bench.losses, bench.scored, parts, **options)

    return cut


def plain(method: type[prune.BasePruningMethod]) -> Cut:
    """Prune by a method that comes with torch."""

    def cut(_: Bench, model: nn.Module, amount: float | int) -> None:
        prune.global_unstructured(prunable_parameters(model), method, amount=amount)

    return cut
