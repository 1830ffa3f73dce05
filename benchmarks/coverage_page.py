"""The page of ``structured_coverage.py``: which architectures lose channels, as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from disparse_plugin.structured.groups import SETTLED
from models.coverage import OLD_ROWS, rows

TOLERANCE = 1e-6
AMOUNT = 0.5
# Layers that have nothing to lose, or of which nothing can be known.
NOTHING_TO_LOSE = SETTLED
_TITLES = {
    "timm": "timm", "smp": "segmentation-models-pytorch", "torchvision": "torchvision",
    "transformers": "Hugging Face, tiny configurations", "modules": "Blocks as users write them",
}  # fmt: skip
_HEAD = """| model | parts | parameters | MACs | outside | outputs | losses | replay | trains | s | left alone |
|---|---|---|---|---|---|---|---|---|---|---|"""
_LEGEND = """
* *parts*: whether everything that has channels to lose lost what was asked, or **partly**: some layers were left alone,
  with the first reason at the end. `cannot`: an error, with its words; the model is then unchanged.
* *parameters*, *MACs*: the shares that are gone of the whole model.
* *outside*: the share of the weights that follow no channels which could be removed.
* *outputs*, *losses*: the largest difference to masking the same channels, of the worst output and of the worst loss,
  relative to the largest entry, in double precision.
* *replay*: the file of the removal gives the same outputs on a fresh model, to the last bit. *trains*: a step of
  training runs afterwards, to finite losses. *s*: seconds of one core.
"""


def left_alone(entry: dict[str, Any]) -> dict[str, str]:
    """Return the layers that could lose channels and did not, with the reasons."""
    return {layer: why for layer, why in entry["skipped"].items() if why not in NOTHING_TO_LOSE}


def is_right(entry: dict[str, Any]) -> bool:
    """Tell whether a removal equals masking, is replayed, and trains."""
    equal = max(entry["outputs"], entry["losses"], entry["deviation"]) <= TOLERANCE
    return equal and bool(entry["replay"]) and bool(entry["trains"])


def line(entry: dict[str, Any]) -> str:
    """Write one row of the table."""
    name = entry["row"].partition("/")[2]
    if "error" in entry:
        return f"| {name} | cannot | | | | | | | | | {_plain(entry['error'])} |"
    alone = left_alone(entry)
    why = f"{len(alone)}: {_plain(next(iter(alone.values())))}" if alone else ""
    cells = [
        name,
        "**partly**" if alone else "all",
        *(f"{entry[key]:.2f}" for key in ("parameters", "macs", "outside")),
        *(f"{entry[key]:.0e}" for key in ("outputs", "losses")),
        *("yes" if entry[key] else "**no**" for key in ("replay", "trains")),
        f"{entry['seconds']:.0f}",
        why,
    ]
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:140]


def _counts(entries: Sequence[dict[str, Any]]) -> str:
    works = [entry for entry in entries if "error" not in entry]
    full = sum(not left_alone(entry) for entry in works)
    right = sum(is_right(entry) for entry in works)
    return f"{len(entries)} rows: {full} lose all that was asked, {len(works) - full} partly, " + (
        f"{len(entries) - len(works)} cannot; {right} equal masking, are replayed and train"
    )


def _versions(entries: Sequence[dict[str, Any]]) -> str:
    """Name what the rows were measured with, not what is installed now."""
    found = Counter(entry["versions"] for entry in entries)
    return "; ".join(f"{versions} ({count} rows)" for versions, count in found.items())


def page(entries: Sequence[dict[str, Any]]) -> str:
    """Write all results as Markdown."""
    old, missing = set(rows()[:OLD_ROWS]), len(rows()) - len(entries)
    parts = [
        "# Which architectures lose channels",
        f"Made by `python benchmarks/structured_coverage.py` with {_versions(entries)}.",
        f"`remove_channels` was asked for {AMOUNT:.0%} of the channels. Weights, norms and running statistics are "
        "random.",
        *([f"**{missing} of the {len(rows())} rows of the script are not measured yet.**"] if missing else []),
        f"* All: {_counts(entries)}.\n"
        f"* Those of version 0.1.0, of which 49 lost all: {_counts([e for e in entries if e['row'] in old])}.",
        _LEGEND.strip(),
    ]
    for library, title in _TITLES.items():
        own = [entry for entry in entries if entry["row"].startswith(f"{library}/")]
        if own:
            parts += [f"## {title}", f"{_counts(own)}.", "\n".join([_HEAD, *map(line, own)])]
    return "\n\n".join(parts) + "\n"
