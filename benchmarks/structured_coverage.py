"""Which architectures lose channels correctly: every row in a process of its own, with limits of time and memory.

    python benchmarks/structured_coverage.py                       # runs what is missing, and writes the page
    python benchmarks/structured_coverage.py --only 'smp/*'        # of these
    python benchmarks/structured_coverage.py --again 'timm/swin*'  # these once more
    python benchmarks/structured_coverage.py --at-most 20          # some now, the others in the next call
    python benchmarks/structured_coverage.py --page                # nothing but the page

Each model has random weights, random norms and running statistics, and two tasks or more. ``remove_channels`` is asked
for half of the channels. A line of JSON is kept for each row in ``benchmarks/results/structured_coverage.jsonl``; of
two lines for one row the later counts.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fnmatch
import importlib.metadata
import json
import math
import multiprocessing
import resource
import tempfile
import time
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coverage_page import page
from disparse_plugin._support.example_inputs import as_inputs, run
from disparse_plugin.structured import RemovalReport, remove_channels, replay_removal
from disparse_plugin.structured.adapter.observation import named_tensors
from disparse_plugin.structured.copies import doubled, in_double
from disparse_plugin.structured.masked_copy import mask
from models.case import Case
from models.coverage import build, rows

AMOUNT = 0.5
MEMORY = 8  # gigabytes
PACKAGES = ("torch", "torch-pruning", "timm", "segmentation-models-pytorch", "torchvision", "transformers")
HERE = Path(__file__).parent
RESULTS = HERE / "results" / "structured_coverage.jsonl"
PAGE = HERE.parent / "docs" / "structured_coverage.md"


def row(name: str) -> dict[str, Any]:
    """Remove half of the channels of one model, and describe what came of it."""
    case = build(name)
    full = copy.deepcopy(case.model.train()) if name.startswith("timm/") else copy.deepcopy(case.model)
    case.model.train(full.training if name.startswith("torchvision") else False)
    widths = _widths(case.model)
    start = time.process_time()
    report = remove_channels(case.model, case.losses, [case.batch], case.inputs, AMOUNT)
    seconds = time.process_time() - start
    left, layers = _widths(case.model), [layer for layer in widths if layer not in report.skipped]
    layers += [layer for layer in report.skipped if layer in widths and "an output" not in report.skipped[layer]]
    return {
        "channels": 1 - sum(left[layer] for layer in layers) / max(1, sum(widths[layer] for layer in layers)),
        "parameters": report.parameters.removed,
        "macs": report.macs.removed,
        "outside": report.outside,
        "deviation": report.deviation,
        **differences(case, full, report),
        "replay": replays(name, case, report),
        "trains": trains(case),
        "seconds": seconds,
        "groups": len(report.groups),
        "skipped": dict(report.skipped),
    }


def _widths(model: nn.Module) -> dict[str, int]:
    found = {}
    for name, layer in model.named_modules():
        width = getattr(layer, "out_channels", None) or getattr(layer, "out_features", None)
        if isinstance(width, int) and "weight" in layer._parameters:
            found[name] = width
    return found


def differences(case: Case, full: nn.Module, report: RemovalReport) -> dict[str, float]:
    """Compare with the full model in which the same channels are masked: the worst output, and the worst loss."""
    masked = mask(in_double(full.eval()), list(report.plan.cuts))
    smaller = in_double(copy.deepcopy(case.model)).eval()

    def outputs(model: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return [tensor for _, tensor in named_tensors(run(model, doubled(as_inputs(case.inputs))))]

    def losses(model: nn.Module) -> list[Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return [loss.detach() for loss in case.losses(model, doubled(case.batch)).values()]

    return {
        "outputs": _furthest(outputs(masked), outputs(smaller)),
        "losses": _furthest(losses(masked), losses(smaller)),
    }


def _furthest(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Return the largest difference, relative to the largest entry of each tensor; infinity for other shapes."""
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in found]:
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(expected, found, strict=True) if a.numel()]
    return max((float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)) for a, b in pairs), default=0.0)


def trains(case: Case) -> bool:
    """Take a step of training; say whether the losses are finite after it."""
    optimizer = torch.optim.SGD(case.model.parameters(), lr=1e-4)
    sum(case.losses(case.model.train(), case.batch).values()).backward()
    optimizer.step()
    return all(bool(loss.isfinite()) for loss in case.losses(case.model.eval(), case.batch).values())


def replays(name: str, case: Case, report: RemovalReport) -> bool:
    """Replay the removal from its file on a fresh model; say whether the outputs are the same, to the last bit."""
    fresh = build(name).model
    with tempfile.TemporaryDirectory() as folder:
        report.save(Path(folder) / "removal.safetensors")
        replay_removal(fresh, Path(folder) / "removal.safetensors")
    fresh.load_state_dict(case.model.state_dict())
    with torch.no_grad():
        one, other = (
            [tensor for _, tensor in named_tensors(run(model.eval(), as_inputs(case.inputs)))]
            for model in (case.model, fresh)
        )
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _answer(name: str, limit: float, pipe: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY << 30, MEMORY << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), math.ceil(limit) + 1))  # whatever else runs
    try:
        pipe.send(row(name))
    except MemoryError:
        pipe.send({"error": f"out of memory ({MEMORY} GB)"})
    except Exception as error:  # noqa: BLE001  the table reports whatever goes wrong
        pipe.send({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"})


def guarded(name: str, limit: float) -> dict[str, Any]:
    """Run a row in a process of its own, for so many seconds of a core at most."""
    fork = multiprocessing.get_context("fork")  # the libraries are imported already
    mine, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=_answer, args=(name, limit, theirs))
    process.start()
    theirs.close()
    answer = {"error": f"no end within {limit:.0f} s"}
    if mine.poll(20 * limit):
        with contextlib.suppress(EOFError):
            answer = mine.recv()
    process.kill()
    process.join()
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES)
    return {"row": name, **answer, "versions": versions}


def known() -> dict[str, dict[str, Any]]:
    """Read the finished rows."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {entry["row"]: entry for entry in map(json.loads, lines)}


def main() -> None:
    """Run the rows that are missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="a pattern of rows")
    parser.add_argument("--again", help="a pattern of rows to run once more")
    parser.add_argument("--at-most", type=int, default=10**6, help="how many rows to run in this call")
    parser.add_argument("--limit", type=float, default=300, help="seconds of a core for each row")
    parser.add_argument("--page", action="store_true", help="run nothing")
    options = parser.parse_args()
    wanted = fnmatch.filter(rows(), options.only)
    finished = known()
    todo = [name for name in wanted if name not in finished]
    if options.again:
        todo = fnmatch.filter(wanted, options.again)
    for name in [] if options.page else todo[: options.at_most]:
        answer = guarded(name, options.limit)
        with RESULTS.open("a") as file:
            file.write(json.dumps(answer) + "\n")
        print(name, answer.get("error") or f"{answer['parameters']:.2f} in {answer['seconds']:.0f} s", flush=True)
    PAGE.write_text(page([entry for name in rows() if (entry := known().get(name))]))


if __name__ == "__main__":
    main()
