"""Tiny files in the layouts of real data sets, written by the tests that load them."""

import gzip
import struct

import numpy as np
from PIL import Image

ROOM_COUNTS = {"train": 12, "val": 5, "test": 4}


def write_idx(path, array):
    """Write a uint8 array in the format of MNIST: two zero bytes, type 8, the axes, their lengths, the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_digits(root, *, train=36, test=14):
    """Write MNIST and FashionMNIST whose pictures are one grey level, their number; the test set goes on counting.

    So a pixel says which picture it is from. The class of a picture is its number modulo 10.
    """
    for name in ("MNIST", "FashionMNIST"):
        for split, first, count in (("train", 1, train), ("t10k", 1 + train, test)):
            numbers = np.arange(first, first + count)
            pictures = np.broadcast_to(numbers[:, None, None], (count, 28, 28))
            write_idx(root / name / "raw" / f"{split}-images-idx3-ubyte", pictures)
            write_idx(root / name / "raw" / f"{split}-labels-idx1-ubyte", numbers % 10)


def write_yeast(root, *, samples=60, columns=(103, 14)):
    """Write random features, and labels of which the last is rare."""
    generator = np.random.default_rng(0)
    features = generator.normal(3.0, 2.0, (samples, columns[0]))
    labels = generator.random((samples, columns[1])) < 0.4
    labels[:, -1] = np.arange(samples) % 10 == 0
    names = [f"Att{i + 1}" for i in range(columns[0])] + [f"Class{i + 1}" for i in range(columns[1])]
    lines = [",".join(names)]
    lines += [
        ",".join([*map(repr, map(float, x)), *map(str, y)]) for x, y in zip(features, labels.astype(int), strict=True)
    ]
    (root / "yeast").mkdir(parents=True, exist_ok=True)
    with gzip.open(root / "yeast" / "yeast.csv.gz", "wt") as file:
        file.write("\n".join(lines))
    return features, labels


def write_rooms(root, *, size=8, leave_out=()):
    """Write three files of random rooms; returns the arrays by the name of the split."""
    (root / "rooms").mkdir(parents=True, exist_ok=True)
    made = {}
    for seed, (split, count) in enumerate(ROOM_COUNTS.items()):
        generator = np.random.default_rng(seed)
        shape = (count, size, size)
        arrays = {
            "rgb": generator.integers(0, 256, (*shape, 3), dtype=np.uint8),
            "seg": generator.integers(0, 14, shape, dtype=np.uint8),
            "depth": generator.uniform(0.3, 7.0, shape).astype(np.float16),
            "normal": generator.normal(size=(*shape, 3)).astype(np.float16),
            "edge": generator.random(shape) < 0.1,
            "kp": generator.uniform(0.0, 0.1, shape).astype(np.float16),
        }
        made[split] = {name: array for name, array in arrays.items() if name not in leave_out}
        np.savez(root / "rooms" / f"rooms{size}_{split}.npz", **made[split])
    return made


def write_arrays(root, name, *, size=(12, 16), counts=(10, 3), classes=4, label="label", normals=True):
    """Write ``train`` and ``val`` folders of .npy files; every value says which sample it is from.

    Of sample i of a split, the picture is i / 100 everywhere, the depth i + 1, the normal points along x, and the label
    is i modulo the classes; the left half of all labels is unknown.
    """
    for split, count in zip(("train", "val"), counts, strict=True):
        for i in range(count):
            labels = np.full(size, i % classes, dtype=np.int64)
            labels[:, : size[1] // 2] = -1
            arrays = {"image": np.full((*size, 3), i / 100), label: labels, "depth": np.full((*size, 1), i + 1.0)}
            if normals:
                arrays["normal"] = np.broadcast_to(np.array([1.0, 0.0, 0.0]), (*size, 3))
            for folder, array in arrays.items():
                place = root / name / split / folder
                place.mkdir(parents=True, exist_ok=True)
                np.save(place / f"{i}.npy", array)


def write_taskonomy(root, *, buildings=None, size=8, between=""):
    """Write two views of each building: ``{name: split}``, splits as in the csv file's columns."""
    buildings = buildings or {"one": "train", "two": "train", "three": "val", "four": "test"}
    normals = np.zeros((size, size, 3), dtype=np.uint8)
    normals[..., 0], normals[..., 1], normals[..., 2] = 255, 127, 127  # along x
    normals[0] = 127  # no direction
    depth = np.full((size, size), 1023, dtype=np.uint16)
    depth[-1] = 65_535  # nothing in sight
    domains = {
        "rgb": ("rgb", np.full((size, size, 3), 51, dtype=np.uint8)),
        "segment_semantic": ("segmentsemantic", np.repeat(np.arange(size, dtype=np.uint8)[:, None], size, axis=1)),
        "normal": ("normal", normals),
        "depth_zbuffer": ("depth_zbuffer", depth),
        "keypoints2d": ("keypoints2d", np.full((size, size), 65_536 * 0.0025, dtype=np.uint16)),
        "edge_texture": ("edge_texture", np.full((size, size), 65_535, dtype=np.uint16)),
    }
    lines = ["id,train,val,test"]
    for building, split in buildings.items():
        lines.append(",".join([building, *(str(int(split == column)) for column in ("train", "val", "test"))]))
        for folder, (domain, array) in domains.items():
            place = root / "taskonomy" / folder / between / building
            place.mkdir(parents=True, exist_ok=True)
            for view in range(2):
                Image.fromarray(array).save(place / f"point_{view}_view_1_domain_{domain}.png")
    (root / "taskonomy" / "train_val_test_tiny.csv").write_text("\n".join(lines))
