"""Tiny files in the layouts of real data sets, written by the tests that load them."""

import gzip
import struct

import numpy as np

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
