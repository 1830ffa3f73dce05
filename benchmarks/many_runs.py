"""Run many settings of the accuracy benchmark at once, on a GPU in minutes: networks are trained side by side.

The rules are those of ``accuracy.py --regime long``, the results go where it puts them, and its pages come from them.
Units of work lie in a queue, the most valuable first: dense networks, learning rates, then the runs of the seeds.
Worker processes take what is ready. It stops by itself after ``--seconds``; whatever was finished by then is stored,
and a later call goes on from there.

    python benchmarks/many_runs.py --root data --device cuda --workers 12 --seconds 380 --packed "$OUT/long.tar.gz"
    python benchmarks/many_runs.py --root data --settings yeast
"""

from __future__ import annotations

import argparse
import json
import tarfile
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from accuracy import RESULTS, begin
from multitask.problem.problem import Problem
from multitask.pruning.methods import DENSE, METHODS, WINDOWS
from multitask.runs import TUNING_SEED, Run, Store, best_rate, describe
from multitask.settings import SETTINGS, prolonged, weighted
from multitask.together import Job, dense_networks, dense_rates, make_benches, on_device, runs_of, scores_of_rates
from multitask.training.bench import Setting

UNEQUAL = tuple(f"fashion+mnist-adam:1,{ratio}" for ratio in (20, 100))
WANTED = ("fashion+mnist", UNEQUAL[0], "yeast", "multimnist", UNEQUAL[1], "questions", "multifashion")
ONE_SHOT = (
    "magnitude",
    "LAMP",
    "LAMP with reach",
    "adaptive Taylor, joint",
    "DiSparse Taylor",
    "DiSparse adaptive",
    "damped 0.5, joint",
    *(f"DiSparse damped {e}" for e in (0.25, 0.5)),
    *(f"shares, damped {e}" for e in (0.25, 0.5)),
)
AT_START = ("SNIP",)
ON_THE_WAY = tuple(f"{rule}, {window}" for rule in ("magnitude", "DiSparse damped 0.5") for window in WINDOWS)
AMOUNTS = (0.9, 0.95, 0.98, 0.99)
PACK_EVERY = 20.0  # seconds


@dataclass(frozen=True)
class Unit:
    """A piece of work for one process, and the pieces that must be done before."""

    kind: str  # "rates of dense", "dense", "rates", "runs"
    setting: str
    seeds: tuple[int, ...] = ()
    methods: tuple[str, ...] = ()
    amounts: tuple[float, ...] = ()
    needs: tuple[str, ...] = ()  # names of units
    most: int = field(default=160, compare=False)  # networks side by side

    @property
    def name(self) -> str:
        """What others need it by."""
        return " ".join([self.kind, self.setting, *map(str, self.seeds), *self.methods, *map(str, self.amounts)])


def chosen_setting(name: str, *, quick: bool) -> Setting:
    """Return a setting in the long regime; ``fashion+mnist-adam:1,20`` has these loss weights."""
    base, _, weights = name.partition(":")
    setting = SETTINGS[base]
    if weights:
        setting = weighted(setting, [float(weight) for weight in weights.split(",")])
    setting = prolonged(setting)
    return replace(setting, budget=setting.budget.quick()) if quick else setting


def queue(settings: Sequence[str], seeds: int, most: int) -> list[Unit]:
    """List all work, the most valuable first."""
    everything: list[Unit] = []

    def add(kind: str, setting: str, *needs: Unit, **facts: Any) -> Unit:
        unit = Unit(kind, setting, needs=tuple(need.name for need in needs), most=most, **facts)
        everything.append(unit)
        return unit

    dense_rate = {setting: add("rates of dense", setting) for setting in settings}
    dense, rates = {}, {}
    for setting in settings:
        dense[setting] = add("dense", setting, dense_rate[setting], seeds=tuple(range(seeds)))
        rates[setting] = add("rates", setting, dense_rate[setting], methods=ONE_SHOT)
    pairs = [tuple(range(first, min(first + 2, seeds))) for first in range(0, seeds, 2)]
    for amounts in (AMOUNTS[:3], AMOUNTS[3:]):
        for which in pairs:
            for setting in settings:
                ready = (dense[setting], rates[setting])
                add("runs", setting, *ready, seeds=which, methods=(DENSE.name, *ONE_SHOT), amounts=amounts)
    for setting in settings:
        snip = add("rates", setting, dense_rate[setting], methods=AT_START)
        add("runs", setting, dense[setting], snip, seeds=tuple(range(seeds)), methods=AT_START, amounts=AMOUNTS[:3])
    for setting in settings:
        window = add("rates", setting, dense_rate[setting], methods=ON_THE_WAY)
        for which in pairs[:2]:
            add("runs", setting, dense[setting], window, seeds=which, methods=ON_THE_WAY, amounts=AMOUNTS[2:3])
    return everything


