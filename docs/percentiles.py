"""Draw the picture of ``method.md``: the same weights cut by a summed loss, and by the percentiles of two tasks.

    python docs/percentiles.py

The scores are made up: log-normal and weakly related, with one loss 20 times the scale of the other. The cuts are the
package's own.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor, nn

from disparse_plugin import TaskScores

AMOUNT = 0.6
SHARED, PRIVATE = 400, 60
PICTURE = Path(__file__).parent / "images" / "percentiles.png"
COLOURS = {"gone": "#c9c9c9", "a": "#d1495b", "b": "#00798c", "both": "#3a3a3a", "neither": "#edae49"}
MEANING = {
    "gone": "removed",
    "a": "kept, high for A",
    "b": "kept, high for B",
    "both": "kept, high for both",
    "neither": "kept, low for both",
}
STRIP = -0.07


def made_up_scores() -> tuple[TaskScores, Tensor, Tensor]:
    """Return scores of a trunk and two heads, and the raw scores of the trunk for both tasks."""
    generator = torch.Generator().manual_seed(3)
    common, own_a, own_b = torch.randn(3, SHARED, generator=generator, dtype=torch.float64)
    a, b = 20 * (0.4 * common + own_a).exp(), (0.4 * common + own_b).exp()
    trunk, head_a, head_b = nn.Linear(SHARED, 1), nn.Linear(PRIVATE, 1), nn.Linear(PRIVATE, 1)
    private_a, private_b = torch.randn(2, PRIVATE, generator=generator, dtype=torch.float64).exp()
    tables = {
        "A": {(trunk, "weight"): a[None], (head_a, "weight"): 20 * private_a[None]},
        "B": {(trunk, "weight"): b[None], (head_b, "weight"): private_b[None]},
    }
    return TaskScores(nn.ModuleList([trunk, head_a, head_b]), tables), a, b


def percentiles(scores: TaskScores, task: str) -> list[Tensor]:
    """Return a task's percentile of every weight it uses, per parameter."""
    flat = [scores[task][key].flatten() for key in scores.parameters if key in scores[task]]
    joined = torch.cat(flat)
    ranks = joined.argsort().argsort().double() + 1
    return list((ranks / joined.numel()).split([part.numel() for part in flat]))


def colours(kept: Tensor, by_a: Tensor, by_b: Tensor) -> np.ndarray:
    """Colour the removed grey, and the kept by the tasks that want them."""
    names = np.select([by_a & by_b, by_a, by_b], ["both", "a", "b"], "neither")
    return np.array([COLOURS[name] for name in np.where(kept, names, "gone")])


def draw_joint(ax: Axes, a: Tensor, b: Tensor, wanted: tuple[Tensor, Tensor]) -> None:
    """Draw the raw scores and the cut of their sum."""
    total = a + b
    cut = float(total.sort().values[round(AMOUNT * SHARED) - 1])
    ax.scatter(a, b, s=9, c=colours(total > cut, *wanted), linewidths=0)
    line = np.geomspace(1e-6, 1, 500) * cut
    ax.plot(line, cut - line, color="black", linewidth=1)
    ax.set(xscale="log", yscale="log", xlabel="score for task A (large loss)", ylabel="score for task B")
    ax.set(xlim=(0.5, 900), ylim=(0.02, 40))
    ax.set_title("Summed loss: the large one decides", fontsize=10)


def draw_percentiles(ax: Axes, scores: TaskScores) -> None:
    """Draw the percentiles, and the square that the unanimous rule removes."""
    trunk_a, head_a = percentiles(scores, "A")
    trunk_b, head_b = percentiles(scores, "B")
    keep = [mask.flatten() for mask in scores.masks(AMOUNT).values()]
    cut = max(float(values[~mask].max()) for values, mask in zip((trunk_a, head_a, head_b), keep, strict=True))
    ax.add_patch(plt.Rectangle((0, 0), cut, cut, facecolor="#f1f1f1", edgecolor="black", linewidth=1))
    ax.scatter(trunk_a, trunk_b, s=9, c=colours(keep[0], trunk_a > cut, trunk_b > cut), linewidths=0, zorder=2)
    ax.scatter(head_a, torch.full_like(head_a, STRIP), s=9, c=np.where(keep[1], COLOURS["a"], COLOURS["gone"]))
    ax.scatter(torch.full_like(head_b, STRIP), head_b, s=9, c=np.where(keep[2], COLOURS["b"], COLOURS["gone"]))
    for line in (ax.axhline, ax.axvline):
        line(STRIP / 2, color="#c9c9c9", linewidth=0.6)
    ax.text(0.5, STRIP - 0.03, "head A", ha="center", va="top", fontsize=8)
    ax.text(STRIP - 0.03, 0.5, "head B", ha="right", va="center", fontsize=8, rotation=90)
    ax.set(xlim=(-0.14, 1.02), ylim=(-0.14, 1.02), xticks=[0, cut, 1], yticks=[0, cut, 1], aspect="equal")
    ax.set_xticklabels(["0", "c", "1"])
    ax.set_yticklabels(["0", "c", "1"])
    ax.set(xlabel="percentile for task A", ylabel="percentile for task B")
    ax.set_title("DiSparse: removed if low for all", fontsize=10)


def main() -> None:
    """Draw both pictures side by side."""
    mpl.rcParams["font.size"] = 9
    scores, a, b = made_up_scores()
    # What each task wants is the same in both panels: its percentile is above the common cut.
    shared_keep = scores.masks(AMOUNT)[scores.parameters[0]].flatten()
    trunk_a, trunk_b = percentiles(scores, "A")[0], percentiles(scores, "B")[0]
    cut = float(torch.maximum(trunk_a, trunk_b)[~shared_keep].max())
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 4.2), layout="constrained")
    draw_joint(left, a, b, (trunk_a > cut, trunk_b > cut))
    draw_percentiles(right, scores)
    handles = [
        plt.Line2D([], [], marker="o", linestyle="", color=COLOURS[key], markersize=4, label=label)
        for key, label in MEANING.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.savefig(PICTURE, dpi=130)


if __name__ == "__main__":
    main()
