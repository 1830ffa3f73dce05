"""
Is there a watershed?
=====================

The paper's "watershed" figure with its controls: do the masks say that tasks part ways at some layer?

The procedure of the paper (Sun et al., CVPR 2022, section 4.5): score the untrained network with SNIP in training
mode, Xavier weights, let every task keep the share rho = 0.078 of what it uses, and draw ``|all| / |any|`` of the masks
for the 33 convolutions of the trunk (shortcuts left out). The network has the paper's shape; by default it is narrower.
What the paper did not draw is drawn too: what chance gives at the same densities, permuted labels, and how much each
task agrees with itself on other pictures.

Without ``--data`` the pictures are photographs that ship inside the scikit-image and scikit-learn wheels, with labels
computed from the pictures themselves (pseudo-labels: brightness classes, slopes of the brightness, edges, corners).
With ``--data`` they come from a .npz file that holds rgb (n, h, w, 3), seg (n, h, w) and any of normal (n, h, w, 3),
depth, edge, kp (n, h, w). The published numbers printed next to ours are of other pictures and of a wider network: the
procedure is compared, not the numbers.

    python examples/watershed.py [--data rooms64_train.npz] [--report watershed.html]

The figure is saved as ``watershed.png``, IoU above and agreement beyond chance below.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from skimage import color, data, feature, filters
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch.nn import functional as F

from disparse_plugin import score_tasks
from disparse_plugin.analysis import (
    GradientConflict,
    TaskOverlap,
    html_report,
    overlap_with_controls,
    plot_agreement,
    plot_iou,
)

# The network of the paper is shared with the benchmarks, which are no package either.
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from models.paper_network import DenseBatch, PaperNetwork, task_losses

PAPER_RHO = 0.078
# IoU of the whole trunk in the paper's figure, in percent, and the tasks that it is about.
PUBLISHED = {
    "NYU-v2": (54.61, ("segmentation", "normals")),
    "Cityscapes": (73.52, ("segmentation", "depth")),
    "Tiny-Taskonomy": (60.77, ("segmentation", "normals", "depth", "keypoints", "edges")),
}
OUTPUT_STRIDE = 8
Arrays = dict[str, NDArray[np.float32]]


def photographs(count: int, size: int) -> Arrays:
    """Cut random crops from a few photographs, and compute labels from them."""
    pictures = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.immunohistochemistry()]
    pictures += [load_sample_image("china.jpg"), load_sample_image("flower.jpg")]
    generator = np.random.default_rng(0)
    crops = []
    for number in range(count):
        picture = pictures[number % len(pictures)]
        top, left = (int(generator.integers(side - 2 * size)) for side in picture.shape[:2])
        crops.append(picture[top : top + 2 * size : 2, left : left + 2 * size : 2])
    rgb = np.stack(crops).astype(np.float32)
    grey = np.stack([filters.gaussian(color.rgb2gray(crop / 255), 1) for crop in rgb])
    slopes = np.stack([*np.gradient(grey, axis=(1, 2)), np.full_like(grey, 0.05)], axis=-1)
    return {
        "rgb": rgb,
        "seg": np.digitize(grey, np.quantile(grey, np.linspace(0, 1, 9)[1:-1])).astype(np.float32),
        "normal": (slopes / np.linalg.norm(slopes, axis=-1, keepdims=True)).astype(np.float32),
        "edge": np.stack([feature.canny(crop) for crop in grey]).astype(np.float32),
        "kp": np.stack([feature.corner_shi_tomasi(crop) for crop in grey]).astype(np.float32),
    }


def load(path: Path, count: int) -> Arrays:
    """Read the first pictures of a file, mixed so that neighbours in the file come apart."""
    with np.load(path) as arrays:
        if missing := {"rgb", "seg"} - set(arrays):
            raise SystemExit(f"--data: must hold rgb and seg, found no {' and no '.join(sorted(missing))} in {path}")
        order = np.random.default_rng(0).permutation(len(arrays["rgb"]))[:count]
        wanted = ("rgb", "seg", "normal", "depth", "edge", "kp")
        return {name: arrays[name][order].astype(np.float32) for name in wanted if name in arrays}


def targets_on_grid(arrays: Arrays) -> dict[str, Tensor]:
    """Bring the labels to the network's output grid: means, for classes the middle pixel."""
    maps = {name: torch.from_numpy(array) for name, array in arrays.items() if name != "rgb"}
    middle = OUTPUT_STRIDE // 2
    targets = {"segmentation": maps["seg"][:, middle::OUTPUT_STRIDE, middle::OUTPUT_STRIDE].long()}
    if "normal" in maps:
        targets["normals"] = F.avg_pool2d(maps["normal"].permute(0, 3, 1, 2), OUTPUT_STRIDE)
    for name, task in {"depth": "depth", "kp": "keypoints", "edge": "edges"}.items():
        if name in maps:
            pooled = F.avg_pool2d(maps[name][:, None], OUTPUT_STRIDE)
            targets[task] = pooled / pooled.std().clamp_min(1e-6)
    return targets


def batches(arrays: Arrays, size: int) -> Iterator[DenseBatch]:
    """Yield normalised pictures with their targets, ``size`` at a time."""
    images = torch.from_numpy(arrays["rgb"]).permute(0, 3, 1, 2) / 255
    images = (images - images.mean((0, 2, 3), keepdim=True)) / images.std((0, 2, 3), keepdim=True)
    targets = targets_on_grid(arrays)
    for start in range(0, len(images) - size + 1, size):
        part = slice(start, start + size)
        yield images[part], {task: target[part] for task, target in targets.items()}


