"""Whole settings at once: the same runs as in :mod:`.runs`, with networks of one shape trained side by side.

Only for methods that are written down as a :class:`.pruning.procedures.Plan`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from disparse_plugin.masks import masks_of

from .data.splits import InMemory
from .problem.problem import Problem
from .problem.relative import mean_change
from .pruning.cuts import Scored
from .pruning.methods import Method
from .pruning.procedures import Plan, cut_to
from .runs import TUNING_SEED, Run
from .training.bench import Bench, Setting
from .training.stack import Stack, StackedCourse

State = Mapping[str, Tensor]
LOOKS = 6  # at the dense network's validation metrics while it is trained


@dataclass(frozen=True)
class Job:
    """A network to make."""

    method: Method
    amount: float
    seed: int
    rate: float

    @property
    def plan(self) -> Plan:
        """How it is made."""
        if not isinstance(self.method.procedure, Plan):
            raise ValueError(f"method: needs one with a plan, found {self.method.name}; run it one network at a time")
        return self.method.procedure


def on_device(problem: Problem, device: torch.device) -> Problem:
    """Return the problem with its samples on a device.

    Raises:
        ValueError: If they are not in memory.
    """
    splits = {}
    for name in ("train", "validation", "test"):
        split = getattr(problem, name)
        if not isinstance(split, InMemory):
            raise ValueError(f"problem: needs samples in memory, found {type(split).__name__}; run one at a time")
        splits[name] = split.to(device)
    return replace(problem, **splits)


def dense_rates(
    setting: Setting, problem: Problem, device: torch.device
) -> tuple[dict[str, float], list[dict[str, float]], dict[str, dict[str, Tensor]]]:
    """Train the dense network of the tuning seed with every learning rate.

    Returns:
        The validation score of every rate; the same on the way, ``{"step": ..., rate: ...}`` a line; the states after
        the training proper, by rate.
    """
    bench = Bench(setting, problem, TUNING_SEED, 0.0, device)
    budget, rates = setting.budget, setting.budget.rates
    stack = Stack(bench.initial(), len(rates))
    first = StackedCourse(stack, problem, budget, rates, _orders([bench] * len(rates), budget.train, 0))
    measured, steps = [], []
    for look in range(1, LOOKS + 1):
        first.run(until=look * budget.train // LOOKS)
        measured.append(stack.measure(problem, problem.validation, budget.evaluated))
        steps.append(first.step)
    states = {str(rate): _state(stack, place) for place, rate in enumerate(rates)}
    StackedCourse(stack, problem, budget, rates, _orders([bench] * len(rates), budget.tune, 1)).run()
    final = stack.measure(problem, problem.validation, budget.evaluated)
    tried = {str(rate): mean_change(problem.tasks, final[place], final[0]) for place, rate in enumerate(rates)}
    curve = [
        {"step": step, **{str(r): mean_change(problem.tasks, now[i], measured[-1][0]) for i, r in enumerate(rates)}}
        for step, now in zip(steps, measured, strict=True)
    ]
    return tried, curve, states


def dense_networks(
    setting: Setting, problem: Problem, seeds: Sequence[int], rate: float, device: torch.device
) -> dict[int, dict[str, Tensor]]:
    """Train the dense networks of several seeds; return their states by seed."""
    benches = [Bench(setting, problem, seed, rate, device) for seed in seeds]
    stack = Stack(benches[0].initial(), len(seeds))
    for place, bench in enumerate(benches):
        stack.put(place, bench.initial())
    steps = setting.budget.train
    StackedCourse(stack, problem, setting.budget, [rate] * len(seeds), _orders(benches, steps, 0)).run()
    return {seed: _state(stack, place) for place, seed in enumerate(seeds)}


def make_benches(
    setting: Setting, problem: Problem, seeds: Iterable[int], states: Mapping[int, State], device: torch.device
) -> dict[int, Bench]:
    """Make a bench per seed, with the dense network where its state is given."""
    benches = {seed: Bench(setting, problem, seed, 0.0, device) for seed in seeds}
    for seed, bench in benches.items():
        if seed in states:
            bench.set_dense(states[seed])
    return benches


def carry_out(jobs: Sequence[Job], benches: Mapping[int, Bench]) -> Stack:
    """Make the networks of jobs that all start from the dense network, or all from the initial one."""
    if len({job.plan.start for job in jobs}) != 1:
        raise ValueError("jobs: need to start alike, found several starts; carry them out apart")
    owners = [benches[job.seed] for job in jobs]
    if jobs[0].plan.start == "dense" and (lacking := sorted({each.seed for each in owners if not each.has_dense})):
        raise ValueError(f"benches: need dense networks, found none of seeds {lacking}; train them, and set_dense each")
    plan, problem = jobs[0].plan, owners[0].problem
    stack = Stack(owners[0].initial(), len(jobs))
    for place, (job, bench) in enumerate(zip(jobs, owners, strict=True)):
        stack.put(place, job.plan.network(bench))
    orders = _orders(owners, plan.steps(owners[0]), plan.stage)
    course = StackedCourse(stack, problem, owners[0].budget, [job.rate for job in jobs], orders)
    events: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for place, (job, bench) in enumerate(zip(jobs, owners, strict=True)):
        for step, amount in job.plan.cuts(bench, job.amount).items():
            events[step].append((place, amount))
    for step in sorted(events):
        course.run(until=step)
        for place, amount in events[step]:
            stack.mask(place, _masks(stack, place, jobs[place].plan, owners[place], amount, first=step == 0))
    course.run()
    return stack


def _masks(stack: Stack, place: int, plan: Plan, bench: Bench, amount: float, *, first: bool) -> dict[str, Tensor]:
    """Return the masks of a network after a cut."""
    assert plan.cut is not None
    torch.manual_seed(bench.seed)
    if first and plan.start == "dense" and isinstance(plan.cut, Scored):
        return plan.cut.of_dense(bench, amount)
    model = plan.network(bench) if first else stack.take(place).eval()
    cut_to(plan.cut, bench, model, amount)
    return masks_of(model)


def scores_of_rates(jobs: Sequence[Job], benches: Mapping[int, Bench], dense: Bench) -> dict[str, dict[str, float]]:
    """Carry out jobs of the tuning seed; return each method's validation score by learning rate."""
    problem, size = dense.problem, dense.budget.evaluated
    stack = carry_out(jobs, benches)
    reference = dense.measure(dense.dense(), problem.validation)
    tried: dict[str, dict[str, float]] = defaultdict(dict)
    for job, measured in zip(jobs, stack.measure(problem, problem.validation, size), strict=True):
        tried[job.method.name][str(job.rate)] = mean_change(problem.tasks, measured, reference)
    return dict(tried)


