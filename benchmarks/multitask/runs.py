"""Every run as a line of JSON, so that an interrupted benchmark goes on where it was."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from .problem.problem import Problem
from .problem.relative import mean_change
from .pruning.methods import DENSE, METHODS, TUNED_AT, Method
from .training.bench import Bench, Measured, Setting

TUNING_SEED = 1000  # with all above it never among the seeds that are reported, nor measured on the test split


@dataclass(frozen=True)
class Run:
    """What came out of one method at one amount with one seed."""

    setting: str
    method: str
    amount: float
    seed: int
    rate: float
    steps: int  # optimizer steps, the dense training included
    weights: int
    pruned: int
    sparsity: dict[str, float]  # of the shared part and of each task's own weights
    emptied: list[str]  # weight tensors with nothing left
    validation: Measured
    test: Measured
    seconds: float  # of processor time, for all that came after the dense training

    @property
    def key(self) -> tuple[str, float, int]:
        """What tells runs of a setting apart."""
        return self.method, self.amount, self.seed


class Store:
    """The runs of one setting in a folder.

    ``setting.json`` says what was run, ``rates.json`` which learning rates were tried, ``seed*.jsonl`` what came out.
    """

    def __init__(self, folder: Path, setting: str) -> None:
        self.folder, self.setting = folder / setting, setting
        self.folder.mkdir(parents=True, exist_ok=True)

    def runs(self) -> list[Run]:
        """Return what is there."""
        lines = [line for path in sorted(self.folder.glob("seed*.jsonl")) for line in path.read_text().splitlines()]
        return [Run(**json.loads(line)) for line in lines if line]

    def add(self, run: Run) -> None:
        """Add a run; a line is written whole or, after an interruption, not at all."""
        with (self.folder / f"seed{run.seed}.jsonl").open("a") as file:
            file.write(json.dumps(asdict(run)) + "\n")

    def rates(self) -> dict[str, dict[str, float]]:
        """Return the validation score of every learning rate tried, by method."""
        path = self.folder / "rates.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def setting_facts(self) -> dict[str, Any]:
        """Return what :func:`describe` said when the runs were made."""
        return json.loads((self.folder / "setting.json").read_text())

    def set_facts(self, facts: dict[str, Any]) -> None:
        """Write it; runs made under other facts must not be mixed with new ones, the machine excepted.

        What is compared is paired by seed, and a seed is run on one machine.
        """
        path = self.folder / "setting.json"
        facts = json.loads(json.dumps(facts))
        if path.exists():
            known, free = self.setting_facts(), {"torch": "", "device": ""}
            if {**known, **free} != {**facts, **free}:
                raise ValueError(f"out: {self.folder} holds runs of another budget or problem; give another folder")
            for fact in free:
                facts[fact] = " and ".join(dict.fromkeys([*known.get(fact, "cpu").split(" and "), facts[fact]]))
        path.write_text(json.dumps(facts, indent=1) + "\n")

    def set_rates(self, tried: dict[str, dict[str, float]]) -> None:
        """Write all of them."""
        (self.folder / "rates.json").write_text(json.dumps(tried, indent=1) + "\n")


def describe(setting: Setting, problem: Problem, device: str = "cpu") -> dict[str, Any]:
    """Return all that tables need to know of a setting, so that they can be made without the data."""
    return {
        "name": setting.name,
        "tasks": [{"name": task.name, "better": dict(task.better), "weight": task.weight} for task in problem.tasks],
        "note": problem.note,
        "facts": dict(problem.facts),
        "samples": {split: len(getattr(problem, split)) for split in ("train", "validation", "test")},
        "budget": asdict(setting.budget),
        "tuned at": TUNED_AT,
        "torch": torch.__version__,
        "device": device,
    }


def best_rate(tried: dict[str, float]) -> float:
    """Return the learning rate with the highest validation score."""
    return float(max(tried, key=lambda rate: tried[rate]))


def rates_key(method: Method, amount: float) -> str:
    """Return what the learning rates that were tried of a method at an amount are stored by."""
    return method.name if amount == method.tuned_at else f"{method.name} at {100 * amount:g}%"


def rate_at(tried: Mapping[str, dict[str, float]], method: Method, amount: float) -> float:
    """Return the rate chosen at an amount; where none was, that of the amount that the method is tuned at."""
    return best_rate(tried.get(rates_key(method, amount)) or tried[method.name])


def choose_rates(
    setting: Setting,
    problem: Problem,
    methods: Sequence[Method],
    store: Store,
    device: torch.device,
    *,
    everywhere: bool = False,
    seeds: int = 1,
) -> None:
    """Choose every method's learning rate by validation, on seeds that are not reported.

    The dense network's first; then each method's at one amount, or at all of its own if ``everywhere``, from the dense
    network trained with that. The score is the mean relative change to a dense network, so that all tasks count alike:
    on one seed, or, of methods that tune a trained network, on so many. What is in the store stays.
    """
    tried = store.rates()
    if DENSE.name not in tried:
        measured = {rate: _dense(setting, problem, rate, device) for rate in setting.budget.rates}
        tried[DENSE.name] = _scores(problem, measured, reference=measured[setting.budget.rates[0]])
        store.set_rates(tried)
    wanted = [(m, amount) for m in methods for amount in (everywhere and m.amounts) or (m.tuned_at,)]
    dense_rate = best_rate(tried[DENSE.name])
    benches = [Bench(setting, problem, TUNING_SEED + place, dense_rate, device) for place in range(seeds)]
    for method, amount in wanted:
        key = rates_key(method, amount)
        if key not in tried:
            scores = [_tried(bench, method, amount, setting) for bench in benches[: seeds if _tunes(method) else 1]]
            tried[key] = {rate: mean(score[rate] for score in scores) for rate in scores[0]}
            store.set_rates(tried)


def _tried(bench: Bench, method: Method, amount: float, setting: Setting) -> dict[str, float]:
    """Return the score of every learning rate on one seed."""
    rates = (setting.budget.tune_rates if _tunes(method) else ()) or setting.budget.rates
    validation = bench.problem.validation
    measured = {rate: bench.measure(bench.run(method.procedure, amount, rate), validation) for rate in rates}
    return _scores(bench.problem, measured, reference=bench.dense_on_validation)


def _tunes(method: Method) -> bool:
    """Tell whether a method tunes a trained network: it may have other learning rates to choose from."""
    return method.family in ("one-shot", "iterative") and method.name != "LTH"


def _dense(setting: Setting, problem: Problem, rate: float, device: torch.device) -> Measured:
    bench = Bench(setting, problem, TUNING_SEED, rate, device)
    return bench.measure(bench.run(DENSE.procedure, 0.0, rate), problem.validation)


def _scores(problem: Problem, measured: dict[float, Measured], reference: Measured) -> dict[str, float]:
    return {str(rate): mean_change(problem.tasks, result, reference) for rate, result in measured.items()}


def planned(methods: Iterable[Method], amounts: Sequence[float]) -> Iterator[tuple[Method, float]]:
    """List what one seed runs: the dense network once, everything else at every amount, or at those of its own."""
    yield DENSE, 0.0
    for method in methods:
        if method is not DENSE:
            yield from ((method, amount) for amount in method.amounts or amounts)


def run_seed(
    setting: Setting,
    problem: Problem,
    seed: int,
    methods: Sequence[Method],
    amounts: Sequence[float],
    store: Store,
    device: torch.device,
) -> Iterator[Run]:
    """Do what is not in the store yet, and yield each run as it is stored."""
    tried = store.rates()
    done = {run.key for run in store.runs()}
    bench = Bench(setting, problem, seed, best_rate(tried[DENSE.name]), device)
    for method, amount in planned(methods, amounts):
        if (method.name, amount, seed) in done:
            continue
        start = time.process_time()
        rate = rate_at(tried, method, amount)
        model = bench.run(method.procedure, amount, rate)
        run = record(setting.name, bench, method, amount, rate, model, time.process_time() - start)
        store.add(run)
        yield run


def record(
    setting: str, bench: Bench, method: Method, amount: float, rate: float, model: nn.Module, seconds: float
) -> Run:
    """Measure a finished network: only here and in :mod:`.together`, and of reported seeds, on the test split."""
    problem = bench.problem
    return Run(
        setting=setting,
        method=method.name,
        amount=amount,
        seed=bench.seed,
        rate=rate,
        steps=method.steps(bench),
        **bench.sparsity(model),
        validation=bench.measure(model, problem.validation),
        test=bench.measure(model, problem.test) if bench.seed < TUNING_SEED else {},
        seconds=seconds,
    )


def known_methods(names: Iterable[str], problem: Problem) -> list[Method]:
    """Look methods up, or say which there are; those that are no different with so few tasks are left out."""
    if unknown := [name for name in names if name not in METHODS]:
        raise ValueError(f"method: one of {', '.join(METHODS)}; found {', '.join(map(repr, unknown))}")
    return [METHODS[name] for name in names if METHODS[name].least_tasks <= len(problem.tasks)]
