"""Sparse networks against dense ones of dedicated multi-task methods, and tickets at what they cost.

Two questions, each with a table. Does a network trained on the plain sum and pruned match dense ones trained by UPGrad,
PCGrad, IMTL-G, CAGrad or MGDA (of torchjd), or with random or learned weights of the losses? Are lottery tickets and
iterative pruning worth their training, at their real cost and at equal cost? The rules are those of ``accuracy.py``;
called again, it goes on where it was. A step of an aggregator takes several times one of the plain sum.

    python benchmarks/dedicated.py --data yeast --root data
    python benchmarks/dedicated.py --page docs/results_dedicated.md  # the page, from all that is there
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.utils import prune

from accuracy import RESULTS, begin
from disparse_plugin import disparse_pretrained
from disparse_plugin.criteria import damped, layer_adaptive
from multitask.pruning.cuts import Cut, plain, scored
from multitask.pruning.methods import Method
from multitask.pruning.procedures import Procedure, both_stages, iterative, lottery, lottery_steps, one_shot
from multitask.report.dedicated import page
from multitask.runs import Store, choose_rates, describe, run_seed
from multitask.settings import SETTINGS
from multitask.training.balanced import aggregated, summed, uncertainty
from multitask.training.bench import Bench

RATES, TUNE_RATES = (1e-3, 3e-3), (3e-3, 1e-2, 3e-2)  # of whole trainings, and after cuts of a trained network
EQUAL = 1 / 3.7  # the share of the steps that makes all trainings of a ticket together take what others take
SPARSE = (0.9, 0.95)
LONGER = 3  # times the steps of tuning


def _dense() -> Iterator[Method]:
    def make(name: str, procedure: Procedure) -> Method:
        return Method(name, "dense", procedure, both_stages, amounts=(0.0,), tuned_at=0.0)

    yield make("plain sum", summed)
    yield make("uncertainty weighting", uncertainty)
    yield make("random weights", aggregated("Random"))
    yield make("UPGrad", aggregated("UPGrad"))
    yield make("PCGrad", aggregated("PCGrad"))
    yield make("IMTL-G", aggregated("IMTLG"))
    yield make("MGDA", aggregated("MGDA"))
    yield make("CAGrad", aggregated("CAGrad", c=0.5))


DEFAULT = "DiSparse damped 0.5"
CUTS: dict[str, Cut] = {
    "magnitude": plain(prune.L1Unstructured),
    "LAMP with reach": scored(disparse_pretrained, "tasks", criterion="lamp", arbiter="sum"),
    DEFAULT: scored(disparse_pretrained, "tasks", criterion=layer_adaptive(damped("taylor", 0.5))),
}


def _pruned() -> Iterator[Method]:
    for name, cut in CUTS.items():
        yield Method(name, "one-shot", one_shot(cut), both_stages, amounts=SPARSE)


def _costly() -> Iterator[Method]:
    def make(name: str, procedure: Procedure, steps: Callable[[Bench], int]) -> Method:
        return Method(name, "iterative", procedure, steps, amounts=(0.98,))

    def longer(bench: Bench) -> int:
        return bench.budget.train + LONGER * bench.budget.tune

    magnitude = CUTS["magnitude"]
    yield make("lottery ticket", lottery(magnitude), lottery_steps)
    yield make("lottery ticket, equal steps", lottery(magnitude, share=EQUAL), partial(lottery_steps, share=EQUAL))
    for name, cut in CUTS.items():
        yield make(f"{name}, one cut", one_shot(cut), both_stages)
        yield make(f"{name}, three cuts", iterative(cut), both_stages)
        yield make(f"{name}, one cut, tuned longer", one_shot(cut, LONGER), longer)
        yield make(f"{name}, three cuts, tuned longer", iterative(cut, times=LONGER), longer)


COMPARED_WITH = {"balanced": (DEFAULT, SPARSE[0]), "costly": (f"{DEFAULT}, one cut", 0.98)}
GROUPS = {"balanced": [*_dense(), *_pruned()], "costly": [*_costly()]}


def run(options: argparse.Namespace, group: str) -> None:
    """Do what is missing of a group, rates first."""
    setting = SETTINGS[options.data]
    budget = replace(setting.budget, train=options.train, tune=options.train // 4, rates=RATES, tune_rates=TUNE_RATES)
    setting = replace(setting, budget=budget)
    if options.quick:
        setting = replace(setting, budget=replace(setting.budget.quick(), tune_rates=TUNE_RATES[:1]))
    problem, store = setting.load(options.root), Store(options.out / group, setting.name)
    store.set_facts(describe(setting, problem))
    device = torch.device("cpu")
    methods = [method for method in GROUPS[group] if method.name not in options.without]
    choose_rates(setting, problem, methods, store, device)
    for seed in range(options.seeds):
        for done in run_seed(setting, problem, seed, methods, (), store, device):
            print(f"seed {seed}  {done.method}  {done.amount:g}  {done.seconds:.0f} s", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the groups, or write the page."""
    options = parse(arguments)
    begin(options)
    if options.page:
        options.page.write_text("\n\n".join(page(options.out, COMPARED_WITH)) + "\n", encoding="utf-8")
        return
    for group in options.groups:
        run(options, group)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=SETTINGS, default="yeast", help="a setting whose heads share one trunk")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=[*GROUPS])
    parser.add_argument("--root", type=Path, default=Path("data"), help="where the data are")
    parser.add_argument("--out", type=Path, default=RESULTS / "dedicated", help="where the runs are written")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=400, help="steps of the dense network; tuning takes a quarter")
    parser.add_argument("--without", nargs="+", default=(), metavar="METHOD", help="leave these out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--page", type=Path, help="write this page from the runs, and run nothing")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that everything runs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
