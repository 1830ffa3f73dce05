"""Which architectures lose channels correctly: every row in a process of its own, with a time limit.

    python benchmarks/structured_coverage.py --output docs/structured_coverage.md
    python benchmarks/structured_coverage.py --only timm/resnet18,smp/Unet
    python benchmarks/structured_coverage.py --row timm/resnet18      # one row, as JSON

Each model has random weights, random norms and running statistics, and two or three heads. ``remove_channels`` is asked
for half of the channels. *Bare* is torch-pruning alone: ``BasePruner``, magnitude, global, half of the channels, the
heads ignored, the numbers of attention heads given and the attributes of attention brought into line, as its examples
do, on the same model. Whether its values are right is not checked. Every process may take eight gigabytes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import resource
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.coverage import build, rows

AMOUNT = 0.5
TOLERANCE = 1e-5
MEMORY = 8  # gigabytes
OUT_OF_MEMORY = f"out of memory ({MEMORY} GB)"


def losses(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """One loss per output."""
    return {f"task {n}": out.float().square().mean() + out.mean() for n, out in enumerate(model(x))}


def ours(row: str) -> dict[str, Any]:
    """Remove half of the channels."""
    from disparse_plugin.structured import remove_channels

    model, x = build(row)
    widths = {n: _width(m) for n, m in model.named_modules() if _width(m)}
    report = remove_channels(model, losses, [x], x, amount=AMOUNT)
    model.train()
    sum(out.float().square().mean() for out in model(x)).backward()
    alone = {k: v for k, v in report.skipped.items() if v != "makes an output of the model"}
    inner = [name for name in widths if name not in report.skipped or name in alone]
    return {
        "achieved": report.achieved,
        "of_all": 1 - sum(_width(model.get_submodule(name)) for name in inner) / sum(widths[name] for name in inner),
        "parameters": report.parameters.removed,
        "macs": report.macs.removed,
        "deviation": report.deviation,
        "groups": len(report.groups),
        "alone": alone,
    }


def _width(layer: nn.Module) -> int:
    """Return how many outputs a convolution or a linear layer has; 0 for other modules."""
    return (
        int(getattr(layer, "out_channels", 0) or getattr(layer, "out_features", 0)) if hasattr(layer, "weight") else 0
    )


def bare(row: str) -> dict[str, Any]:
    """Do the same with torch-pruning alone, and see whether the model still runs with the same output shapes."""
    import torch_pruning as tp

    from disparse_plugin.structured import attention_heads, sync_attention

    model, x = build(row)
    qkv = attention_heads(model)
    with torch.no_grad():
        shapes = [out.shape for out in model(x)]
    model.train().eval()
    heads = [module for name, module in model.named_modules() if name.split(".")[0] in ("a", "b", "c", "heads")]
    heads += [m for name, m in model.named_modules() if name in ("segmentation_head", "classification_head")]
    pruner = tp.pruner.BasePruner(
        model,
        (x,),
        importance=tp.importance.GroupMagnitudeImportance(),
        global_pruning=True,
        pruning_ratio=AMOUNT,
        ignored_layers=heads,
        in_channel_groups={},
        out_channel_groups={},
        num_heads=dict(qkv),
    )
    counts = pruner.layer_init_out_ch.items()
    layers = [layer for layer, count in counts if count is not None and not isinstance(layer, nn.Parameter)]
    before = sum(pruner.layer_init_out_ch[module] for module in layers)
    pruner.step()
    after = sum(pruner.DG.get_out_channels(module) for module in layers)
    sync_attention({layer: count for layer, count in qkv.items() if layer in layers}, model)
    with torch.no_grad():
        found = [out.shape for out in model(x)]
    if found != shapes:
        raise RuntimeError(f"output shapes change from {shapes} to {found}")
    return {"achieved": 1 - after / before}


def run_row(row: str, limits: dict[str, float], cache: Path | None) -> dict[str, Any]:
    """Run both sides of a row in processes of their own; a side that is in the cache is not run again."""
    lines = cache.read_text().splitlines() if cache and cache.exists() else []
    known = {(entry["row"], entry["side"]): entry for entry in map(json.loads, lines)}
    result: dict[str, Any] = {"row": row}
    for side in ("ours", "bare"):
        if (row, side) in known:
            result[side] = known[row, side]
            continue
        result[side] = _run_side(row, side, limits[side])
        if cache:
            with cache.open("a") as file:
                file.write(json.dumps({"row": row, "side": side, **result[side]}) + "\n")
    print(row, json.dumps({side: _verdict(side, result[side]) for side in ("ours", "bare")}), file=sys.stderr)
    return result


def _run_side(row: str, side: str, limit: float) -> dict[str, Any]:
    start = time.perf_counter()
    command = [sys.executable, __file__, "--row", row, "--side", side]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
        answer = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {"error": _last_words(done)}
    except subprocess.TimeoutExpired:
        answer = {"error": f"no end within {limit:.0f} s"}
    return {**answer, "seconds": time.perf_counter() - start}


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    return OUT_OF_MEMORY if "MemoryError" in done.stderr else done.stderr[-300:] or f"died ({done.returncode})"


def _verdict(side: str, answer: dict[str, Any]) -> str:
    if "error" in answer:
        return "cannot"
    if side == "bare":
        return "runs"
    exact = "works" if not answer["alone"] else f"works, partly ({answer['of_all']:.0%} of {AMOUNT:.0%})"
    return exact if answer["deviation"] <= TOLERANCE else f"{exact}; not equal to masking"


def _reasons(alone: dict[str, str]) -> str:
    counts: dict[str, int] = {}
    for reason in alone.values():
        short = reason.split(":")[0] if reason.startswith("a removal breaks") else reason
        counts[short] = counts.get(short, 0) + 1
    return "; ".join(f"{count} x {reason}" for reason, count in sorted(counts.items(), key=lambda p: -p[1])[:2])


def table(results: list[dict[str, Any]], limits: dict[str, float]) -> str:
    """Write the results as Markdown."""
    versions = {
        n: importlib.metadata.version(n) for n in ("torch", "torch-pruning", "timm", "segmentation-models-pytorch")
    }
    works = sum("error" not in result["ours"] for result in results)
    partly = sum(bool(result["ours"].get("alone")) for result in results)
    exact = sum(result["ours"].get("deviation", 1.0) <= TOLERANCE for result in results)
    others = sum("error" not in result["bare"] for result in results)
    lines = [
        "# Which architectures lose channels",
        "",
        "Made by `python benchmarks/structured_coverage.py` with "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
        f"Half of the channels asked for, and {MEMORY} GB given. Every model has two or three heads. The limit is",
        f"{limits['ours']:.0f} s for `remove_channels` and {limits['bare']:.0f} s for torch-pruning alone.",
        "",
        f"Of {len(results)} rows, {works} work with `remove_channels` ({exact} of them equal to masking the same",
        f"channels within {TOLERANCE:g}), {partly} of them partly; torch-pruning alone leaves {others} in a state that",
        "runs, with no check of its values.",
        "",
        "`works, partly (x of y)`: some layers keep their channels, for the reason given, so that x of the channels of",
        "all inner layers went where y was asked for. `of groups` is the share of the channels of usable groups;",
        "`of all` is the share of the outputs of all inner convolutions and linear layers, which also",
        "differs from what was asked for where the layers of a group are of different width. `deviation` compares with",
        "masking (relative to the largest output).",
        "",
        "| model | ours | of groups | of all | parameters | MACs | deviation | groups / left alone | why | s | "
        "torch-pruning alone |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        mine, other = result["ours"], result["bare"]
        theirs = "runs" if "error" not in other else other["error"].replace("|", "/").replace("\n", " ")[:80]
        if "error" in mine:
            why = mine["error"].replace("|", "/").replace("\n", " ")[:200]
            lines.append(f"| {result['row']} | cannot | | | | | | | {why} | {mine['seconds']:.0f} | {theirs} |")
        else:
            counts = f"{mine['groups']} / {len(mine['alone'])}"
            shares = " | ".join(f"{mine[key]:.3f}" for key in ("achieved", "of_all", "parameters", "macs"))
            lines.append(
                f"| {result['row']} | {_verdict('ours', mine)} | {shares} | {mine['deviation']:.0e} | "
                f"{counts} | {_reasons(mine['alone'])} | {mine['seconds']:.0f} | {theirs} |"
            )
    return "\n".join(lines) + "\n"


def _one_row(row: str, side: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY << 30, MEMORY << 30))
    run: Callable[[str], dict[str, Any]] = ours if side == "ours" else bare
    try:
        print(json.dumps(run(row)))
    except MemoryError:
        print(json.dumps({"error": OUT_OF_MEMORY}))
    except Exception as error:  # noqa: BLE001  the table reports whatever goes wrong
        traceback.print_exc()
        full = "can't allocate memory" in str(error)
        print(json.dumps({"error": OUT_OF_MEMORY if full else f"{type(error).__name__}: {error}"}))


def main() -> None:
    """Run the table, or one row of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", help="run one row in this process and print JSON")
    parser.add_argument("--side", choices=["ours", "bare"], default="ours")
    parser.add_argument("--only", help="comma-separated rows")
    parser.add_argument("--limit", type=float, default=300, help="seconds per model for remove_channels")
    parser.add_argument("--bare-limit", type=float, default=120, help="seconds per model for torch-pruning alone")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--cache", type=Path, help="file of finished rows, to go on after an interruption")
    parser.add_argument("--output", type=Path, help="Markdown file; default: standard output")
    options = parser.parse_args()
    if options.row:
        _one_row(options.row, options.side)
        return
    wanted = options.only.split(",") if options.only else rows()
    limits = {"ours": options.limit, "bare": options.bare_limit}
    with ThreadPoolExecutor(options.workers) as pool:
        results = list(pool.map(lambda row: run_row(row, limits, options.cache), wanted))
    text = table(results, limits)
    if options.output:
        options.output.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
