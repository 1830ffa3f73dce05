"""How masks and agreement scores grow with weights and tasks: seconds, bytes, the growth law, and a billion weights.

    python benchmarks/scaling.py                     # what the given memory allows
    python benchmarks/scaling.py --networks          # real ones: ViT-L, ConvNeXt-L, the paper's
    python benchmarks/scaling.py --page              # writes both tables, as kept, into docs/performance.md
    python benchmarks/scaling.py --quick             # to see that it works

Every case runs in a process of its own, on one thread, on scores drawn at random: a trunk that all tasks reach and a
head for each task, of half of the weights each or of a network's own shapes. Bytes are those of the peak beyond the
model and its scores. What has run is kept in ``benchmarks/results/scaling.json``, and is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from disparse_plugin import TaskScores, prunable_parameters
from models.paper_network import TASK_SETS, PaperNetwork
from quick import say_if_quick

Case: TypeAlias = dict[str, Any]
# The network, the weights of a drawn one, the number of tasks, and what is called.
Wanted: TypeAlias = tuple[str, int, int, str]

DRAWN = "drawn"
SIZES, TASKS = (10**6, 3 * 10**6, 10**7, 3 * 10**7, 10**8), (2, 5, 20, 100)
CALLS = ("masks", "sum", "masks of bfloat16", "mean", "majority", "importance")
# Real networks, and about how many weights they have.
NETWORKS = {"paper": 137 * 10**6, "convnext_large": 200 * 10**6, "vit_large_patch16_224": 306 * 10**6}
LARGEST_TENSOR = 4 * 10**6
BILLION = 10**9
ROOT = Path(__file__).parents[1]
KEPT, PAGE = ROOT / "benchmarks" / "results" / "scaling.json", ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- begin of what benchmarks/scaling.py writes -->", "<!-- end of what scaling.py writes -->"


def scores_of(weights: int, tasks: int) -> TaskScores:
    """Draw a model of so many weights in tensors of a usual size, and scores of so many tasks."""
    torch.manual_seed(0)
    parts = {"trunk": weights // 2, **{f"task{number}": weights // 2 // tasks for number in range(tasks)}}
    layers = {name: [_layer(size) for size in _tensors(total)] for name, total in parts.items()}
    return _drawn(layers.pop("trunk"), layers)


def scores_on(network: str, tasks: int) -> TaskScores:
    """Draw scores of so many tasks on the weights of a real network, each task with a head."""
    torch.manual_seed(0)
    if network == "paper":
        paper = PaperNetwork(TASK_SETS[tasks])
        heads = {task: [module for module, _ in prunable_parameters(head)] for task, head in paper.heads.items()}
        return _drawn([module for module, _ in prunable_parameters(paper.trunk)], heads)
    import timm

    trunk = timm.create_model(network, pretrained=False, num_classes=0)
    heads = {f"task{number}": [nn.Linear(trunk.num_features, 1000)] for number in range(tasks)}
    return _drawn([module for module, _ in prunable_parameters(trunk)], heads)


def _drawn(trunk: Sequence[nn.Module], heads: Mapping[str, Sequence[nn.Module]]) -> TaskScores:
    model = nn.ModuleList([*trunk, *(layer for own in heads.values() for layer in own)])
    tables = {
        task: {(layer, "weight"): _like_gradients(layer.get_parameter("weight")) for layer in [*trunk, *own]}
        for task, own in heads.items()
    }
    return TaskScores(model, tables)


def _like_gradients(weight: Tensor) -> Tensor:
    """Draw scores over many orders of magnitude: products of the weight and two normal numbers."""
    return torch.randn(weight.shape).mul_(torch.randn(weight.shape)).mul_(weight.detach()).abs_()


def _tensors(total: int) -> Iterator[int]:
    while total > 0:
        yield min(total, LARGEST_TENSOR)
        total -= LARGEST_TENSOR


def _layer(size: int) -> nn.Module:
    layer = nn.Module()
    layer.register_parameter("weight", nn.Parameter(torch.randn(size), requires_grad=False))
    return layer


def measure(network: str, weights: int, tasks: int, call: str) -> Case:
    """Run one call once; to be done in a process of its own."""
    torch.set_num_threads(1)
    scores = scores_of(weights, tasks) if network == DRAWN else scores_on(network, tasks)
    if call == "masks of bfloat16":
        scores = _changed(scores, Tensor.bfloat16)
    elif call == "sum":
        scores = _changed(scores, lambda row: row.div_(row.max()), shares=True)
    _call(scores_of(10**5, 2), call)  # what the first call imports is not counted
    before = _memory("VmRSS")
    _forget_the_peak()
    start = time.process_time()
    _call(scores, call)
    seconds = time.process_time() - start
    return {
        "network": network,
        "weights": sum(module.get_parameter(name).numel() for module, name in scores.parameters),
        "tasks": tasks,
        "call": call,
        "seconds": seconds,
        "reached": sum(score.numel() for task in scores for score in scores[task].values()),
        "bytes": max(0, _memory("VmHWM") - before),
    }


def _call(scores: TaskScores, call: str) -> None:
    if call == "importance":
        scores.importance()
    else:
        scores.masks(0.9, call if call in ("mean", "majority", "sum") else "unanimous")


def _changed(scores: TaskScores, change: Callable[[Tensor], Tensor], *, shares: bool = False) -> TaskScores:
    tables = {task: {key: change(row) for key, row in scores[task].items()} for task in scores}
    return TaskScores(nn.ModuleList([module for module, _ in scores.parameters]), tables, shares=shares)


def _memory(what: str) -> int:
    """Return the resident memory of this process (``VmRSS``) or its peak (``VmHWM``), on Linux; elsewhere the peak."""
    facts = Path("/proc/self/status")
    if not facts.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) for line in facts.read_text().splitlines() if line.startswith(what)) * 1024


def _forget_the_peak() -> None:
    """Let Linux take the present memory for the peak: drawing the scores took more."""
    peak = Path("/proc/self/clear_refs")
    if peak.exists():
        peak.write_text("5")


def fits(weights: int, tasks: int, call: str, gibibytes: float) -> bool:
    """Guess whether a case fits into the memory: weights, scores of 4 bytes, and what the call takes."""
    return weights * (4 + 4 * (1 + tasks) / 2 + (60 if call == "importance" else 8)) < gibibytes * 2**30


def drawn_cases(sizes: Sequence[int], tasks: Sequence[int], gibibytes: float) -> list[Wanted]:
    """List the cases on drawn models that fit into the memory."""
    every = [(DRAWN, size, number, call) for number in tasks for size in sizes for call in CALLS]
    return [case for case in every if fits(*case[1:], gibibytes)]


def network_cases(gibibytes: float) -> list[Wanted]:
    """List the cases on real networks that fit; the paper's has two tasks or five."""
    every = [(name, 0, number, call) for name in NETWORKS for number in (2, 5) for call in CALLS]
    return [case for case in every if fits(NETWORKS[case[0]], *case[2:], gibibytes)]