class Shop:
    """Where units are worked on: the problems, on the device of this process when first asked for."""

    def __init__(self, options: argparse.Namespace, problems: dict[str, Problem]) -> None:
        self.options, self.device = options, torch.device(options.device)
        self._loaded, self._here = problems, dict[str, Problem]()

    def do(self, unit: Unit, tried: dict[str, dict[str, float]], done: set[Any]) -> Iterator[Any]:
        """Work on a unit, and yield what comes out, part by part: rates by method, or runs.

        ``tried`` are the rates so far, ``done`` the keys of the runs that are there.
        """
        if self._is_there(unit, tried):
            return
        setting, problem = chosen_setting(unit.setting, quick=self.options.quick), self._problem(unit.setting)
        if unit.kind == "rates of dense":
            scores, curve, by_rate = dense_rates(setting, problem, self.device)
            torch.save({TUNING_SEED: by_rate[str(best_rate(scores))]}, self._states(unit.setting, "tuning"))
            yield {"rates": {DENSE.name: scores}, "curve": curve}
        elif unit.kind == "dense":
            states = dense_networks(setting, problem, unit.seeds, best_rate(tried[DENSE.name]), self.device)
            torch.save(states, self._states(unit.setting, "seeds"))
        elif unit.kind == "rates":
            yield from self._rates(unit, setting, problem)
        else:
            yield from self._runs(unit, setting, problem, tried, done)

    def _is_there(self, unit: Unit, tried: dict[str, dict[str, float]]) -> bool:
        """Tell whether an earlier call has done it; runs are looked through one by one."""
        if unit.kind == "rates of dense":
            return DENSE.name in tried and self._states(unit.setting, "tuning").exists()
        if unit.kind == "dense":
            return self._states(unit.setting, "seeds").exists()
        return unit.kind == "rates" and tried.keys() >= set(unit.methods)

    def _rates(self, unit: Unit, setting: Setting, problem: Problem) -> Iterator[Any]:
        states = torch.load(self._states(unit.setting, "tuning"))
        benches = make_benches(setting, problem, [TUNING_SEED], states, self.device)
        methods = [METHODS[name] for name in unit.methods]
        jobs = [Job(method, method.tuned_at, TUNING_SEED, rate) for method in methods for rate in setting.budget.rates]
        tried: dict[str, dict[str, float]] = {}
        for part in _parts(jobs, unit.most):
            for name, scores in scores_of_rates(part, benches, benches[TUNING_SEED]).items():
                tried.setdefault(name, {}).update(scores)
        yield {"rates": tried}

    def _runs(
        self, unit: Unit, setting: Setting, problem: Problem, tried: dict[str, dict[str, float]], done: set[Any]
    ) -> Iterator[Any]:
        states = torch.load(self._states(unit.setting, "seeds"))
        benches = make_benches(setting, problem, unit.seeds, states, self.device)
        jobs = [
            Job(METHODS[name], amount, seed, best_rate(tried[name]))
            for seed in unit.seeds
            for name in unit.methods
            for amount in ((0.0,) if name == DENSE.name else unit.amounts)
        ]
        jobs = [job for job in jobs if (job.method.name, job.amount, job.seed) not in done]
        for part in _parts(jobs, unit.most):
            yield {"runs": [asdict(run) for run in runs_of(setting.name, part, benches)]}

    def _problem(self, setting: str) -> Problem:
        if setting not in self._here:
            self._here[setting] = on_device(self._loaded[setting], self.device)
        return self._here[setting]

    def _states(self, setting: str, which: str) -> Path:
        steps = chosen_setting(setting, quick=self.options.quick).budget.train
        seeds = f"-{self.options.seeds}" if which == "seeds" else ""
        return self.options.states / f"{setting.replace(':', '-')}-{steps}-{which}{seeds}.pt"


