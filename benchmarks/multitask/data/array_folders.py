"""Data sets as folders of ``.npy`` files: ``<split>/image/0.npy``, ``<split>/label/0.npy``, ``<split>/depth/0.npy`` ...

This is how the authors of MTAN (Liu, Johns and Davison, CVPR 2019) publish NYU-v2 and Cityscapes, and most multi-task
papers since use these files. Arrays have their channels last.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..problem.problem import Problem, Task
from ..problem.tasks import IGNORE
from .disk import Augment, OnDisk, Sample
from .files import require
from .splits import carve, sizes

CHANNELS = {"depth": 1, "normals": 3}
TRAIN, TEST = "train", "val"  # the folders; what they call val is the only other one, so it is the test split here


class ArrayFolder:
    """Reads one sample from the folders of a split.

    Args:
        folder: With one folder per kind of file.
        folders: Task name to the name of its folder.
        classes: Of the segmentation; other labels than 0 to classes - 1 are refused, but for negative ones and 255,
            which say that nothing is known.
        layout: What should lie where; part of errors.
    """

    def __init__(self, folder: Path, folders: Mapping[str, str], classes: int, layout: str) -> None:
        self.folder, self.folders, self.classes, self.layout = folder, dict(folders), classes, layout

    def names(self) -> list[str]:
        """Return the names of the samples, by number, after checking that every folder has them all."""
        names = {path.stem for path in require(self.folder / "image", self.layout).glob("*.npy")}
        if not names:
            raise FileNotFoundError(f"root: needs .npy files in {self.folder / 'image'}, found none; {self.layout}")
        for name in self.folders.values():
            there = {path.stem for path in require(self.folder / name, self.layout).glob("*.npy")}
            if missing := names - there:
                raise FileNotFoundError(
                    f"root: needs {self.folder / name / min(missing)}.npy, found no such file ({len(missing)} are "
                    f"missing); {self.layout}"
                )
        return sorted(names, key=lambda name: (len(name), name))

    def __call__(self, name: str) -> Sample:
        """Read one sample."""
        picture = self._load("image", name, 3)
        scale = 255.0 if picture.dtype == np.uint8 else 1.0
        pixels = _channels_first(picture) / scale
        targets = {}
        for task, folder in self.folders.items():
            array = self._load(folder, name, CHANNELS.get(task, 0))
            if array.shape[:2] != picture.shape[:2]:
                raise ValueError(
                    f"root: needs {folder}/{name}.npy in {self.folder} to be as large as its image, "
                    f"{picture.shape[:2]}, found {array.shape[:2]}; {self.layout}"
                )
            targets[task] = self._labels(array, folder, name) if task == "segmentation" else _channels_first(array)
        return pixels, targets

    def _load(self, folder: str, name: str, channels: int) -> npt.NDArray[np.generic]:
        path = self.folder / folder / f"{name}.npy"
        array: npt.NDArray[np.generic] = np.load(path)
        if channels == 1 and array.ndim == 2:
            array = array[..., None]
        if array.ndim != 2 + (channels > 0) or (channels and array.shape[-1] != channels):
            expected = f"(height, width, {channels})" if channels else "(height, width)"
            raise ValueError(f"root: needs shape {expected} in {path}, found {array.shape}; {self.layout}")
        return array

    def _labels(self, array: npt.NDArray[np.generic], folder: str, name: str) -> Tensor:
        labels = torch.from_numpy(np.ascontiguousarray(array)).long()
        labels[labels < 0] = IGNORE
        if (found := _largest(labels)) >= self.classes:
            raise ValueError(
                f"classes: needs labels below {self.classes} in {self.folder / folder / name}.npy, found {found}; "
                "give the number of classes of these files"
            )
        return labels


def array_splits(
    root: Path, folders: Mapping[str, str], *, classes: int, layout: str, augment: Augment, share: float, seed: int
) -> dict[str, OnDisk[str]]:
    """Make the splits: ``share`` of the folder ``train`` validates, the folder ``val`` tests."""
    readers = {folder: ArrayFolder(root / folder, folders, classes, layout) for folder in (TRAIN, TEST)}
    names = readers[TRAIN].names()
    rest, held = carve(len(names), share, seed)
    return {
        "train": OnDisk([names[i] for i in rest.tolist()], readers[TRAIN], augment),
        "validation": OnDisk([names[i] for i in held.tolist()], readers[TRAIN]),
        "test": OnDisk(readers[TEST].names(), readers[TEST]),
    }


def array_problem(
    root: Path,
    made: tuple[Task, ...],
    folders: Mapping[str, str],
    *,
    title: str,
    classes: int,
    layout: str,
    crop: int,
    share: float,
    seed: int,
) -> Problem:
    """Make a problem of such folders, called as ``root`` is; training pictures are augmented and cropped."""
    splits = array_splits(root, folders, classes=classes, layout=layout, augment=Augment(crop), share=share, seed=seed)
    facts = {
        "source": f"{title} in MTAN's layout, {classes} classes",
        "split": f"{sizes(splits)}; validation from the folder train by seed {seed}, test is the folder val",
    }
    return Problem(root.name, made, **splits, shape=(3, crop, crop), facts=facts)


def _channels_first(array: npt.NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 0))).float()


def _largest(labels: Tensor) -> int:
    known = labels[labels != IGNORE]
    return int(known.max()) if len(known) else -1
