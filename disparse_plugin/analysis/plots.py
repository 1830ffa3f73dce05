"""Pictures of an overlap: every function takes ``ax=None`` and returns ``(fig, ax)``.

Colours are those of Okabe and Ito, which readers with any colour vision tell apart; lines differ in style or marker
too.
Needs matplotlib, which is imported when the first picture is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .gradient_conflict import GradientConflict
    from .measures import Overlap
    from .overlap import TaskOverlap

BLUE, ORANGE, GREEN, PURPLE, VERMILION, SKY, YELLOW, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000",
)  # fmt: skip
_TASK_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
_TASK_MARKERS = "osD^vPX*"
_CONTROLS = {
    "permuted": {"color": VERMILION, "linestyle": ":", "label": "labels permuted"},
    "across": {"color": BLUE, "linestyle": "-", "label": "across halves of the data"},
    "ceiling": {"color": GREEN, "linestyle": "-.", "label": "ceiling: each task with itself, across halves"},
}
_MAX_LABELS = 40


def plot_iou(overlap: TaskOverlap, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw the paper's figure, IoU bars per layer, with what chance gives and the controls.

    With controls and three or more tasks it is the IoU over all pairs, since the controls are about pairs; otherwise
    that of all tasks together.

    Args:
        overlap: The overlap.
        ax: Where to draw; by default a new figure.

    Returns:
        The figure and the axes.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    fig, ax = _canvas(ax, len(overlap))
    pairs = overlap.controls is not None and len(overlap.tasks) > 2
    layers = [layer.pairwise() if pairs else layer for layer in overlap]
    ax.bar(range(len(layers)), [layer.iou for layer in layers], color=SKY, width=0.85, label="observed")
    _steps(ax, [layer.chance_iou for layer in layers], color=BLACK, linestyle="--", label="chance at these densities")
    for name, controls in _controls(overlap).items():
        _steps(ax, [(c.pairwise() if pairs else c).iou for c in controls], **_CONTROLS[name])
    ax.set_ylim(0, 1.02)
    ax.set_ylabel("IoU, pairs of tasks" if pairs else "IoU")
    trunk = overlap.trunk.pairwise() if pairs else overlap.trunk
    ax.set_title(f"Trunk: IoU {100 * trunk.iou:.1f} %, by chance {100 * trunk.chance_iou:.1f} %")
    _finish(ax, overlap.names)
    return fig, ax


def plot_agreement(overlap: TaskOverlap, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw agreement beyond chance (kappa) per layer, with the controls and the watershed where there is one.

    Args:
        overlap: The overlap.
        ax: Where to draw; by default a new figure.

    Returns:
        The figure and the axes.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    fig, ax = _canvas(ax, len(overlap))
    ax.bar(range(len(overlap)), [layer.kappa for layer in overlap], color=SKY, width=0.85, label="observed")
    ax.axhline(0, color=BLACK, linestyle="--", label="chance")
    for name, controls in _controls(overlap).items():
        _steps(ax, [layer.kappa for layer in controls], **_CONTROLS[name])
    watershed = overlap.watershed()
    if watershed is not None:
        place = overlap.names.index(watershed.layer)
        ax.axvline(place + 0.5, color=PURPLE, linewidth=2, label=f"watershed after {watershed.layer}")
    ax.set_ylim(min(-0.02, ax.get_ylim()[0]), 1.02)
    ax.set_ylabel("agreement beyond chance (kappa)")
    ax.set_title(
        f"Trunk: kappa {overlap.trunk.kappa:.3f}; " + ("no watershed" if watershed is None else "watershed found")
    )
    _finish(ax, overlap.names)
    return fig, ax


def plot_matrix(overlap: TaskOverlap, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw kappa between every two tasks over all shared layers.

    With controls, it is kappa across halves of the data, with each task's agreement with itself on the diagonal.

    Args:
        overlap: The overlap.
        ax: Where to draw; by default a new figure.

    Returns:
        The figure and the axes.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    count = len(overlap.tasks)
    fig, ax = _canvas(ax, count, size=(2.8 + 0.85 * count, 2.2 + 0.75 * count))
    table = np.full((count, count), np.nan)
    trunk = overlap.trunk if overlap.controls is None else overlap.controls.across_trunk
    for a, b in overlap.trunk.pairs:
        row, column = overlap.tasks.index(a), overlap.tasks.index(b)
        table[row, column] = table[column, row] = trunk.pair(a, b).kappa
    if overlap.controls is not None:
        for place, task in enumerate(overlap.tasks):
            table[place, place] = overlap.controls.ceiling_of(task).kappa
    image = ax.imshow(table, vmin=float(np.min(table, initial=0.0, where=~np.isnan(table))), vmax=1, cmap="cividis")
    for row, values in enumerate(table.tolist()):
        for column, value in enumerate(values):
            if not math.isnan(value):
                shade = BLACK if value > 0.6 else "#FFFFFF"
                ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=shade)
    ax.set_xticks(range(count), overlap.tasks, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(count), overlap.tasks)
    note = "" if overlap.controls is None else "\nacross halves of the data; diagonal: with itself"
    ax.set_title(f"Trunk: kappa between tasks{note}")
    fig.colorbar(image, ax=ax, shrink=0.85, label="kappa")
    return fig, ax


def plot_kept_by(overlap: TaskOverlap, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw, per layer, how the weights that any task keeps divide into those kept by 1, 2, ... T tasks.

    Args:
        overlap: The overlap.
        ax: Where to draw; by default a new figure.

    Returns:
        The figure and the axes.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    fig, ax = _canvas(ax, len(overlap))
    colours = _canvas_module().colormaps["cividis_r"]
    count = len(overlap.tasks)
    kept = np.array([layer.kept_by + (0,) * (count + 1 - len(layer.kept_by)) for layer in overlap], dtype=float)[:, 1:]
    shares = kept / np.maximum(kept.sum(axis=1, keepdims=True), 1)
    bottom, width = np.zeros(len(overlap)), 0.85 if len(overlap) <= _MAX_LABELS else 1.0
    for k in range(count):
        colour = colours(0.15 + 0.85 * k / max(count - 1, 1))
        label = f"{k + 1} task" + ("s" if k else "")
        ax.bar(range(len(overlap)), shares[:, k], bottom=bottom, color=colour, width=width, label=label)
        bottom += shares[:, k]
    for place in np.flatnonzero(kept.sum(axis=1) == 0):
        ax.text(float(place), 0.02, "empty", rotation=90, ha="center", va="bottom", fontsize=7)
    ax.set_ylim(0, 1)
    ax.set_ylabel("share of the weights kept by any task")
    ax.set_title("Kept by exactly k tasks")
    _finish(ax, overlap.names)
    return fig, ax


def plot_density(overlap: TaskOverlap, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw, per layer, the share of the weights that each task keeps, on a logarithmic scale.

    Args:
        overlap: The overlap.
        ax: Where to draw; by default a new figure.

    Returns:
        The figure and the axes.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    fig, ax = _canvas(ax, len(overlap))
    for place, task in enumerate(overlap.tasks):
        values = [layer.density.get(task, math.nan) or math.nan for layer in overlap]  # zero has no logarithm
        ax.plot(
            range(len(overlap)),
            values,
            color=_TASK_COLOURS[place % len(_TASK_COLOURS)],
            marker=_TASK_MARKERS[place % len(_TASK_MARKERS)],
            markersize=4 if len(overlap) <= _MAX_LABELS else 1.5,
            linewidth=1,
            label=task,
        )
    ax.set_yscale("log")
    ax.set_ylabel("density of each task's own mask")
    ax.set_title("Density per layer and task (missing: nothing kept)")
    _finish(ax, overlap.names)
    return fig, ax


def plot_conflict(conflict: GradientConflict, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw the cosine between the tasks' gradients per layer, one line per pair, with its scatter over the batches.

    Args:
        conflict: What ``score_tasks(..., observe=conflict)`` collected.
        ax: Where to draw; by default a new figure.

    Returns:
        The figure and the axes.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    layers = conflict.layers()
    names = tuple(dict.fromkeys(found.name for found in layers))
    fig, ax = _canvas(ax, len(names))
    for number, pair in enumerate(dict.fromkeys(found.tasks for found in layers)):
        mine = [found for found in layers if found.tasks == pair]
        places = [names.index(found.name) for found in mine]
        means, scatter = (np.array([getattr(f, what) for f in mine]) for what in ("cosine", "cosine_std"))
        colour, marker = _TASK_COLOURS[number % len(_TASK_COLOURS)], _TASK_MARKERS[number % len(_TASK_MARKERS)]
        ax.plot(places, means, color=colour, marker=marker, markersize=3.5, linewidth=1, label=" & ".join(pair))
        if number < 3:  # more bands than that hide each other
            ax.fill_between(places, means - scatter, means + scatter, color=colour, alpha=0.15, linewidth=0)
    ax.axhline(0, color=BLACK, linewidth=0.8)
    ax.set_ylabel("cosine between gradients")
    ax.set_title("Gradient cosine per layer, mean and deviation over batches")
    _finish(ax, names)
    return fig, ax


def _canvas_module() -> ModuleType:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'disparse-plugin[plots]'") from error
    return matplotlib


def _canvas(ax: Axes | None, columns: int, size: tuple[float, float] | None = None) -> tuple[Figure, Axes]:
    """Return the axes' figure, or a new one made without a window and without entering pyplot's list."""
    _canvas_module()
    if ax is not None:
        fig = ax.get_figure(root=True)
        if fig is None:
            raise ValueError("ax: must belong to a figure, found axes without one")
        return fig, ax
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=size or (min(16.0, 5.0 + 0.18 * columns), 5.0), layout="constrained")
    FigureCanvasAgg(fig)
    return fig, fig.add_subplot()


def _controls(overlap: TaskOverlap) -> Mapping[str, Sequence[Overlap]]:
    controls = overlap.controls
    if controls is None:
        return {}
    return {"permuted": controls.permuted, "across": controls.across, "ceiling": controls.ceiling}


def _steps(ax: Axes, values: Sequence[float], **style: Any) -> None:
    """Draw a line that is level over each bar, so that it can be read against the bar."""
    edges = np.arange(len(values) + 1) - 0.5
    ax.stairs(values, edges, baseline=None, linewidth=1.6, **style)


def _finish(ax: Axes, names: Sequence[str]) -> None:
    """Name every layer, or every n-th if there are many; put a grid behind and the legend beside."""
    every = max(1, math.ceil(len(names) / _MAX_LABELS))
    short = [name.removesuffix(".weight") for name in names]
    places = range(0, len(names), every)
    ax.set_xticks(places, [short[place] for place in places], rotation=90, fontsize=8 if len(names) <= 24 else 7)
    ax.set_xlim(-0.6, len(names) - 0.4)
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