def run(wanted: Iterable[Wanted], kept: list[Case], out: Path) -> list[Case]:
    """Run every case that has not run before, and keep what it gave at once."""
    there = {
        (case["network"], case["weights"] if case["network"] == DRAWN else 0, case["tasks"], case["call"])
        for case in kept
    }
    for case in wanted:
        if case not in there:
            command = [sys.executable, __file__, "--one", *map(str, case)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            kept.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(kept[-1]), file=sys.stderr, flush=True)
            out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return kept


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
    drawn = [case for case in cases if case["network"] == DRAWN]
    lines = [
        "| call | tasks | largest run | seconds | ns a weight and task | bytes a weight | seconds grow as | at 10^9 |",
        "|---|---:|---:|---:|---:|---:|---|---:|",
    ]
    for call, number in ((call, number) for call in CALLS for number in sorted({case["tasks"] for case in drawn})):
        own = [case for case in drawn if (case["call"], case["tasks"]) == (call, number)]
        own.sort(key=lambda case: case["weights"])
        if own:
            last = own[-1]
            exponent, seconds = law(own, "seconds")
            memory = last["bytes"] / last["weights"] * BILLION / 2**30
            lines.append(
                f"| {call} | {number} | {last['weights']:,} | {_costs(last)} | n^{exponent:.2f} | {seconds:.0f} s, "
                f"{memory:.0f} GiB |"
            )
    return "\n".join(lines)


def table_of_networks(cases: Sequence[Case]) -> str:
    """Draw one row for each real network, number of tasks and call."""
    lines = [
        "| network | tasks | weights | call | seconds | ns a weight and task | bytes a weight |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    lines += [
        f"| {case['network']} | {case['tasks']} | {case['weights']:,} | {case['call']} | {_costs(case)} |"
        for case in cases
        if case["network"] != DRAWN
    ]
    return "\n".join(lines)


def _costs(case: Case) -> str:
    each, size = 1e9 * case["seconds"] / case["reached"], case["bytes"] / case["weights"]
    return f"{case['seconds']:.2f} | {each:.0f} | {size:.1f}"


def write_page(cases: Sequence[Case], page: Path) -> None:
    """Put both tables into the page about speed."""
    text = page.read_text(encoding="utf-8")
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    page.write_text(f"{before}\n\n{table(cases)}\n\n{table_of_networks(cases)}\n\n{after}", encoding="utf-8")


def main(words: Sequence[str] | None = None) -> None:
    """Run, and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=float, default=8.0, help="GiB that a case may take")
    parser.add_argument("--tasks", type=int, nargs="+", default=TASKS, help="numbers of tasks of drawn models")
    parser.add_argument("--networks", action="store_true", help="real networks in place of drawn models")
    parser.add_argument("--page", action="store_true", help="run nothing: write what is kept into the page")
    parser.add_argument("--out", type=Path, default=KEPT, help="where figures are kept as JSON")
    parser.add_argument("--quick", action="store_true", help="small sizes and few tasks: only to see it work")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.one:
        network, weights, tasks, call = arguments.one
        print(json.dumps(measure(network, int(weights), int(tasks), call)))
        return
    kept = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else []
    if arguments.page:
        if not kept:
            raise SystemExit(f"out: needs figures in {arguments.out}, found none; run this without --page first")
        write_page(kept, PAGE)
        return
    wanted = drawn_cases(SIZES, arguments.tasks, arguments.memory)
    if arguments.quick:
        wanted = drawn_cases((10**4, 3 * 10**4), (2,), arguments.memory)
    elif arguments.networks:
        wanted = network_cases(arguments.memory)
    cases = run(wanted, kept, arguments.out)
    print(f"{table(cases)}\n\n{table_of_networks(cases)}")
    say_if_quick(arguments.quick)


if __name__ == "__main__":
    main()
