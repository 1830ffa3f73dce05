"""The network shape of the DiSparse paper, with random images and plain dense losses, for the benchmarks.

ResNet-34 trunk with output stride 8 (blocks 3, 4, 6, 3; strides 1, 2, 1, 1; dilations 1, 1, 2, 4) and, for each task,
four parallel heads (dilations 6, 12, 18, 24) of conv3x3 512 -> 1024, conv1x1 1024 -> 1024, conv1x1 1024 -> classes,
summed (Sun et al., CVPR 2022). At full width it has 67,581,120 prunable weights with the two tasks of NYU-v2 and
136,705,216 with the five of Tiny-Taskonomy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Task name -> output channels, as in the paper's NYU-v2 and Tiny-Taskonomy settings.
NYU_V2 = {"segmentation": 40, "normals": 3}
TASKONOMY = {"segmentation": 17, "normals": 3, "depth": 1, "keypoints": 1, "edges": 1}
TASK_SETS = {len(tasks): tasks for tasks in (NYU_V2, TASKONOMY)}

# Images and, per task, the target on the output grid.
DenseBatch: TypeAlias = tuple[Tensor, dict[str, Tensor]]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., CVPR 2016), with dilation."""

    def __init__(self, before: int, after: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=dilation, dilation=dilation, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != after:
            self.shortcut.append(nn.Conv2d(before, after, 1, stride, bias=False)).append(nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        """Add the residual to the shortcut."""
        inner = self.relu(self.norm1(self.conv1(x)))
        result: Tensor = self.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))
        return result


class ParallelHead(nn.Module):
    """The sum of dilated branches, each from trunk features to class maps."""

    def __init__(self, features: int, hidden: int, classes: int, rates: Sequence[int] = (6, 12, 18, 24)) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(features, hidden, 3, padding=rate, dilation=rate),
                nn.ReLU(inplace=True),
                nn.Dropout(),
                nn.Conv2d(hidden, hidden, 1),
                nn.ReLU(inplace=True),
                nn.Dropout(),
                nn.Conv2d(hidden, classes, 1),
            )
            for rate in rates
        )

    def forward(self, x: Tensor) -> Tensor:
        """Sum the branches: ``(batch, features, h, w)`` to ``(batch, classes, h, w)``."""
        total: Tensor = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return total


class PaperNetwork(nn.Module):
    """Trunk and heads; ``network(images)`` gives ``{task: (batch, classes, height / 8, width / 8)}``.

    Args:
        tasks: Task name to output channels.
        width: Channels of the first stage; 64 in the paper.
        hidden: Channels inside the heads; 1024 in the paper.
    """

    def __init__(self, tasks: Mapping[str, int], *, width: int = 64, hidden: int = 1024) -> None:
        super().__init__()
        stem = [
            nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
        ]
        stages, before = [], width
        for stage, (blocks, stride, dilation) in enumerate(zip((3, 4, 6, 3), (1, 2, 1, 1), (1, 1, 2, 4), strict=True)):
            after = width * 2**stage
            for block in range(blocks):
                stages.append(BasicBlock(before, after, stride if block == 0 else 1, dilation))
                before = after
        self.trunk = nn.Sequential(*stem, *stages)
        self.heads = nn.ModuleDict({task: ParallelHead(before, hidden, classes) for task, classes in tasks.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map ``(batch, 3, height, width)`` to every task's output."""
        features = self.trunk(images)
        return {task: head(features) for task, head in self.heads.items()}


def task_loss(task: str, output: Tensor, target: Tensor) -> Tensor:
    """One task's loss on the output grid: cross-entropy, cosine distance of normals, or absolute error."""
    if task == "segmentation":
        return F.cross_entropy(output, target)
    if task == "normals":
        return 1 - F.cosine_similarity(output, target).mean()
    return F.l1_loss(output, target)


def task_losses(network: nn.Module, batch: DenseBatch) -> dict[str, Tensor]:
    """Run the network once and return every task's loss, as ``score_tasks`` wants it."""
    images, targets = batch
    return {task: task_loss(task, output, targets[task]) for task, output in network(images).items()}


def random_batches(
    tasks: Mapping[str, int], *, batches: int, batch: int, size: int, device: str = "cpu", seed: int = 0
) -> list[DenseBatch]:
    """Draw normally distributed square images of ``size`` pixels and targets to go with them."""
    generator = torch.Generator().manual_seed(seed)
    grid = size
    for _ in range(3):  # stem, pooling, second stage: each halves, rounding up
        grid = (grid + 1) // 2
    made = []
    for _ in range(batches):
        images = torch.randn(batch, 3, size, size, generator=generator)
        targets = {
            task: torch.randint(classes, (batch, grid, grid), generator=generator)
            if task == "segmentation"
            else torch.randn(batch, classes, grid, grid, generator=generator)
            for task, classes in tasks.items()
        }
        made.append((images.to(device), {task: target.to(device) for task, target in targets.items()}))
    return made
