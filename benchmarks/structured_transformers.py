"""Which architectures of Hugging Face lose channels: tiny configurations, half of the channels asked for.

    python benchmarks/structured_transformers.py  # the last section of docs/structured_coverage.md
    python benchmarks/structured_transformers.py --only BERT,Llama

Every model has random weights and two linear heads. *outside* is the share of the parameters that follow no channels
which could be removed. *equal* is the largest difference to the model with the same channels masked, over all outputs
and losses, in double precision. *trains*: a step of training runs afterwards. *replay*: the file of the removal gives
the same outputs on a fresh model, to the last bit.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from disparse_plugin.structured import RemovalReport, remove_channels, replay_removal
from models.hugging_face import NAMES, build

AMOUNT = 0.5
TOLERANCE = 1e-6


def losses(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """One loss per head."""
    return {name: out.square().mean() + out.mean() for name, out in zip("ab", model(**batch), strict=True)}


def trains(model: nn.Module, batch: dict[str, Tensor]) -> bool:
    """Take a step of training; say whether the losses are finite after it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sum(losses(model.train(), batch).values()).backward()
    optimizer.step()
    return all(bool(loss.isfinite()) for loss in losses(model.eval(), batch).values())


def replays(name: str, model: nn.Module, report: RemovalReport, batch: dict[str, Tensor]) -> bool:
    """Replay the removal from its file on a fresh model; say whether the outputs are the same."""
    fresh = build(name)[0]
    with tempfile.TemporaryDirectory() as folder:
        report.save(Path(folder) / "removal.safetensors")
        replay_removal(fresh, Path(folder) / "removal.safetensors")
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        pairs = zip(model.eval()(**batch), fresh.eval()(**batch), strict=True)
        return all(torch.equal(one, other) for one, other in pairs)


def row(name: str) -> list[str]:
    """Remove half of the channels of one model, and describe what came of it."""
    start = time.process_time()
    try:
        model, batch = build(name)
        report = remove_channels(model, losses, [batch], batch, AMOUNT)
    except Exception as error:  # noqa: BLE001  the table reports whatever goes wrong
        return [name, "cannot", "", "", "", "", "", f"{time.process_time() - start:.0f}", _short(str(error))]
    seconds = f"{time.process_time() - start:.1f}"
    ends = "makes an output of the model", "runs but reaches no output", "does not run"
    reasons = [reason for reason in report.skipped.values() if reason not in ends]
    return [
        name,
        f"{report.parameters.removed:.2f}",
        f"{report.macs.removed:.2f}",
        f"{report.outside:.2f}",
        f"{report.deviation:.0e}",
        "yes" if replays(name, model, report, batch) else "no",
        "yes" if trains(model, batch) else "no",
        seconds,
        f"{len(reasons)} x {_short(reasons[0])}" if reasons else "",
    ]


def _short(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:110]


def table(rows: list[list[str]]) -> str:
    """Write the rows as Markdown."""
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("torch", "torch-pruning", "transformers"))
    removed = [float(cells[1]) for cells in rows if cells[1] != "cannot"]
    many = sum(share >= 0.4 for share in removed)
    head = ["model", "parameters", "MACs", "outside", "equal", "replay", "trains", "s", "left alone"]
    lines = [
        "## Transformers",
        "",
        f"Made by `python benchmarks/structured_transformers.py` with {versions}: tiny",
        f"configurations of Hugging Face with two heads, {AMOUNT:.0%} of the channels asked for.",
        f"Of {len(rows)} models, {len(removed)} lose channels, and {many} of them at least 40 % of their parameters.",
        "",
        "`parameters` and `MACs` are the shares removed of the whole model; `outside` is the share of the parameters",
        "that follow no channels which could be removed; `equal` is the largest difference to masking the same",
        "channels, in double precision, over all outputs and losses; `replay`: the file of the removal gives the same",
        "outputs on a fresh model, to the last bit; `trains`: a step of training runs afterwards; `left alone`: the",
        "first reason.",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)]) + "\n"


def main() -> None:
    """Run the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="comma-separated names, where no name has a comma")
    parser.add_argument("--output", type=Path, help="Markdown file; default: standard output")
    options: Any = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    text = table([row(name) for name in (options.only.split(",") if options.only else NAMES)])
    if options.output:
        options.output.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
