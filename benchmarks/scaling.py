"""How masks and agreement scores grow with weights and tasks: seconds, bytes, the growth law, and a billion weights.

    python benchmarks/scaling.py                     # what the given memory allows
    python benchmarks/scaling.py --quick             # to see that it works

Every case runs in a process of its own, on one thread, on scores drawn at random: a trunk of half of the weights that
all tasks reach, and a head for each task. Bytes are those of the peak beyond the model and its scores.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from disparse_plugin import TaskScores

Case: TypeAlias = dict[str, Any]

SIZES, TASKS, CALLS = (10**6, 3 * 10**6, 10**7, 3 * 10**7, 10**8), (2, 5, 20, 100), ("masks", "mean", "importance")
LARGEST_TENSOR = 4 * 10**6
BILLION = 10**9


def scores_of(weights: int, tasks: int) -> TaskScores:
    """Draw a model of so many weights in tensors of a usual size, and scores of so many tasks."""
    torch.manual_seed(0)
    parts = {"trunk": weights // 2, **{f"task{number}": weights // 2 // tasks for number in range(tasks)}}
    layers = {name: [_layer(size) for size in _tensors(total)] for name, total in parts.items()}
    model = nn.ModuleList([layer for own in layers.values() for layer in own])
    reached = {task: [*layers["trunk"], *layers[task]] for task in parts if task != "trunk"}
    tables = {
        task: {(layer, "weight"): torch.rand_like(layer.weight).square_() for layer in own}
        for task, own in reached.items()
    }
    return TaskScores(model, tables)


def _tensors(total: int) -> Iterator[int]:
    while total > 0:
        yield min(total, LARGEST_TENSOR)
        total -= LARGEST_TENSOR


def _layer(size: int) -> nn.Module:
    layer = nn.Module()
    layer.register_parameter("weight", nn.Parameter(torch.randn(size), requires_grad=False))
    return layer


def measure(weights: int, tasks: int, call: str) -> Case:
    """Run one call once; to be done in a process of its own."""
    torch.set_num_threads(1)
    scores = scores_of(weights, tasks)
    TaskScores.masks(scores_of(10**4, tasks), 0.9)  # what the first call imports is not counted
    before, start = _peak(), time.process_time()
    if call == "importance":
        scores.importance()
    else:
        scores.masks(0.9, "mean" if call == "mean" else "unanimous")
    seconds = time.process_time() - start
    reached = sum(table.numel() for task in scores for table in scores[task].values())
    return {"weights": weights, "tasks": tasks, "call": call, "seconds": seconds, "reached": reached,
            "bytes": _peak() - before}  # fmt: skip


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def fits(weights: int, tasks: int, gibibytes: float) -> bool:
    """Guess whether a case fits into the memory: scores of 4 bytes, and as much again as full ranks take."""
    return weights * (4 + 4 * (1 + tasks) / 2 + 40 + 6 * tasks) < gibibytes * 2**30


def run(sizes: Sequence[int], tasks: Sequence[int], gibibytes: float) -> list[Case]:
    """Run every case that fits."""
    found = []
    for number in tasks:
        for size in sizes:
            for call in CALLS if fits(size, number, gibibytes) else ():
                command = [sys.executable, __file__, "--one", str(size), str(number), call]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                found.append(json.loads(output.splitlines()[-1]))
                print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


def law(cases: Sequence[Case], what: str) -> tuple[float, float]:
    """Fit ``what = c * weights ** e`` by least squares in logarithms, and return e and the value at a billion.

    The value goes on from the largest run, in proportion at least: below it what does not grow weighs too much.
    """
    points = [(math.log(case["weights"]), math.log(max(1e-9, case[what]))) for case in cases]
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    exponent = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 1.0
    return exponent, cases[-1][what] * (BILLION / cases[-1]["weights"]) ** max(1.0, exponent)


def table(cases: Sequence[Case]) -> str:
    """Draw one row for each call and number of tasks: the largest size that ran, and what a billion would need."""
    lines = [
        "| call | tasks | largest run | seconds | ns a weight and task | bytes a weight | seconds grow as | at 10^9 |",
        "|---|---:|---:|---:|---:|---:|---|---:|",
    ]
    for call in CALLS:
        for number in sorted({case["tasks"] for case in cases}):
            own = [case for case in cases if case["call"] == call and case["tasks"] == number]
            last = own[-1]
            exponent, seconds = law(own, "seconds")
            lines.append(
                f"| {call} | {number} | {last['weights']:,} | {last['seconds']:.2f} | "
                f"{1e9 * last['seconds'] / last['reached']:.0f} | {last['bytes'] / last['weights']:.1f} | "
                f"n^{exponent:.2f} | {seconds:.0f} s, {last['bytes'] / last['weights'] * BILLION / 2**30:.0f} GiB |"
            )
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    """Run, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=float, default=8.0, help="GiB that a case may take")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    parser.add_argument("--quick", action="store_true", help="small sizes and few tasks: only to see it work")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.one:
        weights, tasks, call = arguments.one
        print(json.dumps(measure(int(weights), int(tasks), call)))
        return
    sizes, tasks = ((10**4, 3 * 10**4), (2,)) if arguments.quick else (SIZES, TASKS)
    cases = run(sizes, tasks, arguments.memory)
    print(table(cases))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(cases, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
