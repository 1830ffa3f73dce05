"""Everything to know of one GPU, in one run of under four minutes: exactness, time, memory, and the CUDA tests.

    python benchmarks/gpu.py --out gpu.json          # on the machine with the card
    python benchmarks/gpu.py --profile gpu.txt       # and where the time goes, in a file of tables
    python benchmarks/gpu.py --device cpu --quick    # anywhere, to see that it works

Each section is guarded: one that fails, lacks a package or finds no time left is named, and the others go on. Prints a
Markdown table, and writes the figures as JSON, with the card and the versions.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import io
import json
import os
import platform
import pstats
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from disparse_plugin import DiSparseSemiStructured, TaskScores, prunable_parameters, score_tasks
from disparse_plugin.sparse_training import DiSparseScheduler
from models.paper_network import TASK_SETS, PaperNetwork, random_batches, task_losses
from scoring_variants import floor

Figures: TypeAlias = dict[str, Any]


@dataclass
class Bench:
    """One run: where, how large, how long, and what was found."""

    device: torch.device
    quick: bool
    budget: float
    started: float = field(default_factory=time.monotonic)
    figures: Figures = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    @property
    def cuda(self) -> bool:
        """Whether there is something to wait for."""
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (time.monotonic() - self.started)

    def wait(self) -> None:
        """Let the device finish."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any], repeats: int = 3, warm: int = 1) -> float:
        """Time a call: the median, after a warm-up."""
        for _ in range(warm):
            run()
        found = []
        for _ in range(1 if self.quick else repeats):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            found.append(time.perf_counter() - start)
        return statistics.median(found)

    def gibibytes(self, run: Callable[[], Any]) -> float:
        """Measure how much memory a call takes at its peak, beyond what is held already; 0 without a card."""
        if not self.cuda:
            run()
            return 0.0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.wait()
        return (torch.cuda.max_memory_allocated() - before) / 2**30

    def network(self, tasks: int, *, small: bool = False) -> PaperNetwork:
        """Build the paper's network, or a narrow one."""
        torch.manual_seed(0)
        width, hidden = (4, 8) if self.quick or small else (64, 1024)
        return PaperNetwork(TASK_SETS[tasks], width=width, hidden=hidden).to(self.device)

    def batches(self, tasks: int, count: int, size: int, batch: int) -> list[Any]:
        """Make random batches, tiny ones if quick."""
        if self.quick:
            count, size, batch = 2, 33, 1
        made = random_batches(TASK_SETS[tasks], batches=count, batch=batch, size=size, device=self.device.type)
        return list(made)


def exactness(bench: Bench) -> Figures:
    """The same scores cut on both devices, and twice on one."""
    host = bench.network(2, small=True).cpu().eval()
    batches = [(x.cpu(), {k: v.cpu() for k, v in y.items()}) for x, y in bench.batches(2, 2, 33, 2)]
    scores = score_tasks(host, task_losses, batches)
    there = copy.deepcopy(host).to(bench.device)
    moved = TaskScores(
        there,
        {task: {_twin(there, name): t.to(bench.device) for name, t in _named(scores, task)} for task in scores},
    )
    differing = [
        f"{arbiter} {keep}"
        for arbiter in ("unanimous", "mean", "majority", "any", "at_least(2)", "sum")
        for keep in (0, 3, 0.02)
        if not _same(scores.masks(0.9, arbiter, min_keep=keep), moved.masks(0.9, arbiter, min_keep=keep))
    ]
    again = _same(moved.masks(0.9), moved.masks(0.9))
    return {"masks that differ from the CPU's": differing or "none", "the same masks twice": again}


def _named(scores: TaskScores, task: str) -> Iterator[tuple[str, Tensor]]:
    names = dict(zip(scores.parameters, scores.names, strict=True))
    return ((names[key], tensor) for key, tensor in scores[task].items())


def _twin(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, own = name.rpartition(".")
    return model.get_submodule(path), own


def _same(one: dict[Any, Tensor], other: dict[Any, Tensor]) -> bool:
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(one.values(), other.values(), strict=True))


def deterministic(bench: Bench) -> Figures:
    """What torch refuses under ``use_deterministic_algorithms``."""
    model, batches = bench.network(2, small=True).eval(), bench.batches(2, 2, 33, 2)
    scores = score_tasks(model, task_losses, batches)
    calls = {
        "masks": lambda: scores.masks(0.9),
        "importance": scores.importance,
        "floors": lambda: scores.masks(0.9, min_keep=2),
        "shares": lambda: scores.masks(0.9, "sum"),
    }
    found = {}
    torch.use_deterministic_algorithms(True)
    try:
        for name, call in calls.items():
            try:
                call()
                found[f"deterministic {name}"] = "runs"
            except RuntimeError as error:
                found[f"deterministic {name}"] = str(error)[:90]
    finally:
        torch.use_deterministic_algorithms(False)
    return found


