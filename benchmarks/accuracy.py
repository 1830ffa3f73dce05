"""Does pruning by agreement keep more of every task? All methods, on one multi-task problem, with the same budget.

Every method starts from the same initial weights, trains on the same batches for the same number of steps (the lottery
ticket takes more; the table says how many), with a learning rate chosen for it by validation on a seed that is not
reported. The test split is measured once per run. Each run is written as a line of JSON when it is done: call again
with the same arguments to go on after an interruption.

    python benchmarks/fetch_data.py --root data
    python benchmarks/accuracy.py --data fashion+mnist --root data --seeds 5
    python benchmarks/accuracy.py --data fashion+mnist --root data --seeds 5 --weights 1 20
    python benchmarks/accuracy.py --data yeast --root data --seeds 5 --regime long  # trained ten times longer
    python benchmarks/accuracy_tables.py  # tables and plots of all that is there

A run of its own takes seconds to a minute on one core; see the README for what the whole took.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from disparse_plugin.errors import EmptyTensorWarning, TiesWarning
from multitask.problem.problem import Problem
from multitask.pruning.methods import METHODS
from multitask.runs import Store, choose_rates, describe, known_methods, run_seed
from multitask.settings import SETTINGS, prolonged, weighted
from multitask.training.bench import Setting
from quick import say_if_quick

AMOUNTS = (0.90, 0.95, 0.98, 0.99, 0.995)
RESULTS = Path(__file__).parent / "results"


def prepare(options: argparse.Namespace) -> tuple[Setting, Problem, Store]:
    """Load what the options name."""
    setting = SETTINGS[options.data]
    if options.weights:
        setting = weighted(setting, options.weights)
    if options.regime == "long":
        setting = prolonged(setting)
    if options.quick:
        setting = replace(setting, budget=setting.budget.quick())
    # A folder of their own: runs of one regime are never averaged with those of another.
    folder = options.out if options.regime == "short" else options.out / options.regime
    return setting, setting.load(options.root), Store(folder, setting.name)


def begin(options: argparse.Namespace) -> None:
    """Set up a process."""
    torch.set_num_threads(options.threads)
    # Layers that score zero at initialisation or lose all their weights are what this benchmark is to find.
    logging.getLogger("disparse_plugin").setLevel(logging.ERROR)
    for expected in (EmptyTensorWarning, TiesWarning):
        warnings.simplefilter("ignore", expected)


def work(options: argparse.Namespace, seed: int) -> int:
    """Do one seed in a process of its own."""
    begin(options)
    return do_seed(options, seed, *prepare(options))


def do_seed(options: argparse.Namespace, seed: int, setting: Setting, problem: Problem, store: Store) -> int:
    """Do what is missing of one seed, and return how many runs that were."""
    methods = known_methods(options.methods, problem)
    runs = run_seed(setting, problem, seed, methods, options.amounts, store, torch.device(options.device))
    count = 0
    for run in runs:
        count += 1
        shown = "  ".join(f"{task} {next(iter(values.values())):.3f}" for task, values in run.validation.items())
        print(f"seed {seed}  {run.amount:6.1%}  {run.method:<34} {run.seconds:6.1f} s  validation: {shown}", flush=True)
    return count


def main(arguments: Sequence[str] | None = None) -> None:
    """Choose learning rates, then run every seed."""
    options = parse(arguments)
    begin(options)
    setting, problem, store = prepare(options)
    methods = known_methods(options.methods, problem)
    several = {"rate seeds": options.rate_seeds} if options.rate_seeds > 1 else {}
    store.set_facts({**describe(setting, problem), **several})
    choose_rates(setting, problem, methods, store, torch.device(options.device), seeds=options.rate_seeds)
    if options.workers == 1:
        count = sum(do_seed(options, seed, setting, problem, store) for seed in options.seed_list)
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
            count = sum(pool.map(work, [options] * len(options.seed_list), options.seed_list))
    print(f"{setting.name}: {count} runs done, {len(store.runs())} in {store.folder}")
    say_if_quick(options.quick)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=SETTINGS, required=True)
    parser.add_argument("--root", type=Path, default=Path("data"), help="where the data are")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the runs are written")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--rate-seeds", type=int, default=1, help="to choose the rates of tuning on")
    parser.add_argument(
        "--amounts",
        type=float,
        nargs="+",
        default=AMOUNTS,
        help="total sparsities; methods that remove channels have their own",
    )
    parser.add_argument("--methods", nargs="+", default=[*METHODS], metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--weights", type=float, nargs="+", help="relative weight of each task's loss in training")
    parser.add_argument(
        "--regime",
        choices=("short", "long"),
        default="short",
        help="long: more steps of training and tuning, for every method alike; written to a folder of its own",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch threads per worker")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that everything runs")
    options = parser.parse_args(arguments)
    options.seed_list = range(options.first_seed, options.first_seed + options.seeds)
    return options


if __name__ == "__main__":
    main()
