"""Tiny files in the layout of the archives that the paper's experiments used."""

import json

import numpy as np
from PIL import Image

from data_files import write_taskonomy

SIZE = (6, 8)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path)


def write_nyuv2(root, counts=(10, 3)):
    """Of sample i: grey 10 i, class i with an unknown left column, normals along x but for a white first row."""
    listed = {}
    for split, count in zip(("train", "test"), counts, strict=True):
        listed[split] = []
        for i in range(count):
            labels = np.full(SIZE, i, dtype=np.uint8)
            labels[:, 0] = 255
            normals = np.broadcast_to(np.array([254, 127, 127], dtype=np.uint8), (*SIZE, 3)).copy()
            normals[0] = 255
            names = [f"{split}/{kind}/{i}.png" for kind in ("img", "seg", "normal")] + [f"{split}/depth/{i}.npy"]
            arrays = [np.full((*SIZE, 3), 10 * i, dtype=np.uint8), labels, normals, np.full(SIZE, i + 1.0)]
            for name, array in zip(names, arrays, strict=True):
                save(root / name, array)
            listed[split].append(names)
    (root / "nyu_v2_3task.json").write_text(json.dumps(listed))


def write_cityscapes(root, counts=(10, 3)):
    """Of sample i: grey i / 100, inverse depth i, class i with an unknown left column; the other labels are all 9."""
    listed = {}
    for split, count in zip(("train", "test"), counts, strict=True):
        listed[split] = []
        for i in range(count):
            labels = np.full(SIZE, i, dtype=np.int64)
            labels[:, 0] = -1
            nine = np.full(SIZE, 9, dtype=np.int64)
            arrays = [np.full((*SIZE, 3), i / 100), np.full((*SIZE, 1), float(i)), nine, nine, labels]
            names = [f"{split}/{kind}/{i}.npy" for kind in ("image", "depth", "label_2", "label_7", "label_19")]
            for name, array in zip(names, arrays, strict=True):
                save(root / name, array)
            listed[split].append(names)
    (root / "cityscape.json").write_text(json.dumps(listed))


def write_taskonomy_list(root):
    """The files of the public layout under ``taskonomy``, listed with their first two parts exchanged."""
    write_taskonomy(root / "made", size=256, between="taskonomy")
    (root / "made" / "taskonomy").rename(root / "files")
    files = root / "files"
    listed = {"train": [], "test": []}
    domains = ("rgb", "segment_semantic", "normal", "depth_zbuffer", "keypoints2d", "edge_texture")
    for building in ("one", "two", "three", "four"):
        for view in range(2):
            paths = [next((files / d / "taskonomy" / building).glob(f"point_{view}_*")) for d in domains]
            entry = [f"{building}/{d}/{path.name}" for d, path in zip(domains, paths, strict=True)]
            listed["test" if building == "four" else "train"].append(entry)
    (files / "taskonomy.json").write_text(json.dumps(listed))
    np.save(files / "semseg_prior_factor.npy", np.linspace(0.5, 2.0, 17))
    return files
