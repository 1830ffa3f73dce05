"""Rooms: five dense tasks on rendered pictures of furnished rooms, with exact labels. Rendered, not NYU-v2.

The tasks are those of Tiny-Taskonomy: segmentation (14 classes), depth in metres, surface normals in camera space,
edges (occlusions and creases), and keypoints (the corner response of the picture, a pseudo-label as in Taskonomy). The
test split shows only meshes that are in no other split; training and validation split differ by room, not by mesh.
``benchmarks/render_rooms.py`` makes such files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..problem import tasks
from ..problem.problem import Problem
from .files import require
from .splits import InMemory, channel_statistics, sizes, spread_out

CLASSES = (
    "wall", "floor", "ceiling", "bed", "chair", "sofa", "table",
    "storage", "window", "door", "person", "appliance", "bath", "object",
)  # fmt: skip
OUTPUTS = {"segmentation": len(CLASSES), "depth": 1, "normals": 3, "edges": 1, "keypoints": 1}
KEYPOINT_SCALE = 10.0  # corner responses are below 0.1 almost everywhere; so they are below 1
NOTE = "Rooms are rendered pictures with exact labels; they are neither photographs nor NYU-v2."
FILES = {"train": "train", "validation": "val", "test": "test"}
KEYS = {"segmentation": "seg", "depth": "depth", "normals": "normal", "edges": "edge", "keypoints": "kp"}


def rooms(
    root: str | Path,
    *,
    only: Sequence[str] | None = None,
    weights: Mapping[str, float] | None = None,
    train: int | None = None,
    validation: int | None = None,
    test: int | None = None,
    size: int = 64,
) -> Problem:
    """Load the Rooms problem.

    Args:
        root: The folder with ``rooms/rooms64_train.npz``, ``..._val.npz`` and ``..._test.npz``.
        only: Names of the tasks to take, in this order; all five by default.
        weights: Of the tasks' losses, 1 where not named.
        train: Number of training pictures, evenly spaced over the rooms; all by default.
        validation: Number of validation pictures, likewise.
        test: Number of test pictures, likewise.
        size: Height and width of the pictures, part of the files' names.

    Returns:
        Up to five tasks over inputs ``(3, size, size)``, scaled to mean 0 and deviation 1 in training.
        Keypoint targets are ten times the files' values, so that they are mostly below 1.

    Raises:
        ValueError: An unknown task, more pictures than there are, or a file that holds something else.
        FileNotFoundError: A file is not there.
    """
    chosen = tuple(only) if only is not None else tuple(KEYS)
    made = tasks.dense(OUTPUTS, chosen, weights or {})
    counts = {"train": train, "validation": validation, "test": test}
    loaded = {
        split: _read(Path(root) / "rooms" / f"rooms{size}_{FILES[split]}.npz", chosen, size, count, split)
        for split, count in counts.items()
    }
    mean, spread = channel_statistics(loaded["train"][0])
    splits = {split: InMemory(pictures, targets, mean, spread) for split, (pictures, targets) in loaded.items()}
    facts = {
        "source": "rendered by ray casting from the meshes of Debian's sweethome3d-furniture (CC-BY 3.0 and CC0)",
        "split": f"{sizes(splits)}; by room, test meshes held out",
    }
    return Problem(
        f"rooms{size}",
        made,
        **splits,
        shape=(3, size, size),
        note=NOTE,
        facts=facts,
    )


def _read(
    path: Path, chosen: Sequence[str], size: int, count: int | None, argument: str
) -> tuple[Tensor, dict[str, Tensor]]:
    layout = f"rooms/ holds rooms{size}_train.npz, ..._val.npz and ..._test.npz, which benchmarks/render_rooms.py makes"
    with np.load(require(path, layout)) as file:
        if missing := {"rgb", *KEYS.values()} - set(file.files):
            raise ValueError(
                f"root: needs the arrays rgb and {', '.join(KEYS.values())} in {path}, found no "
                f"{', '.join(sorted(missing))}; render or copy the file again"
            )
        pictures = torch.from_numpy(file["rgb"]).movedim(-1, 1)
        if pictures.shape[1:] != (3, size, size):
            raise ValueError(
                f"size: needs pictures of {size}x{size} in {path}, found {tuple(pictures.shape[-2:])}; "
                "give the size of the file"
            )
        which = spread_out(len(pictures), count, argument)
        targets = {name: _target(name, torch.from_numpy(file[KEYS[name]]))[which] for name in chosen}
    return pictures[which].contiguous(), targets


def _target(name: str, stored: Tensor) -> Tensor:
    if name == "segmentation":
        return stored
    if name == "normals":
        return stored.movedim(-1, 1)
    return (stored * KEYPOINT_SCALE if name == "keypoints" else stored)[:, None]
