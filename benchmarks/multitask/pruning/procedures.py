"""Protocols around a cut: each makes a trained network of a bench with an amount pruned.

Four of them, with the same number of training steps:

* one-shot: the dense network is trained, pruned, and what is left is tuned;
* iterative: the same, but pruned and tuned in rounds;
* at the start: the initial network is pruned, and trained for the steps of both stages;
* sparse training: masks move while the network is trained for the steps of both stages.

The lottery ticket alone takes more: it trains once to the end in every round.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypeAlias

from torch import nn

from disparse_plugin import prunable_parameters
from disparse_plugin.sparse_training import DiSparseScheduler, RewindPoint

from ..training.bench import Bench, Course
from .cuts import Cut, Seen

Procedure: TypeAlias = Callable[[Bench, float, float], nn.Module]  # bench, amount, learning rate -> trained network

ROUNDS = 3
REWIND = 0.1  # the lottery ticket goes back to the weights after this share of the steps


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
