"""The page on sparse networks against dedicated multi-task methods, and on tickets at what they cost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..problem.relative import Interval, holm
from ..pruning.methods import DENSE
from ..runs import Store
from .names import title
from .results import KnownTask
from .summary import Summary
from .tables import markdown, percent

HEAD = """# Against dedicated methods

Written by `benchmarks/dedicated.py --page` from the runs in `benchmarks/results/dedicated`. The rules are those of the
other [results](accuracy.md): learning rates by validation on a seed that is not reported, from the grids said below;
the test split is measured once. Few seeds of one small problem are a first look, not a verdict. Intervals are 95 %, of
Student's t; a difference *wins* or *loses* where its p-value is below 0.05 after Holm's correction over its table: of
the mean over the tasks / of the task that lost most.
"""


class Part(NamedTuple):
    """A table of the page."""

    folder: str
    reference: str  # the dense method that changes are relative to
    text: str


PARTS = (
    Part(
        "balanced",
        "plain sum",
        """## Pruned and trained on the sum, or dense and balanced?

All networks are trained for as many steps. In the dense methods, torchjd's aggregators combine the tasks' gradients of
the shared trunk, and each head follows its own task. The pruned networks were trained on the plain sum and cut once.
Changes in % of the dense network that the plain sum has trained in one course.""",
    ),
    Part(
        "costly",
        DENSE.name,
        """## Tickets and rounds, at their real cost and at equal cost

*Three cuts* prune in rounds and tune after each; *tuned longer* takes three times the steps of tuning in all. A
*lottery ticket* trains to the end, prunes by magnitude and goes back to early weights, three times. Changes in % of the
dense network.""",
    ),
)


class Line(NamedTuple):
    """A method at an amount: its changes, and how far it is ahead of the one all are compared with."""

    method: str
    amount: float
    steps: int
    ahead: tuple[Interval, ...]  # of the mean over the tasks, and of the worst; empty for the other itself


def lines(summary: Summary, other: tuple[str, float]) -> list[Line]:
    """Return the methods in the order they were run."""
    theirs = summary.changes(*other)
    found = {}
    for run in summary.runs.values():
        mine, key = summary.changes(run.method, run.amount), (run.method, run.amount)
        seeds = sorted(mine.keys() & theirs.keys())
        both = (Interval([getattr(mine[s], what) - getattr(theirs[s], what) for s in seeds]) for what in VIEWS)
        found.setdefault(key, Line(*key, run.steps, () if key == other else tuple(both)))
    return [*found.values()]


VIEWS = ("mean", "worst")


def table(summary: Summary, other: tuple[str, float]) -> str:
    """One line per method, compared with one of them; p-values are corrected over the table."""
    found = lines(summary, other)
    corrected = iter(holm([interval.p_value for line in found for interval in line.ahead]))
    rows = []
    for line in found:
        levels = [str(summary.interval(line.method, line.amount, what)) for what in VIEWS]
        words = " / ".join(interval.word(next(corrected)) for interval in line.ahead)
        ahead = " / ".join(map(str, line.ahead))
        rows.append([line.method, percent(line.amount), f"{line.steps:,}", *levels, ahead, words])
    name = f"{other[0]}, {percent(other[1])}"
    header = ["method", "pruned", "steps", "mean over tasks", "worst task", f"ahead of {name}", "verdict"]
    return markdown(header, rows, 6)


def page(folder: Path, others: dict[str, tuple[str, float]]) -> Iterator[str]:
    """The whole page, in paragraphs; ``others`` says by folder which method and amount all are compared with."""
    yield HEAD.rstrip()
    for part in PARTS:
        stores = [
            Store(folder / part.folder, path.parent.name) for path in (folder / part.folder).glob("*/setting.json")
        ]
        for store in sorted(stores, key=lambda store: store.setting):
            facts = store.setting_facts()
            tasks = [KnownTask(**task) for task in facts["tasks"]]
            summary = Summary(store.runs(), tasks, reference=part.reference)
            if summary.changes(*others[part.folder]):
                yield part.text
                yield f"**{title(store.setting)}**, {len(summary.seeds)} seeds; {_budget(facts['budget'])}."
                yield table(summary, others[part.folder])


def _budget(budget: dict[str, Any]) -> str:
    first, second = (", ".join(f"{rate:g}" for rate in budget[name]) for name in ("rates", "tune_rates"))
    return (
        f"{budget['train']} + {budget['tune']} steps; learning rates of whole trainings from {first}; after a cut of a "
        f"trained network from {second}"
    )