def default_device(bench: Bench) -> Figures:
    """A scheduler under ``torch.set_default_device``."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)).to(bench.device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.set_default_device(bench.device)
    try:
        DiSparseScheduler(model, optimizer, lambda net, x: {"a": net(x).sum()}, amount=0.5, stop_at=9)
    finally:
        torch.set_default_device(None)
    return {"a scheduler under set_default_device": "runs"}


def waits(bench: Bench) -> Figures:
    """Whether the host waits for the card inside the batch loop; torch raises at the line where it does."""
    if not bench.cuda:
        return {"waits inside the batch loop": "not measured without a card"}
    model, batches = bench.network(2, small=True).eval(), bench.batches(2, 4, 33, 2)

    def watched() -> Iterator[Any]:
        for number, batch in enumerate(batches):
            torch.cuda.set_sync_debug_mode("error" if number else "default")
            yield batch
        torch.cuda.set_sync_debug_mode("default")

    try:
        score_tasks(model, task_losses, watched())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"waits inside the batch loop": "none"}


def scoring(bench: Bench, tasks: int) -> Figures:
    """Scoring against the bare floor on the paper's network: what a call costs, and what a batch more."""
    model, few = bench.network(tasks), bench.batches(tasks, 6, 257, 4)
    many = few * (1 if bench.quick else 4)
    runs = {
        "floor": partial(floor, model),
        "scoring": partial(score_tasks, model, task_losses),
        "layer-adaptive scoring": partial(score_tasks, model, task_losses, criterion="layer_adaptive(taylor)"),
    }
    found: Figures = {"weights": sum(getattr(*key).numel() for key in prunable_parameters(model))}
    for name, call in runs.items():
        short, long = bench.seconds(partial(call, few)), bench.seconds(partial(call, many), 1)
        each = (long - short) / max(1, len(many) - len(few))
        found |= {f"{name}, s": short, f"{name}, ms a batch": 1e3 * each}
        found |= {f"{name}, ms a call beside": 1e3 * (short - each * len(few))}
        found |= {f"{name}, GiB beyond what is held": bench.gibibytes(partial(call, few))}
    for name in list(runs)[1:]:
        found[f"{name} / floor"] = found[f"{name}, s"] / found["floor, s"]
        found[f"{name} / floor, a batch"] = found[f"{name}, ms a batch"] / found["floor, ms a batch"]
    return {f"{tasks} tasks: {name}": value for name, value in found.items()}


def cuts(bench: Bench, tasks: int) -> Figures:
    """From scores to masks and agreement scores, on the paper's network."""
    model = bench.network(tasks)
    scores = score_tasks(model, task_losses, bench.batches(tasks, 1, 257, 4))
    calls = {
        "masks": lambda: scores.masks(0.9),
        "masks, mean": lambda: scores.masks(0.9, "mean"),
        "masks, sum of shares": lambda: scores.masks(0.9, "sum"),
        "masks, floors": lambda: scores.masks(0.9, min_keep=0.01),
        "importance": scores.importance,
    }
    weights, found = sum(getattr(*key).numel() for key in prunable_parameters(model)), {}
    for name, call in calls.items():
        gibibytes = bench.gibibytes(call)
        found |= {f"{name}, s": bench.seconds(call), f"{name}, GiB": gibibytes}
        found |= {f"{name}, bytes a weight": gibibytes * 2**30 / weights}
    return {f"{tasks} tasks: {name}": value for name, value in found.items()}


def two_of_four(bench: Bench) -> Figures:
    """A 2:4 weight, converted: the same outputs, and how much faster, by each backend that there is."""
    if not bench.cuda:
        return {"2:4": "not measured without a card"}
    from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

    side, rows, calls = 8192, 16384, 10
    dense = nn.Linear(side, side, bias=False, device=bench.device, dtype=torch.float16)
    importance = torch.rand(dense.weight.shape, device=bench.device)
    DiSparseSemiStructured.apply(dense, "weight", importance_scores=importance)
    prune.remove(dense, "weight")
    x = torch.randn(rows, side, device=bench.device, dtype=torch.float16)
    found: Figures = {"2:4: layer": f"{side} x {side}, {rows} rows, float16"}

    def often(layer: nn.Module) -> None:
        for _ in range(calls):
            layer(x)

    with torch.inference_mode():
        wanted, slow = dense(x), bench.seconds(partial(often, dense), 5) / calls
    found["2:4: dense, ms"] = 1e3 * slow
    for backend in ("CUTLASS", "cuSPARSELt"):
        SparseSemiStructuredTensor._FORCE_CUTLASS = backend == "CUTLASS"
        try:
            sparse = copy.deepcopy(dense)
            sparse.weight = nn.Parameter(to_sparse_semi_structured(dense.weight.detach()))
            with torch.inference_mode():
                difference = (wanted - sparse(x)).abs().max() / wanted.abs().max()
                fast = bench.seconds(partial(often, sparse), 5) / calls
        except RuntimeError as error:
            found[f"2:4: {backend}"] = f"failed: {str(error)[:90]}"
        else:
            found |= {f"2:4: {backend}, ms": 1e3 * fast, f"2:4: {backend}, speed-up": slow / fast}
            found[f"2:4: {backend}, largest relative difference"] = float(difference)
    return found


