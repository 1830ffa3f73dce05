"""All that was run of each setting, read back from the folder of runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..pruning.methods import DENSE, METHODS
from ..runs import Run, Store
from .summary import Summary


@dataclass(frozen=True)
class KnownTask:
    """A task as it is stored with the runs."""

    name: str
    better: dict[str, str]
    weight: float


@dataclass(frozen=True)
class Result:
    """One setting with all that was run of it."""

    facts: dict[str, Any]
    rates: dict[str, dict[str, float]]
    runs: list[Run]
    summary: Summary  # of the methods that prune weights
    channels: Summary  # of those that remove whole channels

    @property
    def name(self) -> str:
        """The setting's name."""
        return str(self.facts["name"])

    @property
    def loss_weights(self) -> str:
        """The tasks' loss weights as a ratio to the smallest, such as ``1:20``, or ``equal``."""
        weights = [task["weight"] for task in self.facts["tasks"]]
        return ":".join(f"{weight / min(weights):g}" for weight in weights) if len(set(weights)) > 1 else "equal"

    @property
    def hours(self) -> float:
        """Processor time of all runs, without the dense training that they share."""
        return sum(run.seconds for run in self.runs) / 3600


def load(folder: Path) -> list[Result]:
    """Read every setting that has finished dense runs."""
    results = []
    for path in sorted(folder.glob("*/setting.json")):
        store = Store(folder, path.parent.name)
        facts, runs = store.setting_facts(), store.runs()
        tasks = [KnownTask(**task) for task in facts["tasks"]]
        weights, channels = (
            Summary([run for run in runs if run.method == DENSE.name or removes_channels(run) == asked], tasks)
            for asked in (False, True)
        )
        if weights.dense and weights.methods:
            results.append(Result(facts, store.rates(), runs, weights, channels))
    return results


def load_some(folder: Path, script: str) -> list[Result]:
    """Read the settings, or end: a page made of no runs would take the place of one that has them.

    Raises:
        SystemExit: If there are no finished runs.
    """
    results = load(folder)
    if not results:
        raise SystemExit(f"results: needs finished runs under {folder}, found none; run {script} first")
    return results


def removes_channels(run: Run) -> bool:
    """Tell whether weights are gone in whole channels."""
    return METHODS[run.method].family == "channels"