def _parts(jobs: Sequence[Job], most: int) -> Iterator[Sequence[Job]]:
    """Divide jobs evenly, at most so many at a time."""
    count = -(-len(jobs) // most)
    for part in range(count):
        yield jobs[part * len(jobs) // count : (part + 1) * len(jobs) // count]


def worker(options: argparse.Namespace, problems: dict[str, Problem], pipe: Connection) -> None:
    """Work on what comes through the pipe until it is closed; send back each part, then how it ended."""
    begin(options)
    shop = Shop(options, problems)
    while True:
        try:
            unit, tried, done = pipe.recv()
        except EOFError:
            return
        try:
            for part in shop.do(unit, tried, done):
                pipe.send(("part", part))
            pipe.send(("done", ""))
        except Exception:  # noqa: BLE001  # whatever it is, the other units go on
            pipe.send(("failed", traceback.format_exc()))
        if options.device == "cuda":
            torch.cuda.empty_cache()


class Foreman:
    """Hands units out, stores what comes back, and stops in time."""

    def __init__(self, options: argparse.Namespace, units: Sequence[Unit]) -> None:
        self.options, self.waiting = options, list(units)
        self.done: set[str] = set()
        self.at_work: dict[Connection, tuple[Unit, float]] = {}
        self.log = options.out / "log.txt"
        self.stores = {unit.setting: Store(options.out, _stored_name(unit.setting)) for unit in units}
        self._packed = time.monotonic()

    def run(self, pipes: Sequence[Connection], until: float) -> None:
        """Go on until all is done or the time is up."""
        idle = list(pipes)
        while time.monotonic() < until and (self.at_work or self._next() is not None):
            while idle and (unit := self._next()) is not None:
                self.waiting.remove(unit)
                pipe = idle.pop()
                self.at_work[pipe] = (unit, time.monotonic())
                store = self.stores[unit.setting]
                pipe.send((unit, store.rates(), {run.key for run in store.runs()}))
            for pipe in wait(list(self.at_work), timeout=1.0):
                assert isinstance(pipe, Connection)
                if self._hear(pipe, *self._message(pipe)):
                    idle.append(pipe)
            if time.monotonic() - self._packed > PACK_EVERY:
                self.pack()

    def _message(self, pipe: Connection) -> tuple[str, Any]:
        try:
            message: tuple[str, Any] = pipe.recv()
        except EOFError:
            return "lost", "the process ended"
        return message

    def _next(self) -> Unit | None:
        return next((unit for unit in self.waiting if self.done.issuperset(unit.needs)), None)

    def _hear(self, pipe: Connection, kind: str, content: Any) -> bool:
        """Take in a message; return whether the process is free again."""
        unit, began = self.at_work[pipe]
        if kind == "part":
            self._store(unit, content)
            return False
        self.at_work.pop(pipe)
        self._say(f"{time.monotonic() - began:6.1f} s  {kind}  {unit.name[:120]}")
        if kind == "done":
            self.done.add(unit.name)
        else:
            self._say(str(content))
            if "out of memory" in content and unit.most > 8:
                self.waiting.insert(0, replace(unit, most=unit.most // 2))
        return kind != "lost"

    def _store(self, unit: Unit, content: dict[str, Any]) -> None:
        store = self.stores[unit.setting]
        if "rates" in content:
            store.set_rates({**store.rates(), **content["rates"]})
        if "curve" in content:
            (store.folder / "curve.json").write_text(json.dumps(content["curve"], indent=1) + "\n")
        for run in content.get("runs", ()):
            store.add(Run(**run))

    def _say(self, line: str) -> None:
        print(line, flush=True)
        with self.log.open("a") as file:
            file.write(line + "\n")

    def pack(self) -> None:
        """Put all results into one file, if asked to; whole or not at all."""
        self._packed = time.monotonic()
        if self.options.packed is not None:
            unfinished = self.options.packed.with_suffix(".part")
            with tarfile.open(unfinished, "w:gz", compresslevel=3) as archive:
                archive.add(self.options.out, "long")
            unfinished.replace(self.options.packed)


def _stored_name(setting: str) -> str:
    return chosen_setting(setting, quick=False).name


def main(arguments: Sequence[str] | None = None) -> None:
    """Load the problems, start the processes, work through the queue."""
    started = time.monotonic()
    options = parse(arguments)
    begin(options)
    for folder in (options.out, options.states):
        folder.mkdir(parents=True, exist_ok=True)
    settings = {name: chosen_setting(name, quick=options.quick) for name in options.settings}
    with ThreadPoolExecutor() as pool:
        loaded = pool.map(lambda setting: setting.load(options.root), settings.values())
        problems = dict(zip(settings, loaded, strict=True))
    for name, setting in settings.items():
        facts = describe(setting, problems[name], options.card or options.device)
        Store(options.out, setting.name).set_facts(facts)
    print(f"problems loaded after {time.monotonic() - started:.1f} s", flush=True)
    context = torch.multiprocessing.get_context("spawn")  # the pictures are shared, not copied
    pipes, processes = [], []
    for _ in range(options.workers):
        here, there = context.Pipe()
        processes.append(context.Process(target=worker, args=(options, problems, there), daemon=True))
        processes[-1].start()
        there.close()
        pipes.append(here)
    foreman = Foreman(options, queue(options.settings, options.seeds, options.most))
    foreman.run(pipes, started + options.seconds)
    foreman.pack()
    for process in processes:
        process.terminate()
    print(f"{time.monotonic() - started:.1f} s, {len(foreman.done)} units done, {len(foreman.waiting)} not begun")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="+", default=WANTED, help="name, or name:loss weights")
    parser.add_argument("--root", type=Path, default=Path("data"), help="where the data are")
    parser.add_argument("--out", type=Path, default=RESULTS / "long", help="where the runs are written")
    parser.add_argument("--states", type=Path, default=Path("/tmp/disparse-dense"), help="for dense networks")
    parser.add_argument("--packed", type=Path, help="a .tar.gz that everything is put in every few seconds")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--most", type=int, default=160, help="networks side by side in a process")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9, help="when to stop")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--card", default="", help="what the device is called in the facts of the results")
    parser.add_argument("--threads", type=int, default=1, help="torch threads per worker")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that everything runs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
