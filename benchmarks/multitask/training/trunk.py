"""A network that people start from: MobileNetV2 trained on ImageNet, with a new linear head per task."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import mobilenet_v2

from ..data.trunk import TrunkProblem
from ..problem.problem import Problem
from .networks import SharedTrunk

SIDE = 48  # pixels that the trunk sees: its last maps are 2 x 2
MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pictures, by channel


class PretrainedTrunk(nn.Module):
    """Grey pictures from 0 to 1, magnified and coloured as those it was trained on; gives the mean of the last maps."""

    mean: Tensor
    spread: Tensor

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("spread", torch.tensor(SPREAD).view(3, 1, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``(n, channels)``."""
        large = F.interpolate(inputs, (SIDE, SIDE), mode="bilinear", align_corners=False)
        maps: Tensor = self.features((large - self.mean) / self.spread)
        return maps.mean((2, 3))


def pretrained_mobilenet(problem: Problem) -> nn.Module:
    """Take over the trunk's weights; only the heads are left to chance.

    Raises:
        ValueError: If the problem comes without them.
    """
    if not isinstance(problem, TrunkProblem):
        raise ValueError(f"problem: needs one with the weights of a trunk, found {problem.name}; give a TrunkProblem")
    network = mobilenet_v2(weights=None)
    network.features.load_state_dict(dict(problem.trunk))
    heads = {task.name: nn.Linear(network.last_channel, task.outputs) for task in problem.tasks}
    return SharedTrunk(PretrainedTrunk(network.features), heads)
