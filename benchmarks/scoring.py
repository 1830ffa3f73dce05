"""Time and memory of scoring and cutting on the paper's network, against the bare floor and the authors' procedure.

    python benchmarks/scoring.py

Four procedures (see benchmarks/scoring_variants.py), each run in a process of its own so that its peak memory is its
own, in turn and several times over; medians are printed as one Markdown table. Only the ratios carry over to other
machines, and they depend on the image size: the smaller the images, the more the work on weights (scores, masks, topk)
weighs against the convolutions, which no procedure avoids.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from quick import say_if_quick

VARIANTS = ("floor", "package", "recommended", "authors")
WORKER = Path(__file__).with_name("scoring_variants.py")

# (number of tasks, variant) -> what each run of it measured.
Runs: TypeAlias = dict[tuple[int, str], list[dict[str, Any]]]
Row: TypeAlias = tuple[str, Callable[["Medians"], str], str]


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", choices=(2, 5), default=[2, 5], help="how many tasks")
    parser.add_argument("--size", type=int, default=129, help="side of the random images in pixels")
    parser.add_argument("--batch", type=int, default=2, help="images per batch")
    parser.add_argument("--batches", type=int, default=4, help="batches scored")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each procedure; medians are printed")
    parser.add_argument("--amount", type=float, default=0.9, help="fraction of the weights to prune")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor seconds of the process over all its threads, for a machine that others use too",
    )
    parser.add_argument("--quick", action="store_true", help="a tiny network and images, one run: only to see it work")
    arguments = parser.parse_args(words)
    arguments.width, arguments.hidden = 64, 1024
    if arguments.quick:
        arguments.width, arguments.hidden = 4, 8
        arguments.size, arguments.batch, arguments.batches, arguments.repeats = 33, 1, 1, 1
    return arguments


def run_all(arguments: argparse.Namespace) -> Runs:
    """Run every procedure in turn, as often as asked, so that a busy moment does not hit one of them only."""
    runs: Runs = {}
    for repeat in range(arguments.repeats):
        for tasks in arguments.tasks:
            for variant in VARIANTS:
                found = run_one(arguments, tasks, variant)
                runs.setdefault((tasks, variant), []).append(found)
                seconds = {step: round(value, 2) for step, value in clock(arguments, found).items()}
                print(f"run {repeat + 1}/{arguments.repeats}, {tasks} tasks, {variant}: {seconds} s", flush=True)
    return runs


def run_one(arguments: argparse.Namespace, tasks: int, variant: str) -> dict[str, Any]:
    """Run one procedure in a fresh process.

    Raises:
        subprocess.CalledProcessError: If it fails; its own message is on stderr.
    """
    options = ("size", "batch", "batches", "width", "hidden", "amount", "device")
    command = [sys.executable, str(WORKER), "--variant", variant, "--tasks", str(tasks)]
    command += [f"--{option}={getattr(arguments, option)}" for option in options]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def clock(arguments: argparse.Namespace, found: dict[str, Any]) -> dict[str, float]:
    """Return the seconds of each step by the clock that was asked for."""
    seconds: dict[str, float] = found["seconds" if arguments.clock == "wall" else "cpu_seconds"]
    return seconds


class Medians:
    """The medians of all runs with one number of tasks."""

    def __init__(self, runs: Runs, tasks: int, arguments: argparse.Namespace) -> None:
        self._runs = {variant: runs[tasks, variant] for variant in VARIANTS}
        self._arguments = arguments
        self.weights: int = self._runs["package"][0]["weights"]
        self.scores_gib: float = 4 * self._runs["package"][0]["scores"] / 2**30  # float32

    def seconds(self, variant: str, *steps: str) -> float:
        """Return the median seconds of one procedure, over the given steps together."""
        found = [clock(self._arguments, run) for run in self._runs[variant]]
        return statistics.median(sum(run[step] for step in steps) for run in found)

    def gib(self, variant: str, step: str) -> float:
        """Return the median peak memory of one procedure up to the end of a step."""
        peaks: list[float] = [run["peak_mib"][step] for run in self._runs[variant]]
        return statistics.median(peaks) / 1024


ROWS: tuple[Row, ...] = (
    ("prunable weights", lambda m: f"{m.weights:,}", ""),
    ("scoring: floor (a)", lambda m: f"{m.seconds('floor', 'scoring'):.2f} s", ""),
    ("scoring: this package (b)", lambda m: f"{m.seconds('package', 'scoring'):.2f} s", ""),
    ("scoring: authors' procedure (c)", lambda m: f"{m.seconds('authors', 'scoring'):.2f} s", ""),
    ("scoring: b / a", lambda m: f"{m.seconds('package', 'scoring') / m.seconds('floor', 'scoring'):.2f}", "<= 1.10"),
    (
        "scoring: c / b",
        lambda m: f"{m.seconds('authors', 'scoring') / m.seconds('package', 'scoring'):.2f}",
        ">= 2.5 and 4",
    ),
    (
        "scoring: c / a, the limit of c / b",
        lambda m: f"{m.seconds('authors', 'scoring') / m.seconds('floor', 'scoring'):.2f}",
        "",
    ),
    ("scores to masks: (b)", lambda m: f"{m.seconds('package', 'masks'):.2f} s", ""),
    ("scores to masks: topk of (c) alone", lambda m: f"{m.seconds('authors', 'topk'):.2f} s", ""),
    ("scores to masks: (c)", lambda m: f"{m.seconds('authors', 'masks'):.2f} s", ""),
    (
        "scores to masks: b / topk of c",
        lambda m: f"{m.seconds('package', 'masks') / m.seconds('authors', 'topk'):.2f}",
        "< 0.3",
    ),
    (
        "scores to masks: b / c",
        lambda m: f"{m.seconds('package', 'masks') / m.seconds('authors', 'masks'):.2f}",
        "",
    ),
    (
        "scoring and masks: c / b",
        lambda m: f"{m.seconds('authors', 'scoring', 'masks') / m.seconds('package', 'scoring', 'masks'):.2f}",
        "",
    ),
    ("recommended criterion (d), scoring", lambda m: f"{m.seconds('recommended', 'scoring'):.2f} s", ""),
    (
        "recommended criterion, scoring: d / a",
        lambda m: f"{m.seconds('recommended', 'scoring') / m.seconds('floor', 'scoring'):.2f}",
        "<= 1.35",
    ),
    (
        "recommended criterion, scoring and masks: c / d",
        lambda m: f"{m.seconds('authors', 'scoring', 'masks') / m.seconds('recommended', 'scoring', 'masks'):.2f}",
        "",
    ),
    (
        "recommended criterion, peak memory of scoring: d - a - scores",
        lambda m: f"{1024 * (m.gib('recommended', 'scoring') - m.gib('floor', 'scoring') - m.scores_gib):+.0f} MiB",
        "",
    ),
    ("peak memory of scoring: (a)", lambda m: f"{m.gib('floor', 'scoring'):.2f} GiB", ""),
    ("peak memory of scoring: (b)", lambda m: f"{m.gib('package', 'scoring'):.2f} GiB", ""),
    ("peak memory of scoring: (c)", lambda m: f"{m.gib('authors', 'scoring'):.2f} GiB", ""),
    (
        "peak memory of scoring: b - a - scores",
        lambda m: f"{1024 * (m.gib('package', 'scoring') - m.gib('floor', 'scoring') - m.scores_gib):+.0f} MiB",
        "about 0",
    ),
    (
        "peak memory of scoring: c / b",
        lambda m: f"{m.gib('authors', 'scoring') / m.gib('package', 'scoring'):.2f}",
        ">= 2 and 3",
    ),
    ("peak memory of scoring and masks: (b)", lambda m: f"{m.gib('package', 'masks'):.2f} GiB", ""),
    ("peak memory of scoring and masks: (c)", lambda m: f"{m.gib('authors', 'masks'):.2f} GiB", ""),
    (
        "peak memory of scoring and masks: c / b",
        lambda m: f"{m.gib('authors', 'masks') / m.gib('package', 'masks'):.2f}",
        ">= 2 and 3",
    ),
)


def table(runs: Runs, arguments: argparse.Namespace) -> str:
    """Write the medians as a Markdown table, one column per number of tasks."""
    medians = [Medians(runs, tasks, arguments) for tasks in arguments.tasks]
    lines = [
        "| | " + " | ".join(f"{tasks} tasks" for tasks in arguments.tasks) + " | aim |",
        "|---|" + "---:|" * (len(medians) + 1),
    ]
    lines += [f"| {label} | {' | '.join(value(m) for m in medians)} | {aim} |" for label, value, aim in ROWS]
    return "\n".join(lines)


def machine(runs: Runs, arguments: argparse.Namespace) -> str:
    """Say in one line where and on what the figures were measured."""
    found = next(iter(runs.values()))[0]
    where = found["device"] or f"{processor()}, {os.cpu_count()} cores, {found['threads']} torch threads"
    kind = "processor seconds" if arguments.clock == "cpu" else "seconds"
    return (
        f"{where}; torch {found['torch']}, Python {platform.python_version()}; {arguments.batches} batches of "
        f"{arguments.batch} images of {arguments.size} x {arguments.size} pixels, {arguments.amount:.0%} pruned; "
        f"{kind}, median of {arguments.repeats} interleaved runs in separate processes."
    )


def processor() -> str:
    """Return the processor's name, as far as the system tells."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(words: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parse(words)
    runs = run_all(arguments)
    print(f"\n{table(runs, arguments)}\n\n{machine(runs, arguments)}")
    say_if_quick(arguments.quick)


if __name__ == "__main__":
    main()
