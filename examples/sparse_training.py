"""
Sparse training
===============

Train a network with two tasks sparse from the first step to the last, and let it move its weights.

Data and network are those of ``quickstart.py``. All methods keep the same number of weights, get the same number of
training steps and the same learning rates; they differ in which weights they keep:

* DiSparse dynamic: drops the smallest weights and grows those that any of the tasks asks for;
* RigL: the same, with the sum of the losses as the only task;
* SET: the same, growing at random;
* DiSparse both: starts from the weights of static DiSparse, then is dynamic;
* static DiSparse: chosen once before training, by ``disparse_static`` on 20 batches;
* static random: chosen once at random, with the layer densities of the first three (ERK);
* gradual DiSparse: for comparison, starts dense and is pruned in stages until three quarters of the steps are done, so
  it is not sparse all along.

No download; four minutes on a free CPU core, half of that with ``--seeds 1``:

    python examples/sparse_training.py
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from quickstart import (
    BATCH_SIZE,
    LEARNING_RATE,
    Batch,
    Pictures,
    Quality,
    TwoHeads,
    load_pictures,
    quality,
    task_losses,
)
from quickstart import Budget as Data
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

from disparse_plugin import disparse_static, joint
from disparse_plugin.sparse_training import DiSparseScheduler, GradualPruning

AMOUNTS = (0.90, 0.98)
SHOWN = 0.98  # the amount whose densities are plotted
SCORED = 10  # batches for static DiSparse


class Budget(NamedTuple):
    """How much of everything, for every method alike."""

    steps: int = 400
    update_every: int = 20
    stop_at: int = 300  # three quarters of the steps, as in RigL
    data: Data = Data()


QUICK = Budget(4, 1, 3, Data(train_pictures=64, test_pictures=64))

Scheduler = DiSparseScheduler | GradualPruning
Build = Callable[[nn.Module, Optimizer, list[Batch], float, Budget, int], Scheduler]


def dynamic(**options: Any) -> Build:
    """Make a builder of schedulers that train sparsely from ERK densities."""
    losses = options.pop("losses", task_losses)

    def build(
        model: nn.Module, optimizer: Optimizer, _: list[Batch], amount: float, budget: Budget, seed: int
    ) -> Scheduler:
        every, stop = budget.update_every, budget.stop_at
        return DiSparseScheduler(
            model, optimizer, losses, amount=amount, update_every=every, stop_at=stop, seed=seed, **options
        )

    return build


def static_disparse(
    model: nn.Module, optimizer: Optimizer, data: list[Batch], amount: float, budget: Budget, _: int
) -> Scheduler:
    """Choose the weights once by their saliency at initialisation."""
    disparse_static(model, task_losses, data, amount)
    return DiSparseScheduler(
        model, optimizer, task_losses, distribution="existing", drop_fraction=0.0, stop_at=budget.stop_at
    )


def static_disparse_then_dynamic(
    model: nn.Module, optimizer: Optimizer, data: list[Batch], amount: float, budget: Budget, _: int
) -> Scheduler:
    """Choose as ``static_disparse`` does, and go on from there."""
    disparse_static(model, task_losses, data, amount)
    every, stop = budget.update_every, budget.stop_at
    return DiSparseScheduler(model, optimizer, task_losses, distribution="existing", update_every=every, stop_at=stop)


def gradual(
    model: nn.Module, optimizer: Optimizer, _: list[Batch], amount: float, budget: Budget, __: int
) -> Scheduler:
    """Start dense and prune in stages."""
    every, stop = budget.update_every, budget.stop_at
    return GradualPruning(model, optimizer, task_losses, amount=amount, update_every=every, stop_at=stop)


METHODS: dict[str, Build] = {
    "DiSparse dynamic": dynamic(),
    "RigL": dynamic(losses=joint(task_losses)),
    "SET": dynamic(criterion="random"),
    "DiSparse both": static_disparse_then_dynamic,
    "static DiSparse": static_disparse,
    "static random": dynamic(drop_fraction=0.0),
    "gradual DiSparse": gradual,
}


class History(NamedTuple):
    """What the masks looked like during one run, at every change."""

    steps: list[int]
    densities: list[list[float]]  # of each layer
    moved: list[list[float]]  # share of each layer's weights that were not there at first

    def note(self, step: int, first: Sequence[Tensor], now: Sequence[Tensor]) -> None:
        """Add a line."""
        self.steps.append(step)
        self.densities.append([float(mask.float().mean()) for mask in now])
        new = [float((mask & ~start).sum() / mask.sum()) for start, mask in zip(first, now, strict=True)]
        self.moved.append(new)


class Run(NamedTuple):
    """What came out of one training run."""

    method: str
    amount: float
    pruned: int
    quality: Quality
    seconds: float
    names: tuple[str, ...]
    history: History


def train(
    model: nn.Module, optimizer: Optimizer, scheduler: Scheduler, pictures: Pictures, steps: int, seed: int
) -> History:
    """Train with one cycle of the learning rate; the scheduler is called after every step, and that is all."""
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=steps)
    order = torch.Generator().manual_seed(seed)
    first, history = scheduler.masks.current(), History([], [], [])
    history.note(0, first, first)
    for step in range(steps):
        batch = pictures.batch(torch.randint(len(pictures.images), (BATCH_SIZE,), generator=order))
        optimizer.zero_grad()
        torch.stack([*task_losses(model, batch).values()]).sum().backward()
        optimizer.step()
        changed = scheduler.step(batch) is not None
        cycle.step()
        if changed or step == steps - 1:
            history.note(step + 1, first, scheduler.masks.current())
    return history


def compare(budget: Budget, seeds: Sequence[int], amounts: Sequence[float], device: torch.device) -> Iterator[Run]:
    """Train every method at every amount from the same initial weights, for several seeds."""
    for seed in seeds:
        pictures, test = load_pictures(budget.data, seed, device)
        data = [batch for batch in pictures.first(SCORED) if len(batch[0])]
        for amount, (name, build) in product(amounts, METHODS.items()):
            torch.manual_seed(seed)
            model = TwoHeads().to(device).train()
            optimizer = AdamW(model.parameters(), lr=LEARNING_RATE)
            start = time.perf_counter()
            scheduler = build(model, optimizer, data, amount, budget, seed)
            history = train(model, optimizer, scheduler, pictures, budget.steps, seed)
            seconds = time.perf_counter() - start
            pruned = sum(int((~mask).sum()) for mask in scheduler.masks.current())
            yield Run(name, amount, pruned, quality(model, test), seconds, scheduler.masks.names, history)


COLUMNS = ("asked", "pruned", "digit, % right", "turn, ° off", "seconds")
HEADER = f"| {'method':<16} | {' | '.join(f'{column:>14}' for column in COLUMNS)} |"


def table_row(runs: Sequence[Run]) -> str:
    """Format the runs of one method at one amount: mean and standard deviation over the seeds."""
    by_task = zip(*(run.quality for run in runs), strict=True)
    shown = [f"{mean(values):.1f} ± {spread(values):.1f}" for values in by_task]
    counts = "/".join(sorted({str(run.pruned) for run in runs}))
    cells = [f"{100 * runs[0].amount:g}%", counts, *shown, f"{mean(run.seconds for run in runs):.1f}"]
    return f"| {runs[0].method:<16} | {' | '.join(f'{cell:>14}' for cell in cells)} |"


def spread(values: Sequence[float]) -> float:
    """Return the standard deviation; 0 for a single value."""
    return stdev(values) if len(values) > 1 else 0.0


def new_figure() -> Any:
    """Import matplotlib, which nothing but the plot needs, before the work begins."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{error}; the plot needs: pip install 'disparse-plugin[plots]'") from error
    return Figure(figsize=(11, 4), dpi=150, layout="constrained")


