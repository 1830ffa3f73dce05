"""The rows of ``structured_coverage.py`` from torchvision: classification, video, segmentation and detection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from .case import Case, plain, randomize

_SIZES = {
    "alexnet": 96, "resnet18": 64, "shufflenet_v2_x0_5": 64, "squeezenet1_1": 64, "googlenet": 64, "mnasnet0_5": 64,
    "mobilenet_v3_small": 64, "efficientnet_b0": 64, "regnet_y_400mf": 64, "convnext_tiny": 64, "vit_b_32": 224,
    "swin_t": 64, "swin_v2_t": 64, "maxvit_t": 224,
}  # fmt: skip
_VIDEO = ("r3d_18", "r2plus1d_18", "s3d")
_SEGMENTATION = ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
_DETECTION = (
    "fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large", "retinanet_resnet50_fpn",
    "fcos_resnet50_fpn", "maskrcnn_resnet50_fpn",
)  # fmt: skip
NAMES = (*_SIZES, *_VIDEO, *_SEGMENTATION, *_DETECTION)


class TwoHeads(nn.Module):
    """A network with two linear heads on its last vector."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.a, self.b = body, nn.Linear(16, 3), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs of the heads."""
        features = self.body(x)
        features = features if isinstance(features, Tensor) else features[0]  # googlenet in training
        return self.a(features.relu()), self.b(features.relu())


def detection_losses(model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
    """Take the losses that detectors return in training."""
    model.train()
    return dict(model(*batch))


def build(name: str) -> Case:
    """Build a model, and inputs for it."""
    if name in _DETECTION:
        return _detector(name)
    if name in _SEGMENTATION:
        model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=4)
        return plain(randomize(model), torch.randn(2, 3, 64, 64))
    options: dict[str, Any] = {"init_weights": False} if name == "googlenet" else {}
    body = TwoHeads(torchvision.models.get_model(name, weights=None, num_classes=16, **options))
    frames = (16,) if name in _VIDEO else ()
    size = _SIZES.get(name, 224 if name == "s3d" else 64)
    return plain(randomize(body), torch.randn(2, 3, *frames, size, size))


def _detector(name: str) -> Case:
    options: dict[str, Any] = {} if name.startswith("ssd") else {"min_size": 96, "max_size": 96}
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=4, **options)
    images = [torch.rand(3, 96, 96) for _ in range(2)]
    target = {"boxes": torch.tensor([[10.0, 10, 60, 70], [20, 5, 50, 40]]), "labels": torch.tensor([1, 2])}
    if name.startswith("mask"):
        target["masks"] = torch.ones(2, 96, 96, dtype=torch.uint8)
    return Case(model.train(), (images,), (images, [dict(target) for _ in images]), detection_losses)
