"""The picture at the top of the README: what becomes of the task that lost most, in every setting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .names import title
from .results import Result

AMOUNT = 0.9
THEMES = {"light": ("#ffffff", "#1f2328", "#d0d7de"), "dark": ("#0d1117", "#e6edf3", "#3d444d")}  # paper, ink, lines


class Mark(NamedTuple):
    """A method, and how it is drawn."""

    method: str
    label: str
    color: str  # of Okabe and Ito, which the colour-blind can tell apart; the shapes differ as well
    shape: str
    shift: float  # of the row, so that marks at one place can be told apart


BASELINES = (
    Mark("LAMP", "LAMP", "#E69F00", "D", -0.24),
    Mark("magnitude", "global magnitude", "#CC79A7", "v", 0.24),
)
PANELS = {
    "Trained, then pruned by |w·g|": (
        Mark("Taylor, joint", "scores of the summed loss", "#D55E00", "s", 0.0),
        Mark("DiSparse Taylor", "scores per task (DiSparse)", "#0072B2", "o", 0.0),
    ),
    "Pruned at the start by |w·g|": (
        Mark("SNIP", "scores of the summed loss", "#D55E00", "s", 0.0),
        Mark("DiSparse static", "scores per task (DiSparse)", "#0072B2", "o", 0.0),
    ),
}


def draw(results: Sequence[Result], path: Path, theme: str) -> None:
    """Draw one row per setting: summed loss and per task joined by a line, the baselines beside them."""
    paper, ink, lines = THEMES[theme]
    colours = {
        "text.color": ink,
        "axes.edgecolor": lines,
        "axes.labelcolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
    }
    ordered = sorted(results, key=lambda result: -_gain(result))
    with mpl.rc_context({"font.size": 11, **colours}):
        figure, panels = plt.subplots(
            1, len(PANELS), sharey=True, figsize=(10, 1.7 + 0.42 * len(ordered)), layout="constrained", facecolor=paper
        )
        for axes, (heading, pair) in zip(panels, PANELS.items(), strict=True):
            axes.set_facecolor(paper)
            for row, result in enumerate(ordered):
                _row(axes, result, row, pair, lines)
            axes.axvline(0, color=ink, linewidth=0.8)
            axes.set_title(heading, fontsize=11.5)
            axes.set_xlabel("change to the dense network, %")
            axes.grid(axis="x", color=lines, linewidth=0.5, alpha=0.6)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(length=0)
        panels[0].set_yticks(range(len(ordered)), [title(result.name) for result in ordered])
        panels[0].invert_yaxis()
        handles = [_handle(mark) for mark in (*next(iter(PANELS.values())), *BASELINES)]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, handletextpad=0.3)
        figure.suptitle("The task that lost most, with 90 % of the weights pruned", fontsize=13, fontweight="bold")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)
        plt.close(figure)


def _gain(result: Result) -> float:
    """How much per-task scores help, over both panels: what the rows are ordered by."""
    gains = [result.summary.paired(own.method, summed.method, AMOUNT, "worst") for summed, own in PANELS.values()]
    return sum(gain.mean for gain in gains if gain is not None)


def _row(axes: Axes, result: Result, row: int, pair: Sequence[Mark], lines: str) -> None:
    found = result.summary.intervals(AMOUNT, "worst")
    ends = [found[mark.method].mean for mark in pair if mark.method in found]
    axes.plot(ends, [row] * len(ends), color=lines, linewidth=4, solid_capstyle="round", zorder=1)
    for mark in (*BASELINES, *pair):
        if mark.method in found:
            interval, place = found[mark.method], row + mark.shift
            axes.plot(
                [interval.mean - interval.half, interval.mean + interval.half], [place] * 2, color=mark.color, lw=1
            )
            axes.plot(interval.mean, place, mark.shape, color=mark.color, markersize=8 if mark in pair else 5, zorder=3)


def _handle(mark: Mark) -> plt.Line2D:
    size = 5 if mark in BASELINES else 8
    return plt.Line2D([], [], linestyle="", marker=mark.shape, color=mark.color, markersize=size, label=mark.label)
