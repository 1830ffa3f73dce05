"""Write what benchmarks/gpu.py found into docs/performance.md, run beside run.

    python benchmarks/gpu_table.py

The runs lie in ``benchmarks/results/gpu``, as JSON.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "benchmarks" / "results" / "gpu"
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- begin of what benchmarks/gpu_table.py writes -->", "<!-- end of it -->"

# The runs that are shown, in their order.
SHOWN = ("first", "third", "fourth")
# What the page calls a figure, its name in the file, and how it is written. A figure that a run did not measure is left
# empty.
ROWS: tuple[tuple[str, str, str], ...] = (
    *(
        (f"{tasks} tasks: {shown}", f"{tasks} tasks: {name}", form)
        for tasks in (2, 5)
        for shown, name, form in (
            ("prunable weights", "weights", "{:,}"),
            ("scoring / floor, six batches", "scoring / floor", "{:.2f}"),
            ("scoring / floor, each batch more", "scoring / floor, a batch", "{:.2f}"),
            ("layer-adaptive scoring / floor, six batches", "layer-adaptive scoring / floor", "{:.2f}"),
            ("masks", "masks, s", "{:.3f} s"),
            ("masks, memory beyond what is held", "masks, GiB", "{:.2f} GiB"),
            ("masks by the mean", "masks, mean, s", "{:.3f} s"),
            ("masks by the mean, memory beyond what is held", "masks, mean, GiB", "{:.2f} GiB"),
            ("masks by shares", "masks, sum of shares, s", "{:.3f} s"),
            ("masks with floors", "masks, floors, s", "{:.3f} s"),
            ("agreement scores", "importance, s", "{:.3f} s"),
            ("agreement scores, memory beyond what is held", "importance, GiB", "{:.2f} GiB"),
        )
    ),
    ("an update of dynamic masks, in training steps", "sparse training: an update, in steps", "{:.1f}"),
    ("a masked step / a plain step", "sparse training: masked step / plain step", "{:.2f}"),
    ("2:4 by cuSPARSELt, 8192 x 8192, 16384 rows: speed-up", "2:4: cuSPARSELt, speed-up", "{:.2f}"),
    ("channels: MACs left", "channels: MACs left", "{:.3f}"),
    *(
        (f"channels: {way} left at batch {size}", f"channels: {way} left at batch {size}", "{:.2f}")
        for way in ("time", "time in a CUDA graph")
        for size in (1, 16, 64)
    ),
    ("masks that differ from the CPU's", "masks that differ from the CPU's", "{}"),
    ("waits inside the batch loop", "waits inside the batch loop", "{}"),
)


def table() -> str:
    """Draw the table, with the card and the versions under it."""
    runs = [json.loads((RUNS / f"{name}.json").read_text(encoding="utf-8")) for name in SHOWN]
    rows = [f"| {shown} | {' | '.join(_cell(run, name, form) for run in runs)} |" for shown, name, form in ROWS]
    heads = [f"| | {' | '.join(f'{name} run' for name in SHOWN)} |", "|---|" + "---:|" * len(runs)]
    last = runs[-1]
    where = f"{last['device']}, CUDA {last['cuda']}, torch {last['torch']}, Python {last['python']}."
    return "\n".join([*heads, *rows, "", where])


def _cell(run: dict[str, Any], name: str, form: str) -> str:
    return form.format(run[name]) if name in run else ""


def written(page: str) -> str:
    """Put the table between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
