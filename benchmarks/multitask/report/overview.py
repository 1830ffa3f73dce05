"""All settings side by side: what was run, what was won and lost, and every method at one amount."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from .names import file_name, title
from .results import Result
from .summary import Summary
from .tables import by_method, markdown
from .verdict import Comparison, baselines, budgets, counts, twins

Side: TypeAlias = Callable[[Result], Summary]  # the runs of a setting that prune weights, or those that remove channels


def weights_of(result: Result) -> Summary:
    """The runs that prune weights."""
    return result.summary


def channels_of(result: Result) -> Summary:
    """The runs that remove whole channels."""
    return result.channels


# What is compared: a name, how to find the comparisons, and among which runs.
COMPARED: tuple[tuple[str, Callable[[Summary], Iterator[Comparison]], Side], ...] = (
    ("own scores against the summed loss", twins, weights_of),
    ("own scores against the best baseline", baselines, weights_of),
    ("floor, or budget per part, against none", budgets, weights_of),
    ("channels: own scores against the summed loss", twins, channels_of),
    ("channels: own scores against the best baseline", baselines, channels_of),
    ("channels: floor, or mean across layers, against neither", budgets, channels_of),
)


def what_was_run(results: Sequence[Result]) -> str:
    """One line per setting: its size and its price."""
    header = [
        "setting",
        "tasks",
        "loss weights",
        "prunable weights",
        "steps",
        "seeds",
        "runs",
        "hours of one core, without dense training",
    ]
    rows = []
    for result in results:
        budget = result.facts["budget"]
        rows.append(
            [
                f"[{title(result.name)}](accuracy/{file_name(result.name)}.md)",
                str(len(result.facts["tasks"])),
                result.loss_weights,
                f"{result.runs[0].weights:,}",
                f"{budget['train']} + {budget['tune']}",
                str(len(result.summary.seeds)),
                str(len(result.runs)),
                f"{result.hours:.1f}",
            ]
        )
    return markdown(header, rows, len(header) - 1)


def won_tied_lost(results: Sequence[Result]) -> str:
    """One line per setting, one column per kind of comparison: the mean over the tasks, then the worst task."""

    def cell(found: Sequence[Comparison]) -> str:
        return "; ".join(" / ".join(map(str, counts(found, what))) for what in ("mean", "worst")) if found else ""

    rows = [[title(result.name), *(cell([*find(side(result))]) for _, find, side in COMPARED)] for result in results]
    return markdown(["setting", *(name for name, _, _ in COMPARED)], rows, len(COMPARED))


def side_by_side(results: Sequence[Result], amount: float, what: str, side: Side = weights_of) -> str:
    """One line per method, one column per setting where the amount was run, with 95 % intervals; the best in bold.

    Empty where none was.
    """
    columns = {title(result.name): side(result).intervals(amount, what) for result in results}
    ran = {name: column for name, column in columns.items() if column}
    return by_method(ran) if ran else ""
