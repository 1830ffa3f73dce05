"""Pictures of an overlap: every function takes ``ax=None`` and returns ``(fig, ax)``.

Colours are those of Okabe and Ito, which readers with any colour vision tell apart; lines differ in style or marker
too. Names are drawn as they are: no mathematics between dollar signs, long ones cut in the middle.
Needs matplotlib, which is imported when the first picture is drawn.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from .._support.text_table import readable
from ..kinds import check_kind
from .controls import Controls
from .gradient_conflict import GradientConflict, LayerConflict
from .measures import Overlap
from .watershed import Watershed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE, VERMILION, SKY, YELLOW, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000",
)  # fmt: skip
_LINE_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
_LINE_MARKERS = "osD^vPX*"
_CONTROLS = {
    "permuted": {"color": VERMILION, "linestyle": ":", "label": "labels permuted"},
    "across": {"color": BLUE, "linestyle": "-", "label": "across halves of the data"},
    "ceiling": {"color": GREEN, "linestyle": "-.", "label": "ceiling: each task with itself, across halves"},
}
_MAX_LABELS = 40  # names along the axis; more cannot be read
_MAX_LINES = 12  # lines in one picture; more cannot be told apart
_MAX_BANDS = 3  # bands of deviation; more hide each other


class DrawnOverlap(Protocol):
    """What a picture needs of an overlap; :class:`~disparse_plugin.analysis.TaskOverlap` has it."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the shared layers."""

    @property
    def layers(self) -> tuple[Overlap, ...]:
        """The shared layers, in order."""

    @property
    def trunk(self) -> Overlap:
        """All shared layers together."""

    @property
    def controls(self) -> Controls | None:
        """The controls, if there are any."""

    def watershed(self) -> Watershed | None:
        """The watershed, if the data support one."""


_Plot = TypeVar("_Plot", bound=Callable[..., Any])

_CONTRACT = """

    Args:
        {what}
        ax: Where to draw; by default a new figure.

    Returns:
        The figure and the axes.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If it is given something else, such as the scores.
    """


def _documented(what: str) -> Callable[[_Plot], _Plot]:
    """End a docstring with what all pictures have in common, which is said once."""

    def finish(plot: _Plot) -> _Plot:
        plot.__doc__ = f"{plot.__doc__}".rstrip() + _CONTRACT.format(what=what)
        return plot

    return finish


_of_overlap = _documented("overlap: From :func:`~disparse_plugin.analysis.task_overlap`, or with controls.")


