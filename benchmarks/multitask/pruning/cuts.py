"""Ways to prune weights of a network in place: by scores of this package, and by what comes with torch.

What a method for a single task sees is the weighted sum of the losses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn
from torch.nn.utils import prune

from disparse_plugin import prunable_parameters, score_tasks
from disparse_plugin.agreement.budgets import part_of
from disparse_plugin.arbiters import Arbiter
from disparse_plugin.criteria import Criterion, resolve

from ..training.bench import Bench

Seen: TypeAlias = Literal["tasks", "sum"]  # what the criterion sees: each task's loss, or their weighted sum
Cut: TypeAlias = Callable[[Bench, nn.Module, float | int], None]  # prunes a network in place

FLOOR = 0.25  # of the overall density


@dataclass(frozen=True)
class Scored:
    """Prune by scores of this package; ``seen="sum"`` makes it the method for a single task."""

    method: Callable[..., Any]
    seen: Seen
    criterion: str | Criterion
    arbiter: str | Arbiter = "unanimous"
    batches: int | None = None  # how many of those that the bench scores on; all by default

    def __call__(self, bench: Bench, model: nn.Module, amount: float | int) -> None:
        """Score the network, and prune it."""
        losses = bench.losses if self.seen == "tasks" else bench.summed
        self.method(model, losses, bench.scored[: self.batches], amount, criterion=self.criterion, arbiter=self.arbiter)

    def of_dense(self, bench: Bench, amount: float) -> dict[str, Tensor]:
        """Return the masks that it puts on the trained network, by parameter; scored once for all amounts and arbiters.

        The trained network is the same for all, so its scores are too.
        """
        key = f"{self.seen} {resolve(self.criterion).name}"
        if key not in bench.scores_of_dense:
            losses = bench.losses if self.seen == "tasks" else bench.summed
            bench.scores_of_dense[key] = score_tasks(bench.dense(), losses, bench.scored, criterion=self.criterion)
        scores = bench.scores_of_dense[key]
        masks = scores.masks(amount, self.arbiter)
        return {name: masks[key] for name, key in zip(scores.names, scores.parameters, strict=True)}


scored = Scored


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
        for module in model.modules():
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, prune.BasePruningMethod):
                    hook(module, ())  # the masked weight of before the last step, which torch would rank
        prune.global_unstructured(prunable_parameters(model), method, amount=amount)

    return cut
