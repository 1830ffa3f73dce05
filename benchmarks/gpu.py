"""Everything to know of one GPU, in one run of under four minutes: exactness, time, memory, and the CUDA tests.

    python benchmarks/gpu.py --out gpu.json          # on the machine with the card
    python benchmarks/gpu.py --profile gpu.txt       # and where the time goes, in a file of tables
    python benchmarks/gpu.py --device cpu --quick    # anywhere, to see that it works

Each section is guarded: one that fails, lacks a package or finds no time left is named, and the others go on. Prints a
Markdown table, and writes the figures as JSON, with the card and the versions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch

import gpu_sections as sections
from gpu_bench import Bench, Figures
from quick import say_if_quick

# The sections in their order, the seconds each needs, and the package without which it is left out.
SECTIONS: tuple[tuple[str, Callable[[Bench], Figures], float, str | None], ...] = (
    ("exactness", sections.exactness, 5, None),
    ("deterministic", sections.deterministic, 5, None),
    ("default device", sections.default_device, 5, None),
    ("waits", sections.waits, 5, None),
    ("scoring, 2 tasks", lambda bench: sections.scoring(bench, 2), 20, None),
    ("cuts, 2 tasks", lambda bench: sections.cuts(bench, 2), 15, None),
    ("scoring, 5 tasks", lambda bench: sections.scoring(bench, 5), 35, None),
    ("cuts, 5 tasks", lambda bench: sections.cuts(bench, 5), 25, None),
    ("2:4", sections.two_of_four, 8, None),
    ("channels", sections.channels, 20, "torch_pruning"),
    ("sparse training", sections.sparse_training, 20, None),
    ("one rank", sections.one_rank, 10, None),
    ("CUDA tests", sections.cuda_tests, 60, "hypothesis"),
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
            arguments.profile.write_text(sections.profiles(bench), encoding="utf-8")
    say_if_quick(arguments.quick)
    if bench.failed:
        raise SystemExit(f"sections that failed: {', '.join(bench.failed)}")


if __name__ == "__main__":
    main()
