"""NYU-v2 (Silberman et al., ECCV 2012): segmentation, surface normals and depth of indoor photographs.

Layout, that of the files which the authors of MTAN publish::

    root/nyuv2/train/image/0.npy    (height, width, 3), in [0, 1], or bytes
    root/nyuv2/train/label/0.npy    (height, width), classes; -1 where unknown
    root/nyuv2/train/normal/0.npy   (height, width, 3); zeros where unknown
    root/nyuv2/train/depth/0.npy    (height, width, 1), metres; zeros where unknown
    root/nyuv2/val/...              likewise

Their files have 13 classes at 288x384 pixels. The paper's experiments are on 40 classes at 480x640; for them, write the
labels of your copy in this layout and give ``classes=40``, or ``--data nyuv2-40`` to the benchmark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..problem import tasks
from ..problem.paper_setup import NYU_V2
from ..problem.problem import Problem
from .array_folders import array_problem

LAYOUT = (
    "nyuv2/ holds train/ and val/, each with image/, label/ (13 classes; 40 with --data nyuv2-40), normal/ and depth/ "
    "of 0.npy, 1.npy ...; see nyuv2.py"
)
FOLDERS = {"segmentation": "label", "normals": "normal", "depth": "depth"}


def nyuv2(
    root: str | Path,
    *,
    classes: int = 13,
    only: Sequence[str] = tuple(NYU_V2.classes),
    weights: Mapping[str, float] = NYU_V2.weights,
    crop: int = NYU_V2.crop,
    share: float = 0.1,
    seed: int = 0,
) -> Problem:
    """Load NYU-v2.

    Args:
        root: The folder with ``nyuv2/``.
        classes: Of the segmentation: 13 in MTAN's files, 40 in the paper.
        only: Names of the tasks, in this order, of segmentation, normals and depth; the paper's two by default.
        weights: Of the tasks' losses, 1 where not named; the paper's by default.
        crop: Height and width of training pictures, which are zoomed, mirrored and cropped at random.
        share: Of the training pictures, how many are the validation split instead.
        seed: Of this division.

    Returns:
        The tasks over inputs ``(3, crop, crop)`` in training, and whole pictures otherwise. The test split is the
        folder ``val``.

    Raises:
        ValueError: An unknown task. When a sample is read: an array of a wrong shape, or a label out of range.
        FileNotFoundError: Files are not there.
    """
    kinds = {"segmentation": classes, "normals": 3, "depth": 1}
    made = tasks.dense(kinds, only, weights)
    return array_problem(
        Path(root) / "nyuv2",
        made,
        {task: FOLDERS[task] for task in only},
        title="NYU-v2",
        classes=classes,
        layout=LAYOUT,
        crop=crop,
        share=share,
        seed=seed,
    )
