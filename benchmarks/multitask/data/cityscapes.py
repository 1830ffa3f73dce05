"""Cityscapes (Cordts et al., CVPR 2016): segmentation and inverse depth of street photographs.

Layout, that of the files which the authors of MTAN publish::

    root/cityscapes/train/image/0.npy      (height, width, 3), in [0, 1], or bytes
    root/cityscapes/train/label_19/0.npy   (height, width), classes; -1 where unknown
    root/cityscapes/train/depth/0.npy      (height, width, 1), inverse depth; zeros where unknown
    root/cityscapes/val/...                likewise

Labels lie in ``label_<classes>`` (they have 2, 7 and 19 classes), or in ``label``. The paper's experiments are on 19
classes at 256x512 pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..problem import tasks
from ..problem.paper_setup import CITYSCAPES
from ..problem.problem import Problem
from .array_folders import TRAIN, array_problem

LAYOUT = "cityscapes/ holds train/ and val/, each with image/, label_19/, depth/ of 0.npy, 1.npy ...; see cityscapes.py"


def cityscapes(
    root: str | Path,
    *,
    classes: int = CITYSCAPES.classes["segmentation"],
    only: Sequence[str] = tuple(CITYSCAPES.classes),
    weights: Mapping[str, float] = CITYSCAPES.weights,
    crop: int = CITYSCAPES.crop,
    share: float = 0.1,
    seed: int = 0,
) -> Problem:
    """Load Cityscapes.

    Args:
        root: The folder with ``cityscapes/``.
        classes: Of the segmentation, 19 in the paper.
        only: Names of the tasks, in this order, of segmentation and depth.
        weights: Of the tasks' losses, 1 where not named; the paper's by default.
        crop: Height and width of training pictures, which are zoomed, mirrored and cropped at random.
        share: Of the training pictures, how many are the validation split instead.
        seed: Of this division.

    Returns:
        The tasks over inputs ``(3, crop, crop)`` in training, and whole pictures otherwise. The test split is the
        folder ``val``, because the labels of the official test set are not public.

    Raises:
        ValueError: An unknown task. When a sample is read: an array of a wrong shape, or a label out of range.
        FileNotFoundError: Files are not there.
    """
    made = tasks.dense({"segmentation": classes, "depth": 1}, only, weights)
    folder = Path(root) / "cityscapes"
    numbered = f"label_{classes}"
    labels = numbered if (folder / TRAIN / numbered).exists() else "label"
    return array_problem(
        folder,
        made,
        {task: labels if task == "segmentation" else task for task in only},
        title="Cityscapes",
        classes=classes,
        layout=LAYOUT,
        crop=crop,
        share=share,
        seed=seed,
    )
