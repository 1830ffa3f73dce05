"""One HTML file, with everything in it, on what the masks say about a model's tasks.

It is written for a browser of any width, in light and in dark, and for readers who hear it: the answer first in plain
words, every picture with a text that says what it shows, nothing told by colour alone.
"""

from __future__ import annotations

import base64
import datetime
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .._support.files import replacing
from .._support.text_table import Table, escaped
from ..kinds import check_kind
from ..masks.sparsity import sparsity_report
from ..parameters import unwrap
from .controls import LOWEST_CEILING
from .gradient_conflict import GradientConflict
from .measures import Overlap
from .overlap import TaskOverlap
from .plots import plot_agreement, plot_conflict, plot_density, plot_iou, plot_kept_by, plot_matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLE = """
:root{color-scheme:light dark;--text:#1d1d1f;--soft:#55585e;--line:#d5d8dd;--page:#fff;--card:#f4f6f8;--accent:#0072b2}
@media(prefers-color-scheme:dark){:root{--text:#e6e7e9;--soft:#a9adb5;--line:#3b4048;--page:#15171a;--card:#1f2328;
--accent:#56b4e9}}
*{box-sizing:border-box}
body{font:16px/1.55 system-ui,sans-serif;margin:0;color:var(--text);background:var(--page);overflow-wrap:anywhere}
main{max-width:1150px;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.7rem;line-height:1.25;margin:.2em 0 .6em}
h2{font-size:1.2rem;margin:2.2em 0 .4em}
p{max-width:75ch;margin:.5em 0}
.soft{color:var(--soft)}
.verdict{background:var(--card);border-left:4px solid var(--accent);border-radius:4px;padding:.7rem 1rem;max-width:80ch}
.wide{overflow-x:auto;border-radius:4px}
.wide:focus-visible{outline:2px solid var(--accent)}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
td,th{padding:.25rem .6rem;border-bottom:1px solid var(--line);vertical-align:top;white-space:nowrap}
th{font-weight:600;color:var(--soft)}
.facts td,.facts th{white-space:normal;text-align:left}
.facts th{min-width:8rem}
img{display:block;background:#fff;border-radius:4px;max-width:100%;height:auto}
@media(max-width:700px){img{max-width:none;width:max(36rem,calc(var(--width)*.6))}
td,th{padding:.25rem .4rem}td:first-child{white-space:normal;min-width:6.5rem}}
pre{white-space:pre-wrap;font-size:.85rem}
"""

_CAPTIONS: Mapping[Callable[[TaskOverlap], tuple[Any, Any]], tuple[str, str]] = {
    plot_agreement: (
        "Agreement beyond chance",
        "Kappa is 1 for equal masks and 0 for independent ones at any density. Compare tasks across halves of the data "
        "with the ceiling, which is what one task reaches with itself: where the two meet, the tasks are as alike as "
        "the scores can tell. What remains with permuted labels comes from the architecture and the inputs.",
    ),
    plot_iou: (
        "Intersection over union",
        "The paper's figure. The height of a bar means little by itself: it follows the density of the layer, as the "
        "chance line shows.",
    ),
    plot_matrix: (
        "Task by task",
        "Kappa over all shared layers; with controls across halves of the data, so that the diagonal, "
        "each task with itself, is the most to expect.",
    ),
    plot_kept_by: ("Kept by how many tasks", "Of the weights that stay, how many each number of tasks asked for."),
    plot_density: ("Density", "What each task's own mask keeps of each shared layer."),
}


