"""Sparse networks against dense ones of dedicated multi-task methods, and tickets at what they cost.

Does a network trained on the plain sum and pruned match dense ones trained by UPGrad, PCGrad, IMTL-G, CAGrad or MGDA
(of torchjd), or with random or learned weights of the losses? Does it help to prune those? Are lottery tickets and
iterative pruning worth their training, at their real cost and at equal cost? The rules are those of ``accuracy.py``;
called again, it goes on where it was.

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
from multitask.pruning.methods import EXPONENTS, METHODS, Method
from multitask.pruning.procedures import Procedure, both_stages, iterative, lottery, lottery_steps, one_shot
from multitask.report.dedicated import Options, page
from multitask.runs import Store, choose_rates, describe, run_seed
from multitask.settings import SETTINGS
from multitask.training.balanced import aggregated, aggregator, summed, uncertainty
from multitask.training.bench import Bench
from quick import say_if_quick

# Learning rates to choose from after cuts of a trained network; those of whole trainings are the setting's.
TUNE_RATES = {"adamw": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), "sgd": (3e-2, 1e-1, 3e-1)}
EQUAL = 1 / 3.7  # the share of the steps that makes all trainings of a ticket together take what others take
SPARSE, SPARSER = (0.9, 0.95), (0.95, 0.98)  # what is pruned beside dense networks, and at what all methods prune
LONGER = 3  # times the steps of tuning
# Options by what papers call them; torchjd's classes have no hyphens.
AGGREGATORS: dict[str, dict[str, float]] = {"UPGrad": {}, "PCGrad": {}, "IMTL-G": {}, "MGDA": {}, "CAGrad": {"c": 0.5}}

DEFAULT = "shares, damped 0.25"
CUTS: dict[str, Cut] = {
    "magnitude": plain(prune.L1Unstructured),
    "LAMP with reach": scored(disparse_pretrained, "tasks", criterion="lamp", arbiter="sum"),
    **{
        f"{rule} {exponent}": scored(
            disparse_pretrained, "tasks", criterion=layer_adaptive(damped("taylor", exponent)), arbiter=arbiter
        )
        for rule, arbiter in (("DiSparse damped", "unanimous"), ("shares, damped", "sum"))
        for exponent in EXPONENTS
    },
}
REPEATED = ("magnitude", "LAMP with reach", "DiSparse damped 0.5", DEFAULT)  # cut several times, or while training
WINDOW = "gradual to 1/2"
MOVING = ("random ERK", "SET", "RigL", "DiSparse dynamic")  # sparse from the start


def _balanced() -> Iterator[Method]:
    """Dense networks, and pruned ones that were trained on the sum."""

    def make(name: str, procedure: Procedure) -> Method:
        return Method(name, "dense", procedure, both_stages, amounts=(0.0,), tuned_at=0.0)

    yield make("plain sum", summed)
    yield make("uncertainty weighting", uncertainty)
    yield make("random weights", aggregated("Random"))
    for name, facts in AGGREGATORS.items():
        yield make(name, aggregated(name.replace("-", ""), **facts))
    for name, cut in CUTS.items():
        yield Method(name, "one-shot", one_shot(cut), both_stages, amounts=SPARSE)


def _after(start: str) -> Iterator[Method]:
    """Pruned networks that an aggregator has trained."""
    for name, cut in CUTS.items():
        yield Method(f"{start}, then {name}", "one-shot", one_shot(cut), both_stages, amounts=SPARSE)


def _costly() -> Iterator[Method]:
    def make(name: str, procedure: Procedure, steps: Callable[[Bench], int] = both_stages) -> Method:
        return Method(name, "iterative", procedure, steps, amounts=SPARSER)

    def longer(bench: Bench) -> int:
        return bench.budget.train + LONGER * bench.budget.tune

    for share, name in ((1.0, "lottery ticket"), (EQUAL, "lottery ticket, equal steps")):
        ticket = make(name, lottery(CUTS["magnitude"], share=share), partial(lottery_steps, share=share))
        yield replace(ticket, family="on the way")  # each training is a whole one, with the rates of such
    for name in REPEATED:
        cut = CUTS[name]
        yield make(f"{name}, one cut", one_shot(cut))
        yield make(f"{name}, three cuts", iterative(cut))
        yield make(f"{name}, one cut, tuned longer", one_shot(cut, LONGER), longer)
        yield make(f"{name}, three cuts, tuned longer", iterative(cut, times=LONGER), longer)
    for name in [*(f"{name}, {WINDOW}" for name in REPEATED), *MOVING]:
        yield replace(METHODS[name], amounts=SPARSER)


GROUPS = {"balanced": [*_balanced()], "costly": [*_costly()]}
GROUPS |= {f"after-{start}": [*_after(start)] for start in AGGREGATORS}


def run(options: argparse.Namespace, group: str) -> None:
    """Do what is missing of a group, rates first."""
    setting = SETTINGS[options.data]
    rates = TUNE_RATES[setting.budget.optimizer]
    steps = {name: getattr(options, name) or getattr(setting.budget, name) for name in ("train", "tune")}
    setting = replace(setting, budget=replace(setting.budget, tune_rates=rates, **steps))
    if options.quick:
        setting = replace(setting, budget=replace(setting.budget.quick(), tune_rates=rates[:1]))
    start = group.removeprefix("after-")
    if start in AGGREGATORS:
        setting = replace(setting, dense=aggregator(start.replace("-", ""), **AGGREGATORS[start]))
    problem, store = setting.load(options.root), Store(options.out / group, setting.name)
    store.set_facts({**describe(setting, problem), "rate seeds": options.rate_seeds})
    device = torch.device("cpu")
    methods = [
        replace(method, amounts=tuple(options.amounts)) if options.amounts and any(method.amounts) else method
        for method in GROUPS[group]
        if method.name not in options.without
    ]
    choose_rates(setting, problem, methods, store, device, everywhere=True, seeds=options.rate_seeds)
    for seed in range(options.seeds):
        for done in run_seed(setting, problem, seed, methods, (), store, device):
            print(f"seed {seed}  {done.method}  {done.amount:g}  {done.seconds:.0f} s", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the groups, or write the page."""
    options = parse(arguments)
    begin(options)
    if options.page:
        if not any(options.out.glob("*/*/setting.json")):
            raise SystemExit(f"out: needs runs under {options.out}, found none; run this without --page first")
        options.page.write_text(
            "\n\n".join(page(options.out, Options(DEFAULT, SPARSE, SPARSER))) + "\n", encoding="utf-8"
        )
        return
    for group in options.groups:
        run(options, group)
    say_if_quick(options.quick)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=SETTINGS, default="yeast", help="a setting whose heads share one trunk")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=["balanced", "costly", "after-UPGrad"])
    parser.add_argument("--root", type=Path, default=Path("data"), help="where the data are")
    parser.add_argument("--out", type=Path, default=RESULTS / "dedicated", help="where the runs are written")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, help="steps of the dense network; the setting's by default")
    parser.add_argument("--tune", type=int, help="steps after the cut; the setting's by default")
    parser.add_argument("--rate-seeds", type=int, default=3, help="to choose the rates of tuning on")
    parser.add_argument("--amounts", nargs="+", type=float, help="of the pruned networks, in place of each group's own")
    parser.add_argument("--without", nargs="+", default=(), metavar="METHOD", help="leave these out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--page", type=Path, help="write this page from the runs, and run nothing")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that everything runs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