def build(channels: dict[str, int], width: int) -> nn.Module:
    """Make the network with Xavier weights and in training mode, as the paper's scores are taken."""
    network = PaperNetwork(channels, width=width, hidden=16 * width)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_normal_(module.weight)
    return network.train()


def print_totals(overlap: TaskOverlap) -> None:
    """Print the trunk's IoU beside the published one, for the task sets of the paper that the data have."""
    columns = ("published", "here", "chance", "permuted", "across", "ceiling")
    print(f"\n{'IoU of the trunk, %':44}" + "".join(f"{column:>11}" for column in columns))
    for name, (published, tasks) in PUBLISHED.items():
        label = f"{name} ({' + '.join(tasks) if len(tasks) == 2 else 'five tasks'})"
        if missing := sorted(set(tasks) - set(overlap.tasks)):
            print(f"{label:44}{published:11.2f}   these data have no {', '.join(missing)}")
            continue
        observed, permuted = overlap.trunk, overlap.controls.permuted_trunk
        values = [observed.iou, observed.chance_iou, permuted.iou]
        if len(tasks) == 2:
            observed, permuted = observed.pair(*tasks), permuted.pair(*tasks)
            ceiling = np.mean([overlap.controls.ceiling_of(task).iou for task in tasks])
            across = overlap.controls.across_trunk.pair(*tasks).iou
            values = [observed.iou, observed.chance_iou, permuted.iou, across, ceiling]
        print(f"{label:44}{published:11.2f}" + "".join(f"{100 * value:11.2f}" for value in values))
        if len(tasks) > 2:
            two_of_few = observed.kept_by[2] / (observed.kept_by[1] + observed.kept_by[2])
            print(f"{'  as the authors counted it (*)':44}{'':11}{100 * two_of_few:11.2f}")
    print("across: the two tasks on different halves of the pictures; ceiling: each with itself, on both halves")
    print("(*) kept by exactly 2 tasks over kept by exactly 1 or 2, whatever the number of tasks")


def draw(overlap: TaskOverlap, path: Path) -> None:
    """Save the paper's figure, and below it the one that corrects for chance."""
    figure = Figure(figsize=(12, 9), layout="constrained")
    above, below = figure.subplots(2)
    plot_iou(overlap, above)
    plot_agreement(overlap, below)
    figure.savefig(path, dpi=110)
    print(f"picture in {path}")


def command_line() -> argparse.ArgumentParser:
    """List the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help=".npz file with pictures and labels (default: photographs in wheels)")
    parser.add_argument("--report", type=Path, help="write an HTML report here")
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage; the paper's is 64")
    parser.add_argument("--batches", type=int, default=16, help="the paper used 50, for Tiny-Taskonomy 200")
    parser.add_argument("--batch-size", type=int, default=16, help="the paper's is 16")
    parser.add_argument("--rho", type=float, default=PAPER_RHO, help="share of the weights that each task keeps")
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu (default), cuda, ...")
    parser.add_argument("--seed", type=int, default=0, help="of weights, permutations and resamples (default: 0)")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for watershed.png (default: this one)")
    parser.add_argument("--quick", action="store_true", help="a few small batches, to see that it runs")
    return parser


def main() -> None:
    """Score, compare, print."""
    parser = command_line()
    options = parser.parse_args()
    for name in ("width", "batches", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: must be at least 1, found {getattr(options, name)}")
    if options.quick:
        options.batches, options.batch_size = 4, 4
    options.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(options.seed)
    start, count = time.perf_counter(), options.batches * options.batch_size
    arrays = photographs(count, 64) if options.data is None else load(options.data, count)
    calibration = [
        (images.to(options.device), {task: target.to(options.device) for task, target in targets.items()})
        for images, targets in batches(arrays, options.batch_size)
    ]
    if len(calibration) < 2:
        parser.error(
            f"--batch-size: must leave two batches or more, one for each half, found {len(arrays['rgb'])} pictures in "
            f"batches of {options.batch_size}; lower it, or raise --batches"
        )
    targets = calibration[0][1]
    channels = {
        task: target.shape[1] if target.dim() == 4 else int(arrays["seg"].max()) + 1 for task, target in targets.items()
    }
    source = "photographs in wheels, pseudo-labels" if options.data is None else options.data.name
    print(f"{source}: {len(calibration)} batches of {options.batch_size}, tasks {', '.join(channels)}")

    network = build(channels, options.width).to(options.device)
    resamples = 3 if options.quick else 20
    overlap = overlap_with_controls(
        network, task_losses, calibration, 1 - options.rho, resamples=resamples, seed=options.seed
    )
    overlap = overlap.select(lambda name: "shortcut" not in name)
    print(overlap)
    print_totals(overlap)
    print(f"\n{overlap.explain_watershed()}")
    print(overlap.suggest_branch() or f"For scale: {overlap.suggest_branch(after=overlap.names[len(overlap) // 2])}")

    conflict = GradientConflict()
    score_tasks(network, task_losses, calibration[:4], observe=conflict)
    draw(overlap, options.out / "watershed.png")
    if options.report is not None:
        html_report(options.report, overlap, model=network, conflict=conflict)
    print(f"{time.perf_counter() - start:.0f} s")
    if options.quick:
        print("A quick run only shows that the script works: its figures mean nothing.")


if __name__ == "__main__":
    main()
