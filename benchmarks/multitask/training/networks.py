"""Small multi-task networks: a trunk from timm or an MLP, one head or light decoder per task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import timm
import torch.nn.functional as F
from torch import Tensor, nn

from models.paper_network import PaperNetwork

from ..problem.problem import Problem


class Heads(nn.ModuleDict):
    """One head per task on the same features."""

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Return every task's output."""
        return {task: head(features) for task, head in self.items()}


class SharedTrunk(nn.Module):
    """A trunk and one head per task; ``network(inputs)`` gives ``{task: output}``."""

    def __init__(self, trunk: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = Heads(heads)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """Run the trunk once and every head on it."""
        outputs: dict[str, Tensor] = self.heads(self.trunk(inputs))
        return outputs


class Decoder(nn.Module):
    """A light decoder: feature maps of several scales, each through a 1x1 convolution, added up and refined."""

    def __init__(self, channels: Iterable[int], outputs: int, width: int = 32) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(channel, width, 1) for channel in channels)
        self.refine = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, outputs, 1),
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Return a map at the size of the finest input."""
        size = maps[0].shape[-2:]
        total = self.lateral[0](maps[0])
        for lateral, features in zip([*self.lateral][1:], maps[1:], strict=True):
            total = total + F.interpolate(lateral(features), size, mode="bilinear", align_corners=False)
        result: Tensor = self.refine(total)
        return result


# With timm's zero_init_last the residual branches would start multiplied by zero, and all of their weights would score
# zero at initialisation.
NARROW = {"channels": (16, 32, 64, 128), "stem_width": 8, "zero_init_last": False}
MIDDLE = {"channels": (32, 64, 128, 256), "stem_width": 16, "zero_init_last": False}


def small_resnet(problem: Problem) -> nn.Module:
    """A narrow ResNet from timm with a small head per task, for pictures with one label per task."""
    trunk = timm.create_model("resnet10t", pretrained=False, num_classes=0, in_chans=problem.shape[0], **NARROW)
    width = trunk.num_features
    return SharedTrunk(
        trunk,
        {
            task.name: nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, task.outputs))
            for task in problem.tasks
        },
    )


class TappedTrunk(nn.Module):
    """A trunk that gives the features of several stages, and one head per task on the mean of one of them."""

    def __init__(self, trunk: nn.Module, heads: Mapping[str, nn.Module], stages: Mapping[str, int]) -> None:
        super().__init__()
        self.trunk, self.heads, self._stages = trunk, nn.ModuleDict(heads), dict(stages)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """Run the trunk once and every head on its stage."""
        maps = self.trunk(inputs)
        return {task: head(maps[self._stages[task]].mean((2, 3))) for task, head in self.heads.items()}


TAPS = {"shoe": 0, "sleeves": 1, "loop": 2, "odd": 2}  # the stage that a task's head sees; the last where not named


def tapped_resnet(problem: Problem) -> nn.Module:
    """The same narrow ResNet with heads at several depths: some tasks reach only part of the trunk."""
    trunk = timm.create_model(
        "resnet10t",
        pretrained=False,
        in_chans=problem.shape[0],
        features_only=True,
        out_indices=(1, 2, 3, 4),
        **NARROW,
    )
    widths = trunk.feature_info.channels()
    stages = {task.name: TAPS.get(task.name, len(widths) - 1) for task in problem.tasks}
    heads = {
        task.name: nn.Sequential(nn.Linear(widths[stages[task.name]], 32), nn.ReLU(), nn.Linear(32, task.outputs))
        for task in problem.tasks
    }
    return TappedTrunk(trunk, heads, stages)


def mlp(problem: Problem) -> nn.Module:
    """Two shared layers, and a small head per task, for plain features."""
    trunk = nn.Sequential(nn.Linear(problem.shape[0], 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU())
    return SharedTrunk(
        trunk,
        {
            task.name: nn.Sequential(nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, task.outputs))
            for task in problem.tasks
        },
    )


def dense_resnet(problem: Problem) -> nn.Module:
    """A narrow ResNet from timm with a light decoder per task, for maps."""
    trunk = timm.create_model(
        "resnet10t", pretrained=False, in_chans=problem.shape[0], features_only=True, out_indices=(1, 2, 3, 4), **MIDDLE
    )
    channels = trunk.feature_info.channels()
    return SharedTrunk(trunk, {task.name: Decoder(channels, task.outputs) for task in problem.tasks})


def paper_network(problem: Problem) -> nn.Module:
    """The paper's: DeepLab on ResNet-34 with four parallel dilated branches per task."""
    return PaperNetwork({task.name: task.outputs for task in problem.tasks})
