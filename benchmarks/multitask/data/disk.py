"""Splits that lie on disk and are read as they are asked for; scaling, mirroring and cropping while training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problem.problem import Batch
from ..problem.tasks import IGNORE

Sample: TypeAlias = tuple[Tensor, dict[str, Tensor]]  # a picture (3, height, width) in [0, 1], and its targets
Key = TypeVar("Key")

# Mean and spread of the channels of ImageNet's pictures in [0, 1], by which pictures are scaled everywhere.
MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# What a target holds where nothing is known; see tasks.py.
UNKNOWN = {"segmentation": float(IGNORE), "depth": 0.0, "normals": 0.0, "edges": torch.nan, "keypoints": torch.nan}


@dataclass(frozen=True)
class Augment:
    """Zoom, mirror and crop a picture with its targets, by torch's default random generator.

    The zoom is drawn from ``scale``; every second picture is mirrored, and its normals with it; a square of ``crop``
    pixels is cut out anywhere. A picture that is too small for it is set into the middle of unknown pixels. Pictures
    are interpolated, targets are not. Depths stay as they are when the picture is zoomed.
    """

    crop: int
    scale: tuple[float, float] = (0.5, 1.5)

    def __call__(self, picture: Tensor, targets: dict[str, Tensor]) -> Sample:
        """Return a picture of ``(3, crop, crop)`` and targets of this size."""
        zoom = float(torch.empty(()).uniform_(*self.scale))
        size = [max(round(side * zoom), 1) for side in picture.shape[-2:]]
        mirrored = bool(torch.rand(()) < 0.5)
        top, left = (int(torch.randint(max(side - self.crop, 0) + 1, ())) for side in size)
        picture = zoomed(picture, size, smooth=True)
        changed = {task: zoomed(target, size, smooth=False) for task, target in targets.items()}
        if mirrored:
            picture = picture.flip(-1)
            changed = {task: _mirror(task, target) for task, target in changed.items()}
        picture = self._cut(picture, top, left, 0.0)
        return picture, {task: self._cut(target, top, left, UNKNOWN[task]) for task, target in changed.items()}

    def _cut(self, values: Tensor, top: int, left: int, unknown: float) -> Tensor:
        height, width = values.shape[-2:]
        rows, columns = max(self.crop - height, 0), max(self.crop - width, 0)
        around = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        padded = F.pad(values, around, value=unknown) if any(around) else values
        return padded[..., top : top + self.crop, left : left + self.crop]


class OnDisk(Generic[Key]):
    """Samples that ``read`` gets from disk, one at a time.

    Args:
        keys: What tells the samples apart, for instance their file names.
        read: Gets one sample; its picture is in [0, 1] and is scaled by ``MEAN`` and ``SPREAD`` here.
        augment: What is done to every sample while training, None for nothing.
    """

    def __init__(self, keys: Sequence[Key], read: Callable[[Key], Sample], augment: Augment | None = None) -> None:
        self.keys, self.read, self.augment = tuple(keys), read, augment

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.keys)

    def batch(self, which: Tensor) -> Batch:
        """Read the samples of these indices."""
        mean, spread = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(SPREAD).view(3, 1, 1)
        pictures, targets = [], []
        for index in which.tolist():
            picture, target = self.read(self.keys[index])
            picture = (picture - mean) / spread  # before padding: what is added is the mean
            if self.augment is not None:
                picture, target = self.augment(picture, target)
            pictures.append(picture)
            targets.append(target)
        return torch.stack(pictures), {task: torch.stack([target[task] for target in targets]) for task in targets[0]}


def zoomed(values: Tensor, size: Sequence[int], *, smooth: bool) -> Tensor:
    """Bring ``(height, width)`` or ``(channels, height, width)`` to another size, of any type."""
    if list(values.shape[-2:]) == list(size):
        return values
    maps = values.view(1, -1, *values.shape[-2:]).float()
    if smooth:
        maps = F.interpolate(maps, size=list(size), mode="bilinear", antialias=True)
    else:
        maps = F.interpolate(maps, size=list(size), mode="nearest-exact")
    return maps.view(*values.shape[:-2], *size).to(values.dtype)


def _mirror(task: str, target: Tensor) -> Tensor:
    target = target.flip(-1)
    if task == "normals":  # the horizontal direction turns round too
        target = torch.cat([-target[:1], target[1:]])
    return target
