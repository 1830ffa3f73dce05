"""The sections of benchmarks/gpu.py: each takes a Bench and returns what it found, by name."""

from __future__ import annotations

import copy
import cProfile
import io
import pstats
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from disparse_plugin import DiSparseSemiStructured, TaskScores, prunable_parameters, score_tasks
from disparse_plugin.sparse_training import DiSparseScheduler
from gpu_bench import Bench, Figures
from models.paper_network import task_losses
from scoring_variants import floor


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
    rooms = [f"tests/{room}" for room in ("accelerator", "agreement", "analysis", "scoring", "sparse_training")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "--tb=short", "--no-header", *rooms]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=bench.left, check=False
        )
    except subprocess.TimeoutExpired as error:
        bench.failed.append("CUDA tests")
        return {"CUDA tests": f"not done within {error.timeout:.0f} s: {str(error.stdout or '')[-200:]}"}
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
