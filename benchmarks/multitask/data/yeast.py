"""Yeast: 14 functional groups of 2,417 genes, told from 103 numbers (Elisseeff and Weston, NeurIPS 2001).

Every group is a binary task, and all tasks share the inputs. Groups are of very different size, and all are kept, the
rarest too. The splits are stratified over all labels, so that each has its share of every label's positives; how many
that leaves of the rarest label is said in ``facts``. The metrics are those that mean something for rare labels (see
``tasks.binary``). A single rare label is still a noisy measure: read the mean over tasks first.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..problem.problem import Problem
from ..problem.tasks import binary
from .files import FETCH, require
from .splits import InMemory, channel_statistics, sizes
from .stratify import stratify

FEATURES, LABELS = 103, 14
SHARES = {"train": 0.6, "validation": 0.2, "test": 0.2}


def yeast(root: str | Path, *, seed: int = 0) -> Problem:
    """Load the yeast problem.

    Args:
        root: The folder with ``yeast/yeast.csv.gz``.
        seed: Of the division into 60 % training, 20 % validation and 20 % test samples.

    Returns:
        Tasks ``class1`` to ``class14`` over inputs ``(103,)``, every feature scaled to mean 0 and deviation 1 of the
        training split.

    Raises:
        FileNotFoundError: The file is not there.
        ValueError: It holds something else.
    """
    path = Path(root) / "yeast" / "yeast.csv.gz"
    layout = (
        f"it is river/datasets/yeast.csv.gz of the wheel of PyPI river==0.26.1; `{FETCH} {root}` takes it from there"
    )
    table = _read(require(path, layout))
    features, labels = torch.from_numpy(table[:, :FEATURES]).float(), torch.from_numpy(table[:, FEATURES:] == 1)
    parts = dict(
        zip(SHARES, map(torch.from_numpy, stratify(labels.numpy(), tuple(SHARES.values()), seed)), strict=True)
    )
    mean, spread = channel_statistics(features[parts["train"]])
    splits = {split: InMemory(features[which], _targets(labels[which]), mean, spread) for split, which in parts.items()}
    rarest = int(labels.sum(0).argmin())
    found = ", ".join(f"{int(labels[which, rarest].sum())} in {split}" for split, which in parts.items())
    facts = {
        "source": "MULAN's yeast, from the wheel of PyPI river 0.26.1",
        "split": f"{sizes(splits)}; stratified over all labels; seed {seed}",
        "rare": f"the rarest label, class{rarest + 1}, has {found}",
    }
    tasks = tuple(binary(f"class{label + 1}") for label in range(LABELS))
    return Problem(
        "yeast",
        tasks,
        **splits,
        shape=(FEATURES,),
        facts=facts,
    )


def _targets(labels: Tensor) -> dict[str, Tensor]:
    return {f"class{label + 1}": labels[:, label].contiguous() for label in range(labels.shape[1])}


def _read(path: Path) -> npt.NDArray[np.float64]:
    with gzip.open(path, "rt", encoding="ascii") as lines:
        names = next(lines).strip().split(",")
        expected = [f"Att{i + 1}" for i in range(FEATURES)] + [f"Class{i + 1}" for i in range(LABELS)]
        if names != expected:
            raise ValueError(
                f"root: needs the columns Att1 to Att{FEATURES} and Class1 to Class{LABELS} in {path}, found "
                f"{len(names)} columns from {names[0]} to {names[-1]}; fetch the file again"
            )
        return np.loadtxt(lines, delimiter=",", ndmin=2)