def html_report(
    path: str | Path,
    overlap: TaskOverlap,
    *,
    model: nn.Module | None = None,
    conflict: GradientConflict | None = None,
    title: str = "What the masks say about the tasks",
    notes: Mapping[str, object] | None = None,
) -> Path:
    """Write sparsity, overlap, watershed, gradient conflict and all plots into one self-contained HTML file.

    Args:
        path: The file; an existing one is replaced atomically.
        overlap: From :func:`~disparse_plugin.analysis.task_overlap`, or with controls.
        model: If given, its class and number of parameters are reported, and the masks that it carries.
        conflict: If given, a section on gradient conflict is added.
        title: The heading.
        notes: Further sections: heading to anything whose ``str()`` says it.

    Returns:
        The path.

    Raises:
        ImportError: If matplotlib is not installed.
        OSError: If the file cannot be written; the error names it.

    Example:
        >>> import tempfile, torch
        >>> from disparse_plugin import score_tasks
        >>> from disparse_plugin.analysis import task_overlap
        >>> net = nn.Linear(4, 2)
        >>> losses = lambda model, x: {"a": model(x)[:, 0].square().mean(), "b": model(x).square().mean()}
        >>> overlap = task_overlap(score_tasks(net, losses, [torch.randn(8, 4)]), 0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     html_report(f"{folder}/tasks.html", overlap, model=net).suffix
        '.html'
    """
    check_kind("overlap", overlap, TaskOverlap, "a TaskOverlap; task_overlap(scores, amount) makes one")
    check_kind("title", title, str, "text")
    if model is not None:
        unwrap(model)
    parts = [_verdict(overlap), _facts(overlap, model), _sparsity(overlap)]
    for plot, (heading, text) in _CAPTIONS.items():
        parts.append(_section(heading, _text(text) + _picture(heading, *plot(overlap))))
    parts.append(_section("Every layer", _table(_layers(overlap), "Every layer")))
    if conflict is not None:
        heading = "Gradient conflict"
        body = _text("Cosine between the tasks' gradients, and the share of weights whose signs conflict.")
        body += _picture(heading, *plot_conflict(conflict)) + _table(conflict._table(), heading)
        parts.append(_section(heading, body))
    if model is not None:
        heading = "Masks on the model"
        parts.append(_section(heading, _table(sparsity_report(model)._table(), heading)))
    parts += [_section(heading, f"<pre>{_lines(str(note))}</pre>") for heading, note in (notes or {}).items()]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escaped(title)}</title><style>{_STYLE}</style>"
    )
    body = f"<main><h1>{escaped(title)}</h1>{''.join(parts)}</main>"
    with replacing(path) as temporary:
        page = f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>'
        temporary.write_text(page, encoding="utf-8")
    return Path(path)


def _verdict(overlap: TaskOverlap) -> str:
    """Say in plain words whether the tasks want the same weights, how sure that is, and where it changes."""
    trunk = overlap.trunk
    sentences = [
        f"{_agreement(trunk.kappa)} (kappa {_number(trunk.kappa)}; 0 is chance, 1 is the same weights). "
        f"{_doubt(overlap)}",
        overlap.explain_watershed(),
    ]
    if (branch := overlap.suggest_branch()) is not None:
        sentences.append(str(branch))
    return f'<div class="verdict">{"".join(f"<p>{_lines(sentence)}</p>" for sentence in sentences)}</div>'


def _agreement(kappa: float) -> str:
    if math.isnan(kappa):
        return "Whether the tasks want the same weights cannot be told: every task keeps all of them, or none"
    if kappa < 0.05:
        return "The tasks want the same weights no more often than chance would have it"
    if kappa < 0.4:
        return "The tasks want the same weights somewhat more often than chance would have it"
    return "The tasks want the same weights much more often than chance would have it"


def _doubt(overlap: TaskOverlap) -> str:
    """Say what the controls make of it."""
    if overlap.controls is None:
        return "How much of that comes from what the tasks learn is unknown without controls: overlap_with_controls."
    permuted, across, ceiling = (layers[-1].kappa for layers in overlap.controls.profiles())
    if math.isnan(ceiling):
        return "On halves of the data every task keeps all of them as well, or none."
    if ceiling < LOWEST_CEILING:
        return (
            f"But the scores are noise: a task agrees with itself on other data by no more than {_number(ceiling)}. "
            "Score more batches before concluding anything."
        )
    nearly = "nearly all of it" if overlap.trunk.kappa - permuted < 0.1 else "so much"
    return (
        f"With permuted labels it is {_number(permuted)}: {nearly} comes from architecture and inputs alone. On "
        f"different halves of the data, tasks reach {_number(across)} with each other and {_number(ceiling)} with "
        "themselves, which is the most to expect."
    )


