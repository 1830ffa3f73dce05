"""Plots of metrics against sparsity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .summary import Summary
from .tables import percent

# Colours of Okabe and Ito, which the colour-blind can tell apart; a method and its twin share one.
STYLES = {
    "random": ("#999999", "x--"),
    "magnitude": ("#D55E00", "v--"),
    "LAMP": ("#E69F00", "D--"),
    "Taylor, joint": ("#56B4E9", "s:"),
    "DiSparse Taylor": ("#56B4E9", "s-"),
    "adaptive Taylor, joint": ("#0072B2", "o:"),
    "DiSparse adaptive": ("#0072B2", "o-"),
    "SNIP": ("#009E73", "^:"),
    "DiSparse static": ("#009E73", "^-"),
    "RigL": ("#CC79A7", "p:"),
    "DiSparse dynamic": ("#CC79A7", "p-"),
    "LTH": ("#000000", "d--"),
}
MOST_TASKS = 5


def draw(summary: Summary, path: Path) -> None:
    """One panel per task with its first metric; with many tasks, Delta_m and the worst task's change."""
    panels: Sequence[str] = [task.name for task in summary.tasks]
    if len(panels) > MOST_TASKS:
        panels = ["mean", "worst"]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 4), squeeze=False)
    for panel, ax in zip(panels, axes[0], strict=True):
        for method in summary.methods:
            if method.name in STYLES:
                color, style = STYLES[method.name]
                values = [_value(summary, method.name, amount, panel) for amount in summary.amounts]
                ax.plot(range(len(values)), values, style, color=color, label=method.name, markersize=4, linewidth=1)
        _finish(ax, summary, panel)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=6, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _value(summary: Summary, method: str, amount: float, panel: str) -> float:
    found = summary.changes(method, amount)
    if not found:
        return float("nan")
    if panel in ("mean", "worst"):
        return mean(getattr(change, panel) for change in found.values())
    return mean(_metric(summary, panel, summary.runs[method, amount, seed].test) for seed in found)


def _metric(summary: Summary, task: str, measured: dict[str, dict[str, float]]) -> float:
    return measured[task][_first_metric(summary, task)]


def _first_metric(summary: Summary, task: str) -> str:
    return next(iter(next(each for each in summary.tasks if each.name == task).better))


def _finish(ax: Axes, summary: Summary, panel: str) -> None:
    ax.set_xticks(range(len(summary.amounts)), [percent(amount) for amount in summary.amounts])
    ax.set_xlabel("weights pruned")
    if panel in ("mean", "worst"):
        ax.set_title("mean over the tasks" if panel == "mean" else "task that lost most")
        ax.set_ylabel("change to dense in %")
    else:
        ax.axhline(
            mean(_metric(summary, panel, run.test) for run in summary.dense.values()), color="black", linewidth=0.8
        )
        ax.set_title(panel)
        ax.set_ylabel(_first_metric(summary, panel))
    ax.grid(alpha=0.3)
