"""The methods that are compared: each trains a network of a bench to a sparsity, through this package's public API.

Four protocols, with the same number of training steps:

* one-shot: the dense network is trained, pruned, and what is left is tuned;
* iterative: the same, but pruned and tuned in rounds;
* at the start: the initial network is pruned, and trained for the steps of both stages;
* sparse training: masks move while the network is trained for the steps of both stages.

The lottery ticket alone takes more: it trains once to the end in every round. What a method for a single task sees is
the weighted sum of the losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal, TypeAlias

from torch import nn
from torch.nn.utils import prune

from disparse_plugin import (
    disparse_pretrained,
    disparse_static,
    layer_adaptive,
    prunable_parameters,
)
from disparse_plugin.budgets import part_of
from disparse_plugin.sparse_training import DiSparseScheduler, RewindPoint

from .bench import Bench, Course

Seen: TypeAlias = Literal["tasks", "sum"]  # what the criterion sees: each task's loss, or their weighted sum
Cut: TypeAlias = Callable[[Bench, nn.Module, float | int], None]  # prunes a network in place
Procedure: TypeAlias = Callable[[Bench, float, float], nn.Module]  # bench, amount, learning rate -> trained network

ROUNDS = 3
FLOOR = 0.25  # of the overall density
REWIND = 0.1  # the lottery ticket goes back to the weights after this share of the steps


@dataclass(frozen=True)
class Method:
    """A method: how it is called, what it does, and how much training it takes."""

    name: str
    family: Literal["dense", "one-shot", "iterative", "at the start", "sparse training"]
    procedure: Procedure
    steps: Callable[[Bench], int]  # optimizer steps, the dense training included
    ours: bool = False  # looks at the tasks one by one
    twin: str = ""  # the method that differs in seeing the weighted sum of the losses, and in nothing else
    without: str = ""  # the method that differs in having no floor and no budget per part, and in nothing else


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


def one_shot(cut: Cut) -> Procedure:
    """Prune the trained network, then tune it."""

    def procedure(bench: Bench, amount: float, rate: float) -> nn.Module:
        model = bench.dense()
        cut(bench, model, amount)
        Course(bench, model, bench.budget.tune, rate, stage=1).run()
        return model

    return procedure


def iterative(cut: Cut, rounds: int = ROUNDS) -> Procedure:
    """Prune the trained network in rounds, tuning after each with an equal share of the steps."""

    def procedure(bench: Bench, amount: float, rate: float) -> nn.Module:
        model = bench.dense()
        shares = [bench.budget.tune * (i + 1) // rounds - bench.budget.tune * i // rounds for i in range(rounds)]
        for stage, (count, steps) in enumerate(zip(counts(model, amount, rounds), shares, strict=True), start=1):
            cut(bench, model.eval(), count)
            Course(bench, model, steps, rate, stage=stage).run()
        return model

    return procedure


def lottery(cut: Cut, rounds: int = ROUNDS) -> Procedure:
    """Train to the end, prune, go back to early weights, in rounds (Frankle et al., ICML 2020)."""

    def procedure(bench: Bench, amount: float, rate: float) -> nn.Module:
        model = bench.initial()
        steps = bench.budget.train + bench.budget.tune
        course = Course(bench, model, steps, rate, stage=0)
        course.run(until=int(REWIND * steps))
        early, point = course.step, RewindPoint(model, course.optimizer)
        for count in counts(model, amount, rounds):
            course.run()
            cut(bench, model.eval(), count)
            point.rewind()
            course.step = early
        course.run()
        return model

    return procedure


def at_start(cut: Cut) -> Procedure:
    """Prune the initial network, then train what is left."""

    def procedure(bench: Bench, amount: float, rate: float) -> nn.Module:
        model = bench.initial()
        cut(bench, model, amount)
        Course(bench, model, bench.budget.train + bench.budget.tune, rate, stage=0).run()
        return model

    return procedure


def sparse_training(seen: Seen = "tasks", **options: Any) -> Procedure:
    """Train a sparse network from the start, with masks that may move."""

    def procedure(bench: Bench, amount: float, rate: float) -> nn.Module:
        model = bench.initial()
        steps = bench.budget.train + bench.budget.tune
        course = Course(bench, model, steps, rate, stage=0)
        losses = bench.losses if seen == "tasks" else bench.summed
        settings = {"update_every": bench.budget.update_every, "stop_at": 3 * steps // 4, "seed": bench.seed, **options}
        scheduler = DiSparseScheduler(model, course.optimizer, losses, amount=amount, **settings)
        course.run(after_step=scheduler.step)
        return model

    return procedure


def untouched(bench: Bench, _: float, rate: float) -> nn.Module:
    """Train the dense network on for as many steps as the pruned ones."""
    return one_shot(lambda *_: None)(bench, 0.0, rate)


def counts(model: nn.Module, amount: float, rounds: int) -> list[int]:
    """Return how many weights each round prunes, so that every round leaves the same share of what there is."""
    total = sum(getattr(module, name).numel() for module, name in prunable_parameters(model))
    kept = [total - round(total * (1 - (1 - amount) ** (i / rounds))) for i in range(rounds + 1)]
    kept[-1] = total - round(total * amount)
    return [before - after for before, after in pairwise(kept)]


def both_stages(bench: Bench) -> int:
    """Count the steps of training and tuning."""
    return bench.budget.train + bench.budget.tune


def lottery_steps(bench: Bench, rounds: int = ROUNDS) -> int:
    """Count the steps of the lottery ticket: all of them in every round and once more, without the early ones again."""
    steps = both_stages(bench)
    return steps + rounds * (steps - int(REWIND * steps))


adaptive = layer_adaptive("taylor")
trained = partial(scored, disparse_pretrained)
initial = partial(scored, disparse_static)


def _methods() -> Iterator[Method]:
    yield Method("dense", "dense", untouched, both_stages)
    yield from _one_shot_methods()
    yield from _iterative_methods()
    yield from _methods_at_the_start()
    yield from _sparse_training_methods()


def _one_shot_methods() -> Iterator[Method]:
    def make(name: str, cut: Cut, **facts: Any) -> Method:
        return Method(name, "one-shot", one_shot(cut), both_stages, **facts)

    yield make("random", plain(prune.RandomUnstructured))
    yield make("magnitude", plain(prune.L1Unstructured))
    yield make("LAMP", trained("sum", criterion="lamp"))
    yield make("Taylor, joint", trained("sum", criterion="taylor"))
    yield make("adaptive Taylor, joint", trained("sum", criterion=adaptive))
    yield make("DiSparse Taylor", trained("tasks", criterion="taylor"), ours=True, twin="Taylor, joint")
    yield make("DiSparse adaptive", trained("tasks", criterion=adaptive), ours=True, twin="adaptive Taylor, joint")
    yield make("Taylor, mean arbiter", trained("tasks", criterion="taylor", arbiter="mean"), ours=True)
    yield make("adaptive, mean arbiter", trained("tasks", criterion=adaptive, arbiter="mean"), ours=True)
    yield make("adaptive, any arbiter", trained("tasks", criterion=adaptive, arbiter="any"), ours=True)
    yield make(
        "DiSparse Taylor, floor",
        with_floor(disparse_pretrained, criterion="taylor"),
        ours=True,
        without="DiSparse Taylor",
    )
    yield make(
        "DiSparse Taylor, by part",
        by_part(disparse_pretrained, criterion="taylor"),
        ours=True,
        without="DiSparse Taylor",
    )
    yield make(
        "DiSparse adaptive, by part",
        by_part(disparse_pretrained, criterion=adaptive),
        ours=True,
        without="DiSparse adaptive",
    )


def _iterative_methods() -> Iterator[Method]:
    def make(name: str, cut: Cut, **facts: Any) -> Method:
        return Method(name, "iterative", iterative(cut), both_stages, **facts)

    twin = "adaptive joint, iterative"
    yield make("IMP", plain(prune.L1Unstructured))
    yield make(twin, trained("sum", criterion=adaptive))
    yield make("DiSparse adaptive, iterative", trained("tasks", criterion=adaptive), ours=True, twin=twin)
    yield Method("LTH", "iterative", lottery(plain(prune.L1Unstructured)), lottery_steps)


def _methods_at_the_start() -> Iterator[Method]:
    def make(name: str, cut: Cut, **facts: Any) -> Method:
        return Method(name, "at the start", at_start(cut), both_stages, **facts)

    yield make("SNIP", initial("sum", criterion="snip"))
    yield make("adaptive SNIP, joint", initial("sum", criterion=adaptive))
    yield make("DiSparse static", initial("tasks", criterion="snip"), ours=True, twin="SNIP")
    yield make(
        "DiSparse static, floor", with_floor(disparse_static, criterion="snip"), ours=True, without="DiSparse static"
    )
    yield make(
        "DiSparse static, by part", by_part(disparse_static, criterion="snip"), ours=True, without="DiSparse static"
    )
    yield make("DiSparse static adaptive", initial("tasks", criterion=adaptive), ours=True, twin="adaptive SNIP, joint")


def _sparse_training_methods() -> Iterator[Method]:
    def make(name: str, procedure: Procedure, **facts: Any) -> Method:
        return Method(name, "sparse training", procedure, both_stages, **facts)

    yield make("random ERK", sparse_training(drop_fraction=0.0))
    yield make("SET", sparse_training(criterion="random"))
    yield make("RigL", sparse_training("sum"))
    yield make("DiSparse dynamic", sparse_training(), ours=True, twin="RigL")


METHODS = {method.name: method for method in _methods()}
DENSE = METHODS["dense"]