@_of_overlap
def plot_iou(overlap: DrawnOverlap, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw the paper's figure, IoU bars per layer, with what chance gives and the controls.

    With controls and three or more tasks it is the IoU over all pairs, since the controls are about pairs; otherwise
    that of all tasks together.
    """
    _check_overlap(overlap)
    fig, ax = _canvas(ax, len(overlap.layers))
    pairs = overlap.controls is not None and len(overlap.tasks) > 2
    trunk, *layers = [layer.pairwise() if pairs else layer for layer in (overlap.trunk, *overlap.layers)]
    _bars(ax, [layer.iou for layer in layers])
    _steps(ax, [layer.chance_iou for layer in layers], color=BLACK, linestyle="--", label="chance at these densities")
    for name, controls in _controls(overlap).items():
        _steps(ax, [(control.pairwise() if pairs else control).iou for control in controls], **_CONTROLS[name])
    title = f"Trunk: IoU {100 * trunk.iou:.1f} %, by chance {100 * trunk.chance_iou:.1f} %"
    _close(ax, overlap.names, title, "IoU, pairs of tasks" if pairs else "IoU", limits=(0, 1.02))
    return fig, ax


@_of_overlap
def plot_agreement(overlap: DrawnOverlap, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw agreement beyond chance (kappa) per layer, with the controls and the watershed where there is one."""
    _check_overlap(overlap)
    fig, ax = _canvas(ax, len(overlap.layers))
    _bars(ax, [layer.kappa for layer in overlap.layers])
    ax.axhline(0, color=BLACK, linestyle="--", label="chance")
    for name, controls in _controls(overlap).items():
        _steps(ax, [layer.kappa for layer in controls], **_CONTROLS[name])
    watershed = overlap.watershed()
    if watershed is not None:
        label = f"watershed after {_label(watershed.layer)}"
        ax.axvline(overlap.names.index(watershed.layer) + 0.5, color=PURPLE, linewidth=2, label=label)
    found = "no watershed" if watershed is None else "watershed found"
    title = f"Trunk: kappa {overlap.trunk.kappa:.3f}; {found}"
    limits = (min(-0.02, ax.get_ylim()[0]), 1.02)
    _close(ax, overlap.names, title, "agreement beyond chance (kappa)", limits=limits)
    return fig, ax


@_of_overlap
def plot_matrix(overlap: DrawnOverlap, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw kappa between every two tasks over all shared layers.

    With controls, it is kappa across halves of the data, with each task's agreement with itself on the diagonal.
    """
    _check_overlap(overlap)
    count = len(overlap.tasks)
    fig, ax = _canvas(ax, count, size=(2.8 + 0.85 * count, 2.2 + 0.75 * count))
    table = _kappas(overlap)
    image = ax.imshow(table, vmin=float(np.min(table, initial=0.0, where=~np.isnan(table))), vmax=1, cmap="cividis")
    for row, values in enumerate(table.tolist()):
        for column, value in enumerate(values):
            if not math.isnan(value):
                shade = BLACK if value > 0.6 else "#FFFFFF"
                ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=shade)
    labels = [_label(task) for task in overlap.tasks]
    ax.set_xticks(range(count), labels, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(count), labels)
    note = "" if overlap.controls is None else "\nacross halves of the data; diagonal: with itself"
    ax.set_title(f"Trunk: kappa between tasks{note}")
    fig.colorbar(image, ax=ax, shrink=0.85, label="kappa")
    return fig, ax


@_of_overlap
def plot_kept_by(overlap: DrawnOverlap, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw, per layer, how the weights that any task keeps divide into those kept by 1, 2, ... T tasks."""
    _check_overlap(overlap)
    layers, count = overlap.layers, len(overlap.tasks)
    fig, ax = _canvas(ax, len(layers))
    colours = _matplotlib().colormaps["cividis_r"]
    kept = np.array([layer.kept_by + (0,) * (count + 1 - len(layer.kept_by)) for layer in layers], dtype=float)[:, 1:]
    shares = kept / np.maximum(kept.sum(axis=1, keepdims=True), 1)
    bottom = np.zeros(len(layers))
    for k in range(count):
        label = f"{k + 1} task" + ("s" if k else "")
        _bars(ax, shares[:, k], bottom=bottom, color=colours(0.15 + 0.85 * k / max(count - 1, 1)), label=label)
        bottom += shares[:, k]
    for place in np.flatnonzero(kept.sum(axis=1) == 0):
        ax.text(float(place), 0.02, "empty", rotation=90, ha="center", va="bottom", fontsize=7)
    title = "Kept by exactly k tasks"
    _close(ax, overlap.names, title, "share of the weights kept by any task", limits=(0, 1))
    return fig, ax


@_of_overlap
def plot_density(overlap: DrawnOverlap, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw, per layer, the share of the weights that each task keeps, on a logarithmic scale."""
    _check_overlap(overlap)
    fig, ax = _canvas(ax, len(overlap.layers))
    for number, task in enumerate(overlap.tasks):
        values = [layer.density.get(task, math.nan) or math.nan for layer in overlap.layers]  # zero has no logarithm
        size = 4 if len(values) <= _MAX_LABELS else 1.5
        ax.plot(range(len(values)), values, markersize=size, **_line(number), label=_label(task))
    ax.set_yscale("log")
    title = "Density per layer and task (missing: nothing kept)"
    _close(ax, overlap.names, title, "density of each task's own mask")
    return fig, ax


@_documented("conflict: What ``score_tasks(..., observe=conflict)`` collected.")
def plot_conflict(conflict: GradientConflict, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw the cosine between the tasks' gradients per layer, one line per pair, with its scatter over the batches.

    Of many pairs, the twelve with the lowest mean cosine are drawn.
    """
    if not isinstance(conflict, GradientConflict):
        raise TypeError(
            f"conflict: must be a GradientConflict, found {type(conflict).__name__}; see plot_iou for masks"
        )
    layers = conflict.layers()
    if not layers:
        raise ValueError(
            "conflict: must have seen tasks that share a layer, found nothing; pass it to score_tasks(..., observe=it)"
        )
    names = tuple(dict.fromkeys(found.name for found in layers))
    fig, ax = _canvas(ax, len(names))
    by_pair: dict[tuple[str, str], list[LayerConflict]] = {}
    for found in layers:
        by_pair.setdefault(found.tasks, []).append(found)
    lowest = sorted(by_pair, key=lambda pair: _mean_cosine(by_pair[pair]))[:_MAX_LINES]
    for number, pair in enumerate(pair for pair in by_pair if pair in lowest):
        places = [names.index(found.name) for found in by_pair[pair]]
        means, scatter = (np.array([getattr(f, what) for f in by_pair[pair]]) for what in ("cosine", "cosine_std"))
        style = _line(number)
        ax.plot(places, means, markersize=3.5, **style, label=" & ".join(map(_label, pair)))
        if number < _MAX_BANDS:
            ax.fill_between(places, means - scatter, means + scatter, color=style["color"], alpha=0.15, linewidth=0)
    ax.axhline(0, color=BLACK, linewidth=0.8)
    some = f"; {len(lowest)} of {len(by_pair)} pairs, the lowest" if len(lowest) < len(by_pair) else ""
    title = f"Gradient cosine per layer, mean and deviation over batches{some}"
    _close(ax, names, title, "cosine between gradients")
    return fig, ax


def _mean_cosine(found: Sequence[LayerConflict]) -> float:
    """Return the mean of what is defined; infinite where nothing is."""
    known = [layer.cosine for layer in found if not math.isnan(layer.cosine)]
    return statistics.fmean(known) if known else math.inf


def _check_overlap(overlap: object) -> None:
    if not all(hasattr(overlap, name) for name in ("layers", "trunk", "controls", "watershed")):
        raise TypeError(
            f"overlap: must be a TaskOverlap, found {type(overlap).__name__}; task_overlap(scores, amount) makes one"
        )


def _matplotlib() -> ModuleType:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'disparse-plugin[plots]'") from error
    return matplotlib


def _canvas(ax: Axes | None, columns: int, size: tuple[float, float] | None = None) -> tuple[Figure, Axes]:
    """Return the axes' figure, or a new one made without a window and without entering pyplot's list."""
    _matplotlib()
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    if ax is not None:
        check_kind("ax", ax, Axes, "axes of matplotlib")
        fig = ax.figure
        while fig is not None and not isinstance(fig, Figure):  # a sub-figure
            fig = fig.figure
        if fig is None:
            raise ValueError("ax: must belong to a figure, found axes without one")
        return fig, ax
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    fig = Figure(figsize=size or (min(16.0, 5.0 + 0.18 * columns), 5.0), layout="constrained")
    FigureCanvasAgg(fig)
    return fig, fig.add_subplot()


def _kappas(overlap: DrawnOverlap) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return kappa between every two tasks, NaN where there is none."""
    table = np.full((len(overlap.tasks), len(overlap.tasks)), np.nan)
    trunk = overlap.trunk if overlap.controls is None else overlap.controls.across_trunk
    for a, b in overlap.trunk.pairs:
        row, column = overlap.tasks.index(a), overlap.tasks.index(b)
        table[row, column] = table[column, row] = trunk.pair(a, b).kappa
    if overlap.controls is not None:
        for place, task in enumerate(overlap.tasks):
            table[place, place] = overlap.controls.ceiling_of(task).kappa
    return table


def _controls(overlap: DrawnOverlap) -> Mapping[str, Sequence[Overlap]]:
    controls = overlap.controls
    if controls is None:
        return {}
    return {"permuted": controls.permuted, "across": controls.across, "ceiling": controls.ceiling}


def _label(name: str) -> str:
    """Return a name as matplotlib shows it unchanged: no mathematics, and in the legend whatever it begins with."""
    plain = readable(name, 40).replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain


def _line(number: int) -> dict[str, Any]:
    """Return the style of the line of that number; all lines of one picture differ."""
    colour = _LINE_COLOURS[number % len(_LINE_COLOURS)]
    return {"color": colour, "marker": _LINE_MARKERS[number % len(_LINE_MARKERS)], "linewidth": 1}


def _bars(ax: Axes, values: Sequence[float], **style: Any) -> None:
    """Draw one bar per layer, without gaps where there are many."""
    width = 0.85 if len(values) <= _MAX_LABELS else 1.0
    ax.bar(range(len(values)), values, width=width, **({"color": SKY, "label": "observed"} | style))


def _steps(ax: Axes, values: Sequence[float], **style: Any) -> None:
    """Draw a line that is level over each bar, so that it can be read against the bar."""
    edges = np.arange(len(values) + 1) - 0.5
    ax.stairs(values, edges, baseline=None, linewidth=1.6, **style)


def _close(
    ax: Axes, names: Sequence[str], title: str, measure: str, *, limits: tuple[float, float] | None = None
) -> None:
    """Name every layer, or every n-th if there are many; add limits, grid, title and the legend beside."""
    every = max(1, math.ceil(len(names) / _MAX_LABELS))
    places = range(0, len(names), every)
    labels = [_label(names[place].removesuffix(".weight")) for place in places]
    ax.set_xticks(places, labels, rotation=90, fontsize=8 if len(names) <= 24 else 7)
    ax.set_xlim(-0.6, len(names) - 0.4)
    if limits is not None:
        ax.set_ylim(*limits)
    ax.set_ylabel(measure)
    ax.set_title(title)
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
