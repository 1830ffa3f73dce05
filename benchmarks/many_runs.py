"""Run many settings of the accuracy benchmark at once, on a GPU in minutes: networks are trained side by side.

The rules are those of ``accuracy.py --regime long``, the results go where it puts them, and its pages come from them.
Units of work lie in a queue, the most valuable first: dense networks, learning rates, then the runs of the seeds.
Worker processes take what is ready. It stops by itself after ``--seconds``; whatever was finished by then is stored,
and a later call goes on from there. On another machine the dense networks are gone: there it goes on with seeds that
have no runs yet, and with methods that start from the initial network, since runs of a seed are compared with its own.

    python benchmarks/many_runs.py --root data --device cuda --workers 12 --seconds 380 --packed "$OUT/long.tar.gz"
    python benchmarks/many_runs.py --root data --settings yeast --rates-at 0.9 0.95 0.98 0.99
    python benchmarks/many_runs.py --root data --settings yeast --first-seed 1001 --out benchmarks/results/chosen

The last is for choices that are not to be made by the test split: of seeds from 1001 on only validation is measured,
and only the rules are run among which to choose.
"""

from __future__ import annotations

import argparse
import json
import tarfile
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import torch

from accuracy import RESULTS, begin
from multitask.problem.problem import Problem
from multitask.pruning.methods import DENSE, METHODS, TUNED_AT
from multitask.runs import TUNING_SEED, Run, Store, best_rate, describe, rate_at, rates_key
from multitask.together import (
    Job,
    State,
    dense_networks,
    dense_rates,
    make_benches,
    on_device,
    runs_of,
    scores_of_rates,
)
from multitask.training.bench import Setting
from multitask.work import AMOUNTS, SIZES, WANTED, Known, Size, Unit, chosen_setting, queue
from quick import say_if_quick

