"""The picture at the top of the README: what becomes of trained networks in every setting, rules beside simple ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ..problem.relative import Interval
from .names import title
from .results import Result
from .tables import percent

AMOUNT = 0.98
LEAST = 3  # seeds that an interval is drawn of: that of two is as wide as the picture
THEMES = {"light": ("#ffffff", "#1f2328", "#d0d7de"), "dark": ("#0d1117", "#e6edf3", "#3d444d")}  # paper, ink, lines
LOWEST = -75  # %: what lost more is drawn at the edge, with its number
PANELS = {"Mean over the tasks": "mean", "Task that lost most": "worst"}


class Mark(NamedTuple):
    """A method, and how it is drawn."""

    method: str
    label: str
    color: str  # of Okabe and Ito, which the colour-blind can tell apart; the shapes differ as well
    shape: str
    size: int


SIMPLE = (
    Mark("magnitude", "global magnitude", "#CC79A7", "v", 6),
    Mark("LAMP", "LAMP", "#E69F00", "D", 5),
    Mark("adaptive Taylor, joint", "layer-adaptive |w·g|, summed loss", "#D55E00", "s", 6),
    Mark("LAMP with reach", "LAMP with reach", "#009E73", "^", 6),
)


def marks(default: str, stages: str) -> tuple[Mark, ...]:
    """Return what is drawn, the default last but for its stages."""
    others = tuple(mark for mark in SIMPLE if mark.method != default)
    once, staged = "default: one cut", "default: in stages"
    return (*others, Mark(default, once, "#0072B2", "o", 8), Mark(stages, staged, "#56B4E9", "*", 13))


def draw_all(results: Sequence[Result], staged: Sequence[Result], folder: Path, default: str, stages: str) -> None:
    """Draw the picture in light and dark, for a screen and, with one panel above the other, for a telephone.

    Args:
        results: All settings.
        staged: Those in which the default was run in stages, maybe with other seeds.
        folder: Where the pictures go.
        default: The method of this package.
        stages: The same in stages.
    """
    by_name = {result.name: result for result in staged}
    rows = [
        (result, by_name.get(result.name, result)) for result in results if result.summary.intervals(AMOUNT, "mean")
    ]
    for theme in THEMES:
        draw(rows, folder / f"hero-{theme}.png", theme, marks(default, stages))
        draw(rows, folder / f"hero-narrow-{theme}.png", theme, marks(default, stages), narrow=True)


def draw(
    rows: Sequence[tuple[Result, Result]], path: Path, theme: str, shown: Sequence[Mark], *, narrow: bool = False
) -> None:
    """Draw one row per setting and one panel per view; with seeds enough, every method with its 95 % interval.

    Args:
        rows: For each setting, what it is drawn from, and what the last mark is drawn from.
        path: The picture.
        theme: One of ``THEMES``.
        shown: What is drawn.
        narrow: One panel above the other.
    """
    paper, ink, lines = THEMES[theme]
    colours = {
        "text.color": ink,
        "axes.edgecolor": lines,
        "axes.labelcolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
    }
    with mpl.rc_context({"font.size": 11, **colours}):
        shape, height = ((len(PANELS), 1), 0.92) if narrow else ((1, len(PANELS)), 0.66)
        size = (5.4 if narrow else 10, 1.8 + height * len(rows))
        figure, panels = plt.subplots(*shape, sharey=True, figsize=size, layout="constrained", facecolor=paper)
        for axes, (heading, what) in zip(panels, PANELS.items(), strict=True):
            axes.set_facecolor(paper)
            for row, (result, staged) in enumerate(rows):
                last = staged.summary.intervals(AMOUNT, what)
                found = {**result.summary.intervals(AMOUNT, what), shown[-1].method: last.get(shown[-1].method)}
                _row(axes, found, row, shown)
            axes.axvline(0, color=ink, linewidth=0.8)
            axes.set_title(heading, fontsize=11.5)
            if not narrow or axes is panels[-1]:
                axes.set_xlabel("change to the dense network, %")
            axes.grid(axis="x", color=lines, linewidth=0.5, alpha=0.6)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(length=0)
        panels[0].set_yticks(range(len(rows)), [_label(result, narrow=narrow) for result, _ in rows])
        panels[0].invert_yaxis()
        handles = [
            Line2D([], [], linestyle="", marker=m.shape, color=m.color, markersize=m.size, label=m.label) for m in shown
        ]
        ncols, what = (2, "") if narrow else (3, " of the weights")
        figure.legend(
            handles=handles[::-1], loc="outside upper center", ncols=ncols, frameon=False, handletextpad=0.3,
            fontsize=9 if narrow else None,
            title=f"{percent(AMOUNT)}{what} pruned, in equally many steps",
            title_fontproperties={"size": 13, "weight": "bold"},
        )  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)
        plt.close(figure)


def _label(result: Result, *, narrow: bool) -> str:
    few, name = len(result.summary.seeds) < LEAST, title(result.name)
    return (name.replace(", ", ",\n") if narrow else name) + (f"\n({len(result.summary.seeds)} seeds)" if few else "")


def _row(axes: Axes, found: Mapping[str, Interval | None], row: int, shown: Sequence[Mark]) -> None:
    for place, mark in enumerate(shown):
        if (interval := found.get(mark.method)) is not None:
            height = row + 0.66 * (place / (len(shown) - 1) - 0.5)
            half = interval.half if interval.count >= LEAST else 0.0
            if interval.mean < LOWEST:
                axes.plot(LOWEST, height, "<", color=mark.color, markersize=mark.size, zorder=3)
                axes.annotate(
                    f"{interval.mean:.0f}", (LOWEST, height), (7, 0), textcoords="offset points",
                    color=mark.color, fontsize=9, va="center",
                )  # fmt: skip
                continue
            axes.plot([max(LOWEST, interval.mean - half), interval.mean + half], [height] * 2, color=mark.color, lw=1)
            axes.plot(interval.mean, height, mark.shape, color=mark.color, markersize=mark.size, zorder=3)
