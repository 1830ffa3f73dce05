"""One HTML file, with everything in it, on what the masks say about a model's tasks."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .._support.files import replacing
from ..masks.sparsity import sparsity_report
from .gradient_conflict import GradientConflict
from .measures import Overlap
from .overlap import TaskOverlap
from .plots import plot_agreement, plot_conflict, plot_density, plot_iou, plot_kept_by, plot_matrix

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1150px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-size:13px}td,th{padding:2px 9px;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}tr:last-child td{border-top:2px solid #222;font-weight:600}
img{max-width:100%}.wide{overflow-x:auto}.note{color:#555;max-width:75ch}pre{white-space:pre-wrap}
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
    """
    parts = [_summary(overlap, model), _sparsity(overlap), _watershed(overlap)]
    parts += [_section(heading, _text(text) + _image(plot(overlap)[0])) for plot, (heading, text) in _CAPTIONS.items()]
    parts.append(_section("Every layer", _table(*_layer_cells(overlap))))
    if conflict is not None:
        body = _text("Cosine between the tasks' gradients, and the share of weights whose signs conflict.")
        body += _image(plot_conflict(conflict)[0]) + f"<pre>{html.escape(str(conflict))}</pre>"
        parts.append(_section("Gradient conflict", body))
    sections: dict[str, object] = {} if model is None else {"Masks on the model": sparsity_report(model)}
    sections |= notes or {}
    parts += [_section(heading, f"<pre>{html.escape(str(note))}</pre>") for heading, note in sections.items()]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    body = f"<h1>{html.escape(title)}</h1>" + "".join(parts)
    page = f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>'
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")
    return Path(path)


def _summary(overlap: TaskOverlap, model: nn.Module | None) -> str:
    trunk = overlap.trunk
    facts = [
        ("tasks", ", ".join(overlap.tasks)),
        ("amount", f"{overlap.amount:g} ({overlap.cut})"),
        ("shared layers", f"{len(overlap)} with {trunk.size:,} alive weights"),
        ("IoU of all tasks", f"{_number(trunk.iou)}, by chance {_number(trunk.chance_iou)}"),
        ("kappa", _number(trunk.kappa)),
        ("rank correlation of the scores", _number(trunk.rank_correlation)),
    ]
    if model is not None:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        facts.insert(0, ("model", f"{type(model).__name__}, {parameters:,} parameters"))
    if overlap.controls is not None:
        for name, layers in zip(
            ("permuted labels", "across halves", "ceiling"), overlap.controls.profiles(), strict=True
        ):
            facts.append((f"kappa, {name}", _number(layers[-1].kappa)))
    rows = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in facts)
    return _section("Summary", f"<table>{rows}</table>")


def _sparsity(overlap: TaskOverlap) -> str:
    """Sparsity of the unanimous mask, i.e. of the union of the tasks' own masks, shared and private."""
    parts: list[tuple[str, Sequence[Overlap]]] = [("shared", overlap.layers)]
    parts += [(f"private to {task}", [p for p in overlap.private if p.tasks == (task,)]) for task in overlap.tasks]
    parts.append(("all", [*overlap.layers, *overlap.private]))
    rows = []
    for name, layers in parts:
        size, removed = sum(layer.size for layer in layers), sum(layer.kept_by[0] for layer in layers)
        if size:
            rows.append([name, f"{size:,}", f"{size - removed:,}", f"{100 * removed / size:.2f} %"])
    text = _text("A weight stays if any task's own mask keeps it (unanimous pruning).")
    return _section("Sparsity of the union of the masks", text + _table(["part", "weights", "kept", "sparsity"], rows))


def _watershed(overlap: TaskOverlap) -> str:
    branch = overlap.suggest_branch()
    return _section("Watershed", _text(overlap.explain_watershed()) + ("" if branch is None else _text(str(branch))))


def _layer_cells(overlap: TaskOverlap) -> tuple[list[str], list[list[str]]]:
    header = ["layer", "weights", *(f"density {task}" for task in overlap.tasks)]
    header += ["IoU", "chance", "kappa", "rank r", *(f"kept by {k}" for k in range(len(overlap.tasks) + 1))]
    profiles = [] if overlap.controls is None else overlap.controls.profiles()
    header += ["permuted", "across", "ceiling"] if profiles else []
    rows = []
    for place, layer in enumerate((*overlap.layers, overlap.trunk)):
        densities = [f"{layer.density[task]:.4f}" if task in layer.density else "" for task in overlap.tasks]
        measures = [_number(value) for value in (layer.iou, layer.chance_iou, layer.kappa, layer.rank_correlation)]
        kept = [f"{count:,}" for count in layer.kept_by] + [""] * (len(overlap.tasks) + 1 - len(layer.kept_by))
        controls = [_number(profile[place].kappa) for profile in profiles]
        rows.append([layer.name, f"{layer.size:,}", *densities, *measures, *kept, *controls])
    return header, rows


def _section(heading: str, body: str) -> str:
    return f"<h2>{html.escape(heading)}</h2>{body}"


def _text(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cells(row: Sequence[str], tag: str) -> Iterator[str]:
        return (f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)

    body = "".join(f"<tr>{''.join(cells(row, 'td'))}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{"".join(cells(header, "th"))}</tr>{body}</table></div>'


def _image(fig: Figure) -> str:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=110)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