PACK_EVERY = 20.0  # seconds
AHEAD = 60  # units: how far down the queue a free process looks; what is far down would slow down what comes first
T = TypeVar("T")


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
            torch.save(by_rate[str(best_rate(scores))], state_path(self.options, unit.setting, TUNING_SEED))
            yield {"rates": {DENSE.name: scores}, "curve": curve}
        elif unit.kind == "dense":
            self._train(unit.setting, unit.seeds, tried)
        elif unit.kind == "rates":
            yield from self._rates(unit, setting, problem, tried)
        else:
            yield from self._runs(unit, setting, problem, tried, done)

    def _is_there(self, unit: Unit, tried: dict[str, dict[str, float]]) -> bool:
        """Tell whether an earlier call has done it; runs are looked through one by one."""
        if unit.kind == "rates of dense":
            return DENSE.name in tried
        if unit.kind == "dense":
            return all(state_path(self.options, unit.setting, seed).exists() for seed in unit.seeds)
        return unit.kind == "rates" and all(rates_key(METHODS[name], unit.amounts[0]) in tried for name in unit.methods)

    def _rates(
        self, unit: Unit, setting: Setting, problem: Problem, tried: dict[str, dict[str, float]]
    ) -> Iterator[Any]:
        if not state_path(self.options, unit.setting, TUNING_SEED).exists():  # the rates were chosen on another machine
            self._train(unit.setting, [TUNING_SEED], tried)
        states = self._states(unit.setting, [TUNING_SEED])
        benches = make_benches(setting, problem, [TUNING_SEED], states, self.device)
        amount, rates = unit.amounts[0], setting.budget.rates
        missing = [METHODS[name] for name in unit.methods if rates_key(METHODS[name], amount) not in tried]
        for methods in _parts(missing, max(1, unit.most // len(rates))):
            jobs = [Job(method, amount, TUNING_SEED, rate) for method in methods for rate in rates]
            found = scores_of_rates(jobs, benches, benches[TUNING_SEED])
            yield {"rates": {rates_key(METHODS[name], amount): scores for name, scores in found.items()}}

    def _runs(
        self, unit: Unit, setting: Setting, problem: Problem, tried: dict[str, dict[str, float]], done: set[Any]
    ) -> Iterator[Any]:
        states = self._states(unit.setting, unit.seeds)
        benches = make_benches(setting, problem, unit.seeds, states, self.device)
        jobs = [
            Job(METHODS[name], amount, seed, rate_at(tried, METHODS[name], amount))
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

    def _train(self, name: str, seeds: Sequence[int], tried: dict[str, dict[str, float]]) -> None:
        """Train dense networks, and keep their states."""
        setting = chosen_setting(name, quick=self.options.quick)
        rate = best_rate(tried[DENSE.name])
        for seed, state in dense_networks(setting, self._problem(name), seeds, rate, self.device).items():
            torch.save(state, state_path(self.options, name, seed))

    def _states(self, setting: str, seeds: Iterable[int]) -> dict[int, State]:
        """Return the dense networks that are there."""
        paths = {seed: state_path(self.options, setting, seed) for seed in seeds}
        return {seed: torch.load(path) for seed, path in paths.items() if path.exists()}


def state_path(options: argparse.Namespace, setting: str, seed: int) -> Path:
    """Return where the dense network of a seed is kept."""
    steps = chosen_setting(setting, quick=options.quick).budget.train
    folder: Path = options.states
    return folder / f"{setting.replace(':', '-')}-{steps}-{seed}.pt"


def known(options: argparse.Namespace, setting: str) -> Known:
    """Say what earlier calls left of a setting."""
    store = Store(options.out, _stored_name(setting))
    dense = {run.seed for run in store.runs() if run.method == DENSE.name}
    gone = {seed for seed in dense if not state_path(options, setting, seed).exists()}
    return Known(frozenset(store.rates()), frozenset(gone))


def _parts(things: Sequence[T], most: int) -> Iterator[Sequence[T]]:
    """Divide evenly, at most so many at a time."""
    count = -(-len(things) // most)
    for part in range(count):
        yield things[part * len(things) // count : (part + 1) * len(things) // count]


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
        self._last_start = float("inf")

    def run(self, pipes: Sequence[Connection], until: float, closing: float = 0.0) -> None:
        """Go on until all is done or the time is up; in the last ``closing`` seconds only what was begun goes on."""
        idle, self._last_start = list(pipes), until - closing
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
        if time.monotonic() > self._last_start:
            return None
        ready = (unit for unit in self.waiting[:AHEAD] if self.done.issuperset(unit.needs) and self._fits(unit))
        return next(ready, None)

    def _fits(self, unit: Unit) -> bool:
        """Tell whether the card has room for one more of a setting's units."""
        at_work = sum(other.setting == unit.setting for other, _ in self.at_work.values())
        return at_work < SIZES.get(unit.setting, Size()).at_once

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
    units = queue(
        options.settings,
        range(options.first_seed, options.first_seed + options.seeds),
        options.most,
        amounts=options.amounts,
        rates_at=options.rates_at,
        known={setting: known(options, setting) for setting in options.settings},
    )
    foreman = Foreman(options, units)
    foreman.run(pipes, started + options.seconds, options.closing)
    foreman.pack()
    for process in processes:
        process.terminate()
    print(f"{time.monotonic() - started:.1f} s, {len(foreman.done)} units done, {len(foreman.waiting)} not begun")
    say_if_quick(options.quick)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="+", default=WANTED, help="name, or name:loss weights")
    parser.add_argument("--root", type=Path, default=Path("data"), help="where the data are")
    parser.add_argument("--out", type=Path, default=RESULTS / "long", help="where the runs are written")
    parser.add_argument("--states", type=Path, default=Path("/tmp/disparse-dense"), help="for dense networks")
    parser.add_argument("--packed", type=Path, help="a .tar.gz that everything is put in every few seconds")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--amounts", type=float, nargs="+", default=AMOUNTS)
    parser.add_argument("--rates-at", type=float, nargs="+", default=(TUNED_AT,), help="amounts to choose rates at")
    parser.add_argument("--most", type=int, default=160, help="networks side by side in a process")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9, help="when to stop")
    parser.add_argument("--closing", type=float, default=0.0, help="seconds before that in which nothing is begun")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--card", default="", help="what the device is called in the facts of the results")
    parser.add_argument("--threads", type=int, default=1, help="torch threads per worker")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that everything runs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
