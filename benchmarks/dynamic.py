"""What sparse training costs over plain training, in time and memory, on the network shape of the paper.

Time. The same network is trained three ways in one process, taking turns step by step: plain (dense, no masks), static
(masked, no updates) and dynamic. Printed are the medians of a step and of an update, and the share of training time
that the updates take at one per 50 and one per 100 steps: update / (n * step), with the step of dynamic training. The
updates drop 30 % of the alive weights.

Memory. Every way runs in a process of its own; printed is the highest resident memory during training over that before
the network was made.

    python benchmarks/dynamic.py                # a narrow network: a minute or two
    python benchmarks/dynamic.py --width 64     # the full 67.6M weights: several minutes, 8 GB
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from torch import nn

from disparse_plugin import prunable_parameters
from disparse_plugin.sparse_training import DiSparseScheduler
from models.paper_network import NYU_V2, DenseBatch, PaperNetwork, random_batches, task_losses
from quick import say_if_quick

WAYS = ("plain", "static", "dynamic")
RATES = (50, 100)
MEBI = 2**20


class Training:
    """A network in training, and how long its steps and updates take."""

    def __init__(self, way: str, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.model = PaperNetwork(NYU_V2, width=options.width, hidden=16 * options.width).to(options.device).train()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)
        self.scheduler = None if way == "plain" else scheduler(way, self.model, self.optimizer)
        self.steps: list[float] = []
        self.updates: list[float] = []

    def step(self, batch: DenseBatch) -> None:
        """Do one training step, and one update after it."""
        start = now(batch)
        self.optimizer.zero_grad()
        torch.stack([*task_losses(self.model, batch).values()]).sum().backward()
        self.optimizer.step()
        middle = now(batch)
        self.steps.append(middle - start)
        if self.scheduler is not None:
            self.scheduler.step(batch)
            self.updates.append(now(batch) - middle)


def scheduler(way: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> DiSparseScheduler:
    """Mask 90 %; dynamic updates come after every step, so that each can be timed."""
    fraction: Any = {"static": 0.0, "dynamic": lambda _: 0.3}[way]
    return DiSparseScheduler(
        model, optimizer, task_losses, amount=0.9, drop_fraction=fraction, update_every=1, stop_at=10**9
    )


def now(batch: DenseBatch) -> float:
    """Read the clock after the device has finished."""
    if batch[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def batch_of(options: argparse.Namespace) -> DenseBatch:
    """Make the one batch that is used again and again."""
    made = random_batches(NYU_V2, batches=1, batch=options.batch, size=options.size, device=options.device)
    return made[0]


def print_times(options: argparse.Namespace) -> None:
    """Train all ways in turns and print medians and shares."""
    batch = batch_of(options)
    trainings = {way: Training(way, options) for way in WAYS}
    for _ in range(options.repeats + 1):
        for training in trainings.values():
            training.step(batch)
    steps = {way: statistics.median(training.steps[1:]) for way, training in trainings.items()}
    updates = {way: statistics.median(training.updates[1:]) for way, training in trainings.items() if training.updates}
    weights = sum(getattr(*key).numel() for key in prunable_parameters(trainings["plain"].model))
    print(f"{weights / 1e6:.1f}M prunable weights, batch {options.batch} x 3 x {options.size}², {options.device}")
    print(f"{'':<10}{'step [s]':>12}{'of plain':>12}{'update [s]':>12}{'of a step':>12}")
    for way in WAYS:
        update = updates.get(way)
        row = f"{way:<10}{steps[way]:>12.4f}{steps[way] / steps['plain']:>12.2f}"
        print(row if update is None else f"{row}{update:>12.4f}{update / steps[way]:>12.2f}")
    for rate in RATES:
        share = updates["dynamic"] / (rate * steps["dynamic"])
        print(f"one update per {rate} steps adds {100 * share:.2f} % to the training time")


def print_memory(options: argparse.Namespace) -> None:
    """Run each way in a process of its own and print what it needs at most."""
    peaks = {}
    for way in WAYS:
        arguments = [f"--{name}={getattr(options, name)}" for name in ("width", "batch", "size", "device")]
        command = [sys.executable, __file__, f"--memory-of={way}", *arguments]
        peaks[way] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    for way, peak in peaks.items():
        print(f"{way:<10}{peak / MEBI:>12.0f} MiB at most{peak / peaks['plain']:>12.2f} of plain")


def peak_memory(way: str, options: argparse.Namespace) -> int:
    """Return the bytes that three steps need at most over what was there before."""
    batch, cuda = batch_of(options), options.device != "cpu"
    before = 0 if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    training = Training(way, options)
    for _ in range(3):
        training.step(batch)
    if cuda:
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def main() -> None:
    """Read the command line and print everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage; 64 in the paper")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=96, help="pixels of a side")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="a tiny network, to see that it runs")
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.width, options.batch, options.size, options.repeats = 4, 2, 32, 1
    if options.memory_of:
        print(peak_memory(options.memory_of, options))
        return
    print_memory(options)  # first: a process may inherit the high-water mark of the one that starts it
    print_times(options)
    say_if_quick(options.quick)


if __name__ == "__main__":
    main()