def channels(bench: Bench) -> Figures:
    """Channels removed, in multiples of what the kernels are made for and as they come, and what that saves."""
    from disparse_plugin.structured import remove_channels

    dense = bench.network(2).eval()
    batches, found = bench.batches(2, 2, 129, 2), Figures()
    for name, round_to in (("channels", "auto"), ("channels, not rounded", None)):
        model = copy.deepcopy(dense)
        start = time.perf_counter()
        report = remove_channels(model, task_losses, batches, batches[0][0], 0.5, round_to=round_to)
        found[f"{name}: removal, s"] = time.perf_counter() - start
        found[f"{name}: MACs left"] = 1 - report.macs.removed
        for size in (1, 16, 64):
            x = torch.randn(size, 3, *batches[0][0].shape[2:], device=bench.device)
            for way, made in (("time", partial), ("time in a CUDA graph", _graphed)):
                if made is partial or bench.device.type == "cuda":
                    with torch.inference_mode():
                        before, after = (bench.seconds(made(net, x), 10, 3) for net in (dense, model))
                    found[f"{name}: {way} left at batch {size}"] = after / before
    return found


def _graphed(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Record a forward once, so that replaying it costs no launches."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            model(x)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(x)
    return graph.replay


def _sparse_training(bench: Bench, batch: Any) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return a plain step, and a step with an update of the masks after it; the masks come with the first call."""
    model = bench.network(2).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    made: list[DiSparseScheduler] = []

    def step() -> None:
        optimizer.zero_grad()
        sum(task_losses(model, batch).values()).backward()
        optimizer.step()

    def updated() -> None:
        if not made:
            made.append(
                DiSparseScheduler(
                    model,
                    optimizer,
                    task_losses,
                    amount=0.9,
                    drop_fraction=lambda _: 0.3,
                    update_every=1,
                    stop_at=10**9,
                )
            )
        step()
        made[0].step(batch)

    return step, updated


def sparse_training(bench: Bench) -> Figures:
    """An update of the masks, against the steps between two updates."""
    step, updated = _sparse_training(bench, bench.batches(2, 1, 129, 8)[0])
    plain = bench.seconds(step, 8, 2)
    updated()
    both, masked = bench.seconds(updated, 3), bench.seconds(step, 8, 2)
    update = both - masked
    return {
        "sparse training: a step, ms": 1e3 * masked,
        "sparse training: an update, ms": 1e3 * update,
        "sparse training: masked step / plain step": masked / plain,
        "sparse training: an update, in steps": update / masked,
        "sparse training: share of one update per 100 steps": update / (100 * masked),
    }


def one_rank(bench: Bench) -> Figures:
    """DistributedDataParallel with one rank: scores and an update of the masks through the real backend."""
    from torch import distributed

    backend = "nccl" if bench.cuda else "gloo"
    store = distributed.HashStore()
    distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(bench.network(2, small=True))
        batch = bench.batches(2, 1, 33, 1)[0]
        optimizer = torch.optim.SGD(wrapped.parameters(), 0.01)
        scheduler = DiSparseScheduler(wrapped, optimizer, task_losses, amount=0.9, update_every=1, stop_at=9)
        sum(task_losses(wrapped, batch).values()).backward()
        optimizer.step()
        update = scheduler.step(batch)
    finally:
        distributed.destroy_process_group()
    assert update is not None
    return {f"one {backend} rank: weights exchanged": sum(update.exchanged.values())}


def cuda_tests(bench: Bench) -> Figures:
    """The tests that need a card."""
    if not bench.cuda:
        return {"CUDA tests": "not run without a card"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "--tb=short", "--no-header", "tests"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=max(10, bench.left), check=False)
    lines = (done.stdout + done.stderr).strip().splitlines()
    found: Figures = {"CUDA tests": lines[-1] if lines else "said nothing"}
    for kind in ("passed", "failed"):
        number = re.search(rf"(\d+) {kind}", found["CUDA tests"])
        found[f"CUDA tests: {kind}"] = int(number[1]) if number else 0
    if done.returncode:
        bench.failed.append("CUDA tests")
        found["CUDA tests: the end of what they said"] = lines[-40:]
    return found


def profiles(bench: Bench) -> str:
    """Write where the time of scoring, of an update and of masks goes: on the host, and on the card."""
    from torch.profiler import ProfilerActivity, profile

    model, batches = bench.network(2), bench.batches(2, 6, 257, 4)
    scores = score_tasks(model, task_losses, batches)
    batch = bench.batches(2, 1, 129, 8)[0]
    _, updated = _sparse_training(bench, batch)
    calls: dict[str, Callable[[], Any]] = {
        "scoring": lambda: score_tasks(model, task_losses, batches),
        "masks": lambda: scores.masks(0.9),
        "importance": scores.importance,
        "an update and a step": updated,
    }
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.cuda else [])]
    written = []
    for name, call in calls.items():
        call()
        bench.wait()
        host = cProfile.Profile()
        host.runcall(lambda call=call: (call(), bench.wait()))
        text = io.StringIO()
        pstats.Stats(host, stream=text).sort_stats("tottime").print_stats(40)
        with profile(activities=activities) as device:
            call()
            bench.wait()
        table = device.key_averages().table(
            sort_by="self_cuda_time_total" if bench.cuda else "self_cpu_time_total",
            row_limit=40,
            max_name_column_width=60,
        )
        written += [f"==== {name}: the host", text.getvalue(), f"==== {name}: the card", table]
    return "\n".join(written)


# The sections in their order, the seconds each needs, and the package without which it is left out.
SECTIONS: tuple[tuple[str, Callable[[Bench], Figures], float, str | None], ...] = (
    ("exactness", exactness, 5, None),
    ("deterministic", deterministic, 5, None),
    ("default device", default_device, 5, None),
    ("waits", waits, 5, None),
    ("scoring, 2 tasks", lambda bench: scoring(bench, 2), 20, None),
    ("cuts, 2 tasks", lambda bench: cuts(bench, 2), 15, None),
    ("scoring, 5 tasks", lambda bench: scoring(bench, 5), 35, None),
    ("cuts, 5 tasks", lambda bench: cuts(bench, 5), 25, None),
    ("2:4", two_of_four, 8, None),
    ("channels", channels, 20, "torch_pruning"),
    ("sparse training", sparse_training, 20, None),
    ("one rank", one_rank, 10, None),
    ("CUDA tests", cuda_tests, 20, "hypothesis"),
)


@contextmanager
def guarded(bench: Bench, name: str) -> Iterator[None]:
    """Name what goes wrong in a section, and go on."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever a section meets on an unknown card
        bench.failed.append(name)
        bench.figures[name] = f"failed: {type(error).__name__}: {str(error)[:200]}"


def run(bench: Bench, skip: Sequence[str]) -> None:
    """Run the sections that there is time for."""
    for name, section, needed, package in SECTIONS:
        if name in skip:
            continue
        if package is not None and find_spec(package) is None:
            bench.figures[name] = f"left out: {package} is not installed"
        elif bench.left < needed and not bench.quick:
            bench.figures[name] = f"left out: {bench.left:.0f} s left"
        else:
            with guarded(bench, name):
                bench.figures |= section(bench)
        if bench.cuda:
            torch.cuda.empty_cache()


def machine(bench: Bench) -> Figures:
    """Say what it was run on."""
    card = torch.cuda.get_device_name() if bench.cuda else platform.processor() or platform.machine()
    return {"device": card, "torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}


def table(figures: Figures) -> str:
    """Draw a Markdown table of all figures."""
    shown = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in figures.items()}
    return "\n".join(["| what | found |", "|---|---|", *(f"| {name} | {value} |" for name, value in shown.items())])


def main(words: Sequence[str] | None = None) -> None:
    """Run, print the table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--budget", type=float, default=225.0, help="seconds for everything")
    parser.add_argument("--skip", nargs="*", default=[], choices=[name for name, *_ in SECTIONS], help="sections")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    parser.add_argument("--profile", type=Path, help="where to write what takes the time, after everything else")
    parser.add_argument("--quick", action="store_true", help="a tiny network and one run: only to see it work")
    arguments = parser.parse_args(words)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or deterministic mode refuses cuBLAS, not us
    warnings.simplefilter("ignore")
    bench = Bench(torch.device(arguments.device), arguments.quick, arguments.budget)
    run(bench, arguments.skip)
    found = {**machine(bench), **bench.figures, "seconds": time.monotonic() - bench.started}
    print(table(found))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")
    if arguments.profile is not None:
        with guarded(bench, "profile"):
            arguments.profile.write_text(profiles(bench), encoding="utf-8")
    if bench.failed:
        raise SystemExit(f"sections that failed: {', '.join(bench.failed)}")


if __name__ == "__main__":
    main()
