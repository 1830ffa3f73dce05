"""Tiny-Taskonomy (Zamir et al., CVPR 2018): five dense tasks on photographs of the inside of buildings.

Layout, that of the public files (the tool of Omnidata puts one folder ``taskonomy`` in between, which is found too)::

    root/taskonomy/rgb/<building>/point_0_view_0_domain_rgb.png                              8 bits, 3 channels
    root/taskonomy/segment_semantic/<building>/point_0_view_0_domain_segmentsemantic.png     8 bits; 0 is unknown
    root/taskonomy/normal/<building>/point_0_view_0_domain_normal.png                        8 bits, 3 channels
    root/taskonomy/depth_zbuffer/<building>/point_0_view_0_domain_depth_zbuffer.png          16 bits, 1/512 metre
    root/taskonomy/keypoints2d/<building>/point_0_view_0_domain_keypoints2d.png              16 bits
    root/taskonomy/edge_texture/<building>/point_0_view_0_domain_edge_texture.png            16 bits
    root/taskonomy/train_val_test_tiny.csv    id,train,val,test: each building and 1 for the split that it is in

The last is one of the split files of Taskonomy. Splits are by building. If it names no building for ``val``, a tenth of
the training buildings (one at least), drawn by a seed, is the validation split.

Targets are scaled as by AdaShare (Sun et al., NeurIPS 2020), whose settings the paper took: depth is
log(1 + d) / log(2^16) of the stored number, keypoints and edges are [0, 0.005] and [0, 0.08] of the full range brought
to [-1, 1]. Depths of 64,500 and more are unknown, and normals with them where depth is a task too; so are normals that
are no direction in the file (a grey of 127). The class weights that both use for segmentation are not among the public
files; the loss here has none.
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..problem import tasks
from ..problem.paper_setup import TASKONOMY
from ..problem.problem import Problem
from .disk import Augment, OnDisk, Sample, zoomed
from .files import require
from .splits import carve, sizes

LAYOUT = (
    "taskonomy/ holds <domain>/<building>/point_*_view_*_domain_*.png and train_val_test_tiny.csv; see taskonomy.py"
)
DOMAINS = {
    "segmentation": "segment_semantic",
    "normals": "normal",
    "depth": "depth_zbuffer",
    "keypoints": "keypoints2d",
    "edges": "edge_texture",
}
FULL = 2.0**16
DEPTH_LIMIT = 64_500  # from here on, nothing was in sight
TOP = {"keypoints": 0.005, "edges": 0.08}  # of the full range; what is above is cut off


def taskonomy(
    root: str | Path,
    *,
    only: Sequence[str] = tuple(TASKONOMY.classes),
    weights: Mapping[str, float] = TASKONOMY.weights,
    crop: int = TASKONOMY.crop,
    size: int = TASKONOMY.test_size[0],
    seed: int = 0,
) -> Problem:
    """Load Tiny-Taskonomy.

    Args:
        root: The folder with ``taskonomy/``.
        only: Names of the tasks, in this order, of segmentation, normals, depth, keypoints and edges.
        weights: Of the tasks' losses, 1 where not named; the paper's by default.
        crop: Height and width of training pictures, which are zoomed, mirrored and cropped at random.
        size: Height and width that pictures are brought to first.
        seed: Of the choice of validation buildings, if the split file names none.

    Returns:
        The tasks over inputs ``(3, crop, crop)`` in training, and ``(3, size, size)`` otherwise.

    Raises:
        ValueError: An unknown task. When a sample is read: a picture of a wrong kind.
        FileNotFoundError: Files are not there.
    """
    # Edges are real numbers here, and the paper takes their absolute error, as for keypoints.
    made = tasks.dense(TASKONOMY.classes, only, weights, kinds={"edges": tasks.keypoints})
    folder = Path(root) / "taskonomy"
    read = functools.partial(read_views, tuple(only), size)
    splits = {}
    for split, buildings in _buildings(folder, seed).items():
        keys = [key for building in buildings for key in _views(folder, building, only)]
        splits[split] = OnDisk(keys, read, Augment(crop) if split == "train" else None)
    facts = {
        "source": "Taskonomy, the buildings of its tiny split",
        "split": f"{sizes(splits)}; by building",
    }
    return Problem(
        "taskonomy",
        made,
        **splits,
        shape=(3, crop, crop),
        facts=facts,
    )


def _buildings(folder: Path, seed: int) -> dict[str, list[str]]:
    path = require(folder / "train_val_test_tiny.csv", LAYOUT)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    marked = {
        split: sorted(row["id"] for row in rows if row.get(column) == "1")
        for split, column in (("train", "train"), ("validation", "val"), ("test", "test"))
    }
    if not marked["validation"] and len(marked["train"]) > 1:
        names = marked["train"]
        rest, held = carve(len(names), 0.1, seed)
        marked["train"], marked["validation"] = [names[i] for i in rest.tolist()], [names[i] for i in held.tolist()]
    for split, names in marked.items():
        if not names:
            raise ValueError(f"root: needs buildings for {split} in {path}, found none; {LAYOUT}")
    return marked


def _views(folder: Path, building: str, only: Sequence[str]) -> list[dict[str, Path]]:
    """Find the files of every view of a building, by domain or task name."""
    found: dict[str, dict[str, Path]] = {}
    for name, domain in (("picture", "rgb"), *((task, DOMAINS[task]) for task in only)):
        between = folder / domain / "taskonomy"
        place = require((between if between.exists() else folder / domain) / building, LAYOUT)
        files = {path.name.split("_domain_")[0]: path for path in place.glob("point_*_view_*_domain_*.png")}
        if name == "picture":
            found = {view: {name: path} for view, path in files.items()}
        elif missing := found.keys() - files.keys():
            raise FileNotFoundError(
                f"root: needs view {min(missing)} in {place}, found no such file ({len(missing)} are missing); {LAYOUT}"
            )
        for view in found:
            found[view][name] = files[view]
    if not found:
        raise FileNotFoundError(f"root: needs pictures of {building}, found none; {LAYOUT}")
    return [found[view] for view in sorted(found)]


def read_views(only: Sequence[str], size: int, files: Mapping[str, Path]) -> Sample:
    """Read one view: ``picture`` and the tasks asked for, of these files, brought to ``(size, size)``."""
    picture = zoomed(_load(files["picture"], 3) / 255, (size, size), smooth=True)
    targets = {}
    for task in only:
        stored = zoomed(_load(files[task], 3 if task == "normals" else 1), (size, size), smooth=False)
        targets[task] = _SCALED[task](stored)
    if "normals" in targets and "depth" in targets:
        targets["normals"] = targets["normals"] * (targets["depth"] > 0)
    return picture, targets


def _load(path: Path, channels: int) -> Tensor:
    """Read a picture as float32 ``(channels, height, width)``, in the numbers of the file."""
    with Image.open(path) as file:
        values = np.asarray(file)
    if values.ndim == 2:
        values = values[..., None]
    if values.shape[-1] < channels or (channels == 1 and values.shape[-1] != 1):
        raise ValueError(f"root: needs {channels} channels in {path}, found {values.shape[-1]}; {LAYOUT}")
    return torch.from_numpy(np.moveaxis(values[..., :channels], -1, 0).astype(np.float32))


def _classes(stored: Tensor) -> Tensor:
    labels = stored[0].long() - 1
    return torch.where(labels < 0, tasks.IGNORE, labels)


def _log_depth(stored: Tensor) -> Tensor:
    return torch.where(stored < DEPTH_LIMIT, torch.log1p(stored) / math.log(FULL), 0.0)


def _directions(stored: Tensor) -> Tensor:
    vectors = stored / 127.5 - 1
    length = vectors.norm(dim=0)
    return torch.where(length > 0.5, vectors / length, 0.0)


def _map(stored: Tensor, *, top: float) -> Tensor:
    return (stored / FULL).clamp(0, top) * (2 / top) - 1


_SCALED: dict[str, Callable[[Tensor], Tensor]] = {
    "segmentation": _classes,
    "normals": _directions,
    "depth": _log_depth,
    **{task: functools.partial(_map, top=top) for task, top in TOP.items()},
}
