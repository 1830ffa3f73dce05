"""Evaluate a checkpoint of the DiSparse authors on the archives that it was made for, by our metrics and theirs.

    python benchmarks/evaluate_checkpoint.py --data cityscapes-archive --root DATA --checkpoint FILE [--device cuda]

Prints a line of JSON: every metric on the test split, and which share of the weights is masked. ``paper_miou`` is the
mean IoU of their code. Angles of NYU-v2's normals are between directions of the bytes, as theirs
(:func:`multitask.data.paper_lists.nyuv2_list`). Not run here on the real files: they were not at hand.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from disparse_plugin.masks import masks_of
from models.authors_checkpoint import AuthorsInput, load_authors_checkpoint
from models.paper_network import PaperNetwork
from multitask.data.disk import MEAN, SPREAD
from multitask.data.paper_lists import nyuv2_list
from multitask.problem.dense_metrics import PaperIoU
from multitask.problem.problem import Problem, Task
from multitask.problem.tasks import IGNORE
from multitask.settings import SETTINGS
from multitask.training.bench import Bench

ARCHIVES = tuple(name for name in SETTINGS if name.endswith("-archive"))


def as_theirs(problem: Problem) -> Problem:
    """Add the authors' mean IoU to the metrics of the segmentation."""

    def added(task: Task) -> Task:
        def metrics() -> Any:
            collection = task.metrics()
            collection.add_metrics({"theirs": PaperIoU(task.outputs, IGNORE)})
            return collection

        return replace(task, metrics=metrics) if task.name == "segmentation" else task

    return replace(problem, tasks=tuple(map(added, problem.tasks)))


def evaluate(name: str, root: Path, checkpoint: Path, device: torch.device) -> dict[str, Any]:
    """Return the metrics of every task on the test split, and the share of the weights that is masked.

    Raises:
        ValueError: If the checkpoint does not fit the network of these tasks.
        FileNotFoundError: If data are not there.
    """
    setting = SETTINGS[name]
    if setting.load is nyuv2_list:
        setting = replace(setting, load=functools.partial(nyuv2_list, centred=False))
    problem = as_theirs(setting.load(root))
    bench = Bench(setting, problem, 0, 0.0, device)
    network = bench.initial()
    if not isinstance(network, PaperNetwork):
        raise TypeError(f"data: must be of the paper's network, found {type(network).__name__}")
    load_authors_checkpoint(network, checkpoint)
    weights = sum(value.numel() for name, value in network.named_parameters() if value.dim() == 4)
    masked = sum(int((~mask).sum()) for mask in masks_of(network).values())
    measured = bench.measure(AuthorsInput(network, MEAN, SPREAD).to(device), problem.test)
    return {"data": name, "checkpoint": str(checkpoint), "masked": masked / weights, **measured}


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=ARCHIVES, required=True)
    parser.add_argument("--root", type=Path, required=True, help="the folder with the list")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the authors' file")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    print(json.dumps(evaluate(options.data, options.root, options.checkpoint, torch.device(options.device))))


if __name__ == "__main__":
    main()