def _facts(overlap: TaskOverlap, model: nn.Module | None) -> str:
    """Tell what was scored, and when."""
    trunk = overlap.trunk
    meaning = "each task's own mask removes" if overlap.cut == "per_task" else "the union of the tasks' masks removes"
    amount = f"{100 * overlap.amount:g} %" if isinstance(overlap.amount, float) else f"{overlap.amount:,} weights"
    now = datetime.datetime.now().astimezone()
    facts = [
        ("tasks", ", ".join(overlap.tasks)),
        ("scored", f"{overlap.criterion} on {overlap.num_batches} batches"),
        ("amount", f"{meaning} {amount}"),
        ("shared layers", f"{len(overlap)} with {trunk.size:,} weights"),
        ("IoU of all tasks", f"{_number(trunk.iou)}, by chance {_number(trunk.chance_iou)}"),
        ("kappa", _number(trunk.kappa)),
        ("rank correlation of the scores", _number(trunk.rank_correlation)),
    ]
    if model is not None:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        facts.insert(0, ("model", f"{type(model).__name__}, {parameters:,} parameters"))
    facts.append(("written", f"{now:%Y-%m-%d %H:%M %Z}, torch {torch.__version__}"))
    rows = "".join(f'<tr><th scope="row">{escaped(name)}</th><td>{escaped(value)}</td></tr>' for name, value in facts)
    return _section("What was scored", f'<table class="facts">{rows}</table>')


def _sparsity(overlap: TaskOverlap) -> str:
    """Sparsity of the unanimous mask, i.e. of the union of the tasks' own masks, shared and private."""
    parts: list[tuple[str, Sequence[Overlap]]] = [("shared", overlap.layers)]
    parts += [(f"private to {task}", [p for p in overlap.private if p.tasks == (task,)]) for task in overlap.tasks]
    parts.append(("all", [*overlap.layers, *overlap.private]))
    rows = [("part", "weights", "kept", "sparsity")]
    for name, layers in parts:
        size, removed = sum(layer.size for layer in layers), sum(layer.kept_by[0] for layer in layers)
        if size:
            rows.append((name, f"{size:,}", f"{size - removed:,}", f"{100 * removed / size:.2f} %"))
    heading = "Sparsity of the union of the masks"
    text = _text("A weight stays if any task's own mask keeps it (unanimous pruning).")
    return _section(heading, text + _table(Table(rows), heading))


def _layers(overlap: TaskOverlap) -> Table:
    header = ["layer", "weights", *(f"density {task}" for task in overlap.tasks)]
    header += ["IoU", "chance", "kappa", "rank r", *(f"kept by {k}" for k in range(len(overlap.tasks) + 1))]
    profiles = [] if overlap.controls is None else overlap.controls.profiles()
    header += ["permuted", "across", "ceiling"] if profiles else []
    rows = [header]
    for place, layer in enumerate((*overlap.layers, overlap.trunk)):
        densities = [f"{layer.density[task]:.4f}" if task in layer.density else "" for task in overlap.tasks]
        measures = [_number(value) for value in (layer.iou, layer.chance_iou, layer.kappa, layer.rank_correlation)]
        kept = [f"{count:,}" for count in layer.kept_by] + [""] * (len(overlap.tasks) + 1 - len(layer.kept_by))
        controls = [_number(profile[place].kappa) for profile in profiles]
        rows.append([layer.name, f"{layer.size:,}", *densities, *measures, *kept, *controls])
    return Table(rows)


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{escaped(heading)}</h2>{body}</section>"


def _text(text: str) -> str:
    return f'<p class="soft">{escaped(text)}</p>'


def _lines(text: str) -> str:
    return "\n".join(map(escaped, text.splitlines()))


def _scrolling(body: str, label: str) -> str:
    """Let what is wide scroll by itself, with the keyboard too."""
    return f'<div class="wide" tabindex="0" role="region" aria-label="{escaped(label)}">{body}</div>'


def _table(table: Table, label: str) -> str:
    return _scrolling(table.html(), f"{label}, table")


def _picture(heading: str, fig: Figure, ax: Axes) -> str:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=110)
    width = round(fig.get_size_inches()[0] * 110)
    shown = " ".join([heading, ax.get_title(), f"({ax.get_ylabel()})" if ax.get_ylabel() else ""]).replace("\\$", "$")
    data = base64.b64encode(buffer.getvalue()).decode()
    image = f'<img alt="{escaped(shown)}" style="--width:{width}px" width="{width}" src="data:image/png;base64,{data}">'
    return _scrolling(image, f"{heading}, picture")


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
