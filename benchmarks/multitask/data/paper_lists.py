"""The archives that the paper's experiments used: a JSON list of files beside the files (AdaShare; Sun et al., 2020).

::

    root/nyu_v2_3task.json   [image png, segmentation png (grey, 255 unknown), normals png (255 unknown), depth npy]
    root/cityscape.json      [image npy in [0, 1], depth npy, labels of 2, 7 and 19 classes as npy (-1 unknown)]
    root/taskonomy.json      [image, segmentation, normals, depth, keypoints, edges], all png
    root/semseg_prior_factor.npy   Taskonomy's class weights

Each list is ``{"train": [[...], ...], "test": [[...], ...]}`` of paths under the root. Those of Taskonomy begin with a
building and a domain, ``building/rgb/x.png``, where the public files have ``rgb/taskonomy/building/x.png``; the
latter is read. A tenth of ``train``, drawn by a seed (Taskonomy: of its buildings), is the validation split.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..problem import tasks
from ..problem.paper_setup import CITYSCAPES, NYU_V2, TASKONOMY
from ..problem.problem import Problem
from ..problem.tasks import IGNORE
from .disk import Augment, OnDisk, Sample
from .files import require
from .splits import carve, sizes
from .taskonomy import read_views

LAYOUT = "see paper_lists.py for the layout of the paper's archives"
ORDER = ("picture", "segmentation", "normals", "depth", "keypoints", "edges")  # of the files of Taskonomy

Entry = tuple[Path, ...]


def nyuv2_list(
    root: str | Path, *, only: Sequence[str] = tuple(NYU_V2.classes), centred: bool = True, seed: int = 0
) -> Problem:
    """Load NYU-v2 with 40 classes at 480x640 from ``nyu_v2_3task.json``.

    Args:
        root: The folder with the list.
        only: Names of the tasks, in this order, of segmentation, normals and depth; the paper's two by default.
        centred: Normals are the directions of ``2 v / 255 - 1``, v the bytes of the file. The authors' networks were
            trained on the directions of the bytes themselves, blue first: all are positive, so angles between them
            are smaller. False gives those.
        seed: Of the validation split.

    Returns:
        The tasks, with the paper's loss weights.

    Raises:
        FileNotFoundError: The list or a file in it is not there.
        ValueError: The list is not one, or a file is of a wrong shape, when it is read.
    """
    made = tasks.dense({**NYU_V2.classes, "depth": 1}, only, NYU_V2.weights)
    read = functools.partial(_read_nyuv2, tuple(only), centred)
    return _problem("nyuv2", made, _entries(Path(root), "nyu_v2_3task.json", 4), read, NYU_V2.crop, seed)


def cityscapes_list(root: str | Path, *, only: Sequence[str] = tuple(CITYSCAPES.classes), seed: int = 0) -> Problem:
    """Load Cityscapes with 19 classes at 256x512 from ``cityscape.json``.

    Args:
        root: The folder with the list.
        only: Names of the tasks, in this order, of segmentation and depth.
        seed: Of the validation split.

    Raises:
        FileNotFoundError: The list or a file in it is not there.
        ValueError: The list is not one, or a file is of a wrong shape, when it is read.
    """
    made = tasks.dense(CITYSCAPES.classes, only, CITYSCAPES.weights)
    read = functools.partial(_read_cityscapes, tuple(only))
    return _problem("cityscapes", made, _entries(Path(root), "cityscape.json", 5), read, CITYSCAPES.crop, seed)


def taskonomy_list(root: str | Path, *, only: Sequence[str] = tuple(TASKONOMY.classes), seed: int = 0) -> Problem:
    """Load Tiny-Taskonomy at 256x256 from ``taskonomy.json``, with the class weights of ``semseg_prior_factor.npy``.

    Args:
        root: The folder with the list.
        only: Names of the tasks, in this order, of segmentation, normals, depth, keypoints and edges.
        seed: Of the choice of validation buildings.

    Raises:
        FileNotFoundError: The list, the weights or a file in the list is not there.
        ValueError: The list is not one, there is not one weight for each class, or a file is of a wrong kind.
    """
    folder, classes = Path(root), TASKONOMY.classes["segmentation"]
    factors = np.load(require(folder / "semseg_prior_factor.npy", LAYOUT)).reshape(-1)
    if len(factors) != classes:
        raise ValueError(f"root: needs {classes} class weights in semseg_prior_factor.npy, found {len(factors)}")
    weighted = functools.partial(
        tasks.segmentation, classes=classes, class_weights=torch.from_numpy(factors.astype(np.float32))
    )
    kinds: dict[str, Callable[..., tasks.Task]] = {"segmentation": weighted, "edges": tasks.keypoints}
    made = tasks.dense(TASKONOMY.classes, only, TASKONOMY.weights, kinds=kinds)
    entries = {
        split: [tuple(_exchanged(folder, path) for path in entry) for entry in listed]
        for split, listed in _entries(folder, "taskonomy.json", 6).items()
    }
    read = functools.partial(_read_taskonomy, tuple(only))
    return _problem("taskonomy", made, entries, read, TASKONOMY.crop, seed, group=lambda entry: entry[0].parent.name)


def _entries(root: Path, name: str, length: int) -> dict[str, list[Entry]]:
    """Read a list, and check its form."""
    listed = json.loads(require(root / name, LAYOUT).read_text(encoding="utf-8"))
    entries: dict[str, list[Entry]] = {}
    for split in ("train", "test"):
        found = listed.get(split) if isinstance(listed, Mapping) else None
        if not isinstance(found, list) or not found:
            raise ValueError(f"root: needs a list of samples under {split!r} in {root / name}, found none; {LAYOUT}")
        if wrong := [entry for entry in found if not isinstance(entry, list) or len(entry) != length]:
            raise ValueError(f"root: needs {length} files for each sample of {root / name}, found {wrong[0]}; {LAYOUT}")
        entries[split] = [tuple(root / path for path in entry) for entry in found]
    return entries


def _exchanged(root: Path, path: Path) -> Path:
    """Turn ``building/rgb/x.png`` into ``rgb/taskonomy/building/x.png``."""
    building, domain, *rest = path.relative_to(root).parts
    return root.joinpath(domain, "taskonomy", building, *rest)


def _problem(
    name: str,
    made: tuple[tasks.Task, ...],
    entries: Mapping[str, list[Entry]],
    read: Callable[[Entry], Sample],
    crop: int,
    seed: int,
    group: Callable[[Entry], object] = lambda entry: entry,
) -> Problem:
    """Make the splits; what is of one group is in one split."""
    groups = list(dict.fromkeys(map(group, entries["train"])))
    _, held = carve(len(groups), 0.1, seed)
    validating = {groups[i] for i in held.tolist()}
    splits = {
        "train": OnDisk([entry for entry in entries["train"] if group(entry) not in validating], read, Augment(crop)),
        "validation": OnDisk([entry for entry in entries["train"] if group(entry) in validating], read),
        "test": OnDisk(entries["test"], read),
    }
    facts = {"source": "the archive of the paper's experiments", "split": f"{sizes(splits)}; validation by seed {seed}"}
    return Problem(name, made, **splits, shape=(3, crop, crop), facts=facts)


def _read_nyuv2(only: Sequence[str], centred: bool, entry: Entry) -> Sample:
    picture = _png(entry[0], 3)
    targets = {}
    if "segmentation" in only:
        targets["segmentation"] = _png(entry[1], 1)[0].long()
    if "normals" in only:
        stored = _png(entry[2], 3)
        vectors = 2 * stored / 255 - 1 if centred else stored.flip(0)
        targets["normals"] = torch.where(stored.amax(0) < 255, F.normalize(vectors, dim=0), 0.0)
    if "depth" in only:
        targets["depth"] = _one_channel(entry[3])
    return picture / 255, _as_large(targets, picture, entry[0])


def _read_cityscapes(only: Sequence[str], entry: Entry) -> Sample:
    array = np.load(require(entry[0], LAYOUT))
    if array.ndim != 3 or array.shape[-1] != 3:
        raise ValueError(f"root: needs shape (height, width, 3) in {entry[0]}, found {array.shape}; {LAYOUT}")
    picture = torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 0))).float()
    targets = {}
    if "segmentation" in only:
        labels = _one_channel(entry[4])[0].long()
        targets["segmentation"] = torch.where(labels < 0, IGNORE, labels)
    if "depth" in only:
        targets["depth"] = _one_channel(entry[1])
    return picture, _as_large(targets, picture, entry[0])


def _read_taskonomy(only: Sequence[str], entry: Entry) -> Sample:
    files = {name: require(path, LAYOUT) for name, path in zip(ORDER, entry, strict=True)}
    return read_views(only, TASKONOMY.test_size[0], files)


def _png(path: Path, channels: int) -> Tensor:
    """Read a picture as float32 ``(channels, height, width)``, in the numbers of the file."""
    with Image.open(require(path, LAYOUT)) as file:
        values = np.asarray(file)
    values = values[..., None] if values.ndim == 2 else values
    if values.shape[-1] != channels:
        raise ValueError(f"root: needs {channels} channels in {path}, found {values.shape[-1]}; {LAYOUT}")
    return torch.from_numpy(np.moveaxis(values, -1, 0).astype(np.float32))


def _one_channel(path: Path) -> Tensor:
    """Read ``(height, width)`` or ``(height, width, 1)`` as ``(1, height, width)``."""
    array = np.load(require(path, LAYOUT))
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if array.ndim != 2:
        raise ValueError(f"root: needs shape (height, width) or (height, width, 1) in {path}, found {array.shape}")
    return torch.from_numpy(np.ascontiguousarray(array)).float()[None]


def _as_large(targets: dict[str, Tensor], picture: Tensor, path: Path) -> dict[str, Tensor]:
    for task, target in targets.items():
        if target.shape[-2:] != picture.shape[-2:]:
            raise ValueError(
                f"root: needs {task} as large as the image {path}, {tuple(picture.shape[-2:])}, found "
                f"{tuple(target.shape[-2:])}; {LAYOUT}"
            )
    return targets
