"""
A detector that returns its losses
==================================

Torchvision's detectors return a dict of losses when they train, so ``return model(*batch)`` is all that pruning needs.

A small RetinaNet finds coloured discs, squares and crosses on noise; *which* (classification) and *where* (boxes) are
its two tasks. It is trained, pruned to 90 % by each task's own scores, by those of the summed loss, by LAMP and by
magnitude, and tuned.

No download; a minute on a free CPU core:

    python examples/detector.py
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import box_iou
from tqdm import trange

from disparse_plugin import disparse_pretrained, joint

SIZE, KINDS, AMOUNT = 64, ("disc", "square", "cross"), 0.9
Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


def losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """One loss per task: a detector in training mode returns them."""
    return model(*batch)


def picture(generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw one shape on noise, and say which and where."""
    radius, kind = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((7, 15), (0, 3)))
    row, column = torch.randint(radius, SIZE - radius, (2,), generator=generator).tolist()
    rows, columns = torch.meshgrid(torch.arange(SIZE) - row, torch.arange(SIZE) - column, indexing="ij")
    far = torch.maximum(rows.abs(), columns.abs())
    near = torch.minimum(rows.abs(), columns.abs())
    shape = ((rows**2 + columns**2) < radius**2, far < radius, (far < radius) & (near < radius / 3))[kind]
    color = 0.3 + 0.4 * torch.eye(3)[kind].view(3, 1, 1)  # discs are reddish, squares greenish, crosses bluish
    image = 0.15 * torch.randn(3, SIZE, SIZE, generator=generator) + 0.3 + color * shape
    box = torch.tensor([[column - radius, row - radius, column + radius, row + radius]], dtype=torch.float32)
    return image.clamp(0, 1), {"boxes": box, "labels": torch.tensor([kind])}


def pictures(count: int, seed: int, device: torch.device) -> Batch:
    """Draw several."""
    generator = torch.Generator().manual_seed(seed)
    images, targets = zip(*(picture(generator) for _ in range(count)), strict=True)
    return [image.to(device) for image in images], [{k: v.to(device) for k, v in each.items()} for each in targets]


def build() -> RetinaNet:
    """A RetinaNet with a backbone of four layers."""

    def layer(before: int, after: int, stride: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())

    backbone = nn.Sequential(layer(3, 32, 2), layer(32, 64, 2), layer(64, 64, 2), layer(64, 64, 1))
    backbone.out_channels = 64
    anchors = AnchorGenerator(((16, 24),), ((1.0,),))
    norm = partial(nn.GroupNorm, 16)  # as in torchvision's second version: without, some seeds learn no kinds
    head = RetinaNetHead(64, 2, len(KINDS), norm_layer=norm)
    return RetinaNet(backbone, len(KINDS), min_size=SIZE, max_size=SIZE, anchor_generator=anchors, head=head)


def train(model: nn.Module, data: Batch, steps: int, name: str, rate: float = 1e-3) -> None:
    """Train on the sum of the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    order = torch.Generator().manual_seed(0)
    model.train()
    for _ in trange(steps, desc=name, leave=False):
        chosen = torch.randint(len(data[0]), (16,), generator=order).tolist()
        optimizer.zero_grad()
        sum(losses(model, ([data[0][i] for i in chosen], [data[1][i] for i in chosen])).values()).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def test(model: nn.Module, data: Batch) -> tuple[float, float, list[dict[str, Tensor]]]:
    """Return how often the best box has the right kind, its mean overlap with the true box, and all boxes."""
    found, right, overlap = model.eval()(data[0]), 0.0, 0.0
    for boxes, target in zip(found, data[1], strict=True):
        if len(boxes["labels"]):
            right += float(boxes["labels"][0] == target["labels"][0])
            overlap += float(box_iou(boxes["boxes"][:1], target["boxes"]))
    return right / len(found), overlap / len(found), found


def draw(path: Path, data: Batch, found: dict[str, list[dict[str, Tensor]]], columns: int = 6) -> None:
    """Show the first pictures with the best box of every model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 * columns, 1.75 * len(found)), dpi=110, layout="constrained")
    for axes_row, (name, boxes) in zip(figure.subplots(len(found), columns), found.items(), strict=True):
        for axes, image, each, target in zip(axes_row, data[0], boxes, data[1], strict=False):
            axes.imshow(image.permute(1, 2, 0).cpu().numpy())
            axes.set(xticks=[], yticks=[], autoscale_on=False)  # a box may reach over the edge
            if len(each["boxes"]):
                left, top, right, bottom = each["boxes"][0].tolist()
                hit = bool(each["labels"][0] == target["labels"][0])
                color = "#56B4E9" if hit else "#D55E00"
                axes.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color=color, linewidth=2)
                axes.set_xlabel(KINDS[int(each["labels"][0])] + ("" if hit else "?"), fontsize=8, color=color)
        axes_row[0].set_ylabel(name, fontsize=9)
    figure.savefig(path)


def main() -> None:
    """Train, prune in four ways, tune, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu (default), cuda, ...")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and batches (default: 0)")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for detector.png (default: this one)")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to see that it runs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    steps, tune, count = (2, 2, 16) if options.quick else (300, 75, 2000)
    torch.manual_seed(options.seed)
    training, testing = (pictures(n, options.seed + i, options.device) for i, n in ((1, count), (10_000, count // 10)))
    dense = build().to(options.device)
    train(dense, training, steps, "dense")

    scored = [([image], [target]) for image, target in zip(training[0][:32], training[1][:32], strict=True)]
    ways: dict[str, tuple[Callable[..., Any], dict[str, str]]] = {
        "per task": (losses, {}),
        "summed loss": (joint(losses), {}),
        "LAMP": (joint(losses), {"criterion": "lamp"}),
        "magnitude": (joint(losses), {"criterion": "magnitude"}),
    }
    found = {}
    print(f"{'':16}{'right kind':>12}{'box overlap':>14}")
    for name in ("dense", *ways):
        model = copy.deepcopy(dense)
        if name in ways:
            seen, criterion = ways[name]
            disparse_pretrained(model.train(), seen, scored, AMOUNT, **criterion)
        train(model, training, tune, name)
        right, overlap, found[name] = test(model, testing)
        print(f"{name:16}{right:12.1%}{overlap:14.3f}", flush=True)
    draw(options.out / "detector.png", testing, found)
    print(f"\n{time.perf_counter() - start:.0f} s in all; picture: {options.out / 'detector.png'}")
    if options.quick:
        print("A quick run only shows that the script works: its figures mean nothing.")


if __name__ == "__main__":
    main()
