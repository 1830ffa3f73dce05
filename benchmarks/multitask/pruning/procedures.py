"""Protocols around a cut: each makes a trained network of a bench with an amount pruned.

Five of them, with the same number of training steps:

* one-shot: the dense network is trained, pruned, and what is left is tuned;
* iterative: the same, but pruned and tuned in rounds;
* at the start: the initial network is pruned, and trained for the steps of both stages;
* on the way: the network is pruned while it is trained for the steps of both stages;
* sparse training: masks move while the network is trained for the steps of both stages.

The lottery ticket alone takes more: it trains once to the end in every round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeAlias

from torch import nn

from disparse_plugin import prunable_parameters
from disparse_plugin.masks import masks_of
from disparse_plugin.sparse_training import DiSparseScheduler, GradualPruning, RewindPoint

from ..training.bench import Bench, Course
from .cuts import Cut, Seen

Procedure: TypeAlias = Callable[[Bench, float, float], nn.Module]  # bench, amount, learning rate -> trained network

ROUNDS = 3
REWIND = 0.1  # the lottery ticket goes back to the weights after this share of the steps


@dataclass(frozen=True)
class Plan:
    """One course of training with cuts on the way; written down, so that many can be carried out side by side.

    Called with a bench, an amount and a learning rate, it makes the network, as every procedure.
    """

    cut: Cut | None
    start: Literal["dense", "initial"]  # tune the trained network, or train the initial one for the steps of both
    when: tuple[float, ...] = (0.0,)  # after which shares of the course it cuts; the last is to the whole amount
    times: int = 1  # how many times the steps of the budget a trained network is tuned for

    @property
    def stage(self) -> int:
        """Which order of the batches it trains in."""
        return 1 if self.start == "dense" else 0

    def steps(self, bench: Bench) -> int:
        """Count the steps of the course."""
        return self.times * bench.budget.tune if self.start == "dense" else both_stages(bench)

    def network(self, bench: Bench) -> nn.Module:
        """Return what it starts from."""
        return bench.dense() if self.start == "dense" else bench.initial()

    def cuts(self, bench: Bench, amount: float) -> dict[int, float]:
        """Return how much is pruned in all after which steps: several times, by the cubic schedule."""
        if self.cut is None:
            return {}
        steps, several = self.steps(bench), len(self.when)
        return {
            round(share * steps): amount * (1 - (1 - place / several) ** 3)
            for place, share in enumerate(self.when, start=1)
        }

    def __call__(self, bench: Bench, amount: float, rate: float) -> nn.Module:
        """Carry it out."""
        model = self.network(bench)
        course = Course(bench, model, self.steps(bench), rate, stage=self.stage)
        for step, share in self.cuts(bench, amount).items():
            course.run(until=step)
            assert self.cut is not None
            cut_to(self.cut, bench, model.eval() if step else model, share)
        course.run()
        return model


def cut_to(cut: Cut, bench: Bench, model: nn.Module, amount: float) -> None:
    """Prune until a share of all weights is pruned in total."""
    masks = masks_of(model)
    if not masks:
        cut(bench, model, amount)
        return
    total = sum(getattr(module, name).numel() for module, name in prunable_parameters(model))
    cut(bench, model, round(amount * total) - sum(int((~mask).sum()) for mask in masks.values()))


def one_shot(cut: Cut | None, times: int = 1) -> Procedure:
    """Prune the trained network, then tune it, for so many times the steps of the budget."""
    return Plan(cut, "dense", times=times)


def iterative(cut: Cut, rounds: int = ROUNDS, times: int = 1) -> Procedure:
    """Prune the trained network in rounds, tuning after each with an equal share of so many times the steps."""

    def procedure(bench: Bench, amount: float, rate: float) -> nn.Module:
        model, tune = bench.dense(), times * bench.budget.tune
        shares = [tune * (i + 1) // rounds - tune * i // rounds for i in range(rounds)]
        for stage, (count, steps) in enumerate(zip(counts(model, amount, rounds), shares, strict=True), start=1):
            cut(bench, model.eval(), count)
            Course(bench, model, steps, rate, stage=stage).run()
        return model

    return procedure


def lottery(cut: Cut, rounds: int = ROUNDS, share: float = 1.0) -> Procedure:
    """Train to the end, prune, go back to early weights, in rounds (Frankle et al., ICML 2020).

    Each of the trainings takes a share of the steps of both stages.
    """

    def procedure(bench: Bench, amount: float, rate: float) -> nn.Module:
        model = bench.initial()
        steps = round(share * both_stages(bench))
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
    return Plan(cut, "initial")


def on_the_way(cut: Cut, when: tuple[float, ...]) -> Procedure:
    """Prune while training, after these shares of the steps of both stages."""
    return Plan(cut, "initial", when)


def gradual_pruning(bench: Bench, amount: float, rate: float) -> nn.Module:
    """Prune while training by the package's own scheduler as it is by default: often, each time on one batch."""
    model, steps = bench.initial(), both_stages(bench)
    course = Course(bench, model, steps, rate, stage=0)
    pruning = GradualPruning(model, course.optimizer, bench.losses, amount=amount, total_steps=steps)
    course.run(after_step=pruning.step)
    return model


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


untouched: Procedure = one_shot(None)  # train the dense network on for as many steps as the pruned ones


def counts(model: nn.Module, amount: float, rounds: int) -> list[int]:
    """Return how many weights each round prunes, so that every round leaves the same share of what there is."""
    total = sum(getattr(module, name).numel() for module, name in prunable_parameters(model))
    kept = [total - round(total * (1 - (1 - amount) ** (i / rounds))) for i in range(rounds + 1)]
    kept[-1] = total - round(total * amount)
    return [before - after for before, after in pairwise(kept)]


def both_stages(bench: Bench) -> int:
    """Count the steps of training and tuning."""
    return bench.budget.train + bench.budget.tune


def lottery_steps(bench: Bench, rounds: int = ROUNDS, share: float = 1.0) -> int:
    """Count the steps of the lottery ticket: all of them in every round and once more, without the early ones again."""
    steps = round(share * both_stages(bench))
    return steps + rounds * (steps - int(REWIND * steps))