def plot(figure: Any, runs: Sequence[Run]) -> None:
    """Plot density per layer over time, and how much of each layer has moved."""
    amount = SHOWN if SHOWN in {run.amount for run in runs} else runs[0].amount
    shown = {run.method: run for run in reversed(runs) if run.amount == amount}
    panels = [
        ("DiSparse dynamic", "densities", "density per layer"),
        ("DiSparse dynamic", "moved", "share of each layer's weights\nthat were not there at first"),
        ("gradual DiSparse", "densities", "density per layer"),
    ]
    for axes, (method, what, label) in zip(figure.subplots(1, 3), panels, strict=True):
        run = shown[method]
        for number, values in enumerate(zip(*getattr(run.history, what), strict=True)):
            color = (0.9 * number / len(run.names), 0.3, 0.7)
            axes.step(run.history.steps, values, where="post", color=color, linewidth=1, label=run.names[number])
        axes.set(title=f"{method}, {100 * run.amount:g}%", xlabel="step", ylabel=label)
        if what == "densities":
            axes.set_yscale("log")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=5)


def main() -> None:
    """Read the command line, compare, print the table and save the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu (default), cuda, ...")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds (default: 2)")
    parser.add_argument("--amounts", type=float, nargs="+", default=AMOUNTS, help="sparsities (default: 0.9 0.98)")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for sparse_training.png (default: this one)")
    parser.add_argument("--quick", action="store_true", help="a few steps of one seed only, to see that it runs")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds: must be at least 1, found {options.seeds}")
    torch.set_num_threads(1)  # the network is too small for more: threads would wait for each other
    started, figure = time.perf_counter(), new_figure()
    options.out.mkdir(parents=True, exist_ok=True)
    budget, count = (QUICK, 1) if options.quick else (Budget(), options.seeds)
    seeds = range(options.seed, options.seed + count)
    total = count * len(options.amounts) * len(METHODS)
    runs = list(tqdm(compare(budget, seeds, options.amounts, options.device), total=total, unit="run"))
    print(HEADER, re.sub("[^|]", "-", HEADER), sep="\n")
    for amount, name in product(options.amounts, METHODS):
        print(table_row([run for run in runs if run.method == name and run.amount == amount]))
    plot(figure, runs)
    figure.savefig(options.out / "sparse_training.png")
    print(f"\n{time.perf_counter() - started:.0f} s in all; plot: {options.out / 'sparse_training.png'}")
    if options.quick:
        print("A quick run only shows that the script works: its figures mean nothing.")


if __name__ == "__main__":
    main()