def runs_of(setting: str, jobs: Sequence[Job], benches: Mapping[int, Bench]) -> Iterator[Run]:
    """Carry out jobs and measure what came out: also on the test split, unless the seeds are not to be reported."""
    start = time.process_time()
    stack = carry_out(jobs, benches)
    seconds = (time.process_time() - start) / len(jobs)
    problem = benches[jobs[0].seed].problem
    size = benches[jobs[0].seed].budget.evaluated
    reported = all(job.seed < TUNING_SEED for job in jobs)
    validation = stack.measure(problem, problem.validation, size)
    test = stack.measure(problem, problem.test, size) if reported else [{}] * len(jobs)
    for place, job in enumerate(jobs):
        bench = benches[job.seed]
        yield Run(
            setting=setting,
            method=job.method.name,
            amount=job.amount,
            seed=job.seed,
            rate=job.rate,
            steps=job.method.steps(bench),
            **bench.sparsity(stack.take(place)),
            validation=validation[place],
            test=test[place],
            seconds=seconds,
        )


def _orders(benches: Sequence[Bench], steps: int, stage: int) -> Tensor:
    """Return which samples each step of each bench trains on: ``(networks, steps, batch size)``."""
    by_seed = {bench.seed: bench for bench in benches}
    orders = {seed: bench.order(steps, stage) for seed, bench in by_seed.items()}
    return torch.stack([orders[bench.seed] for bench in benches])


def _state(stack: Stack, place: int) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in stack.take(place).state_dict().items()}
