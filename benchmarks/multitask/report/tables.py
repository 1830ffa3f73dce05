"""Markdown tables of a summary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from ..problem.relative import Interval
from ..pruning.methods import METHODS
from ..runs import best_rate
from .summary import Summary
from .verdict import Comparison


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: int) -> str:
    """Write a table whose last ``numbers`` columns are aligned to the right."""
    rule = ["---"] * (len(header) - numbers) + ["---:"] * numbers
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *rows])


def percent(amount: float) -> str:
    """Format a share without needless zeros: 0.995 as 99.5%."""
    return f"{100 * amount:g}%"


def by_amount(summary: Summary, what: str) -> str:
    """One line per method, one column per amount: ``"mean"`` (Delta_m) or ``"worst"``, with the 95 % interval."""
    return by_method({percent(amount): summary.intervals(amount, what) for amount in summary.amounts})


def by_method(columns: Mapping[str, Mapping[str, Interval]]) -> str:
    """One line per method that is in any of the columns, ``{title: {method: interval}}``; the best of each in bold."""
    best = {title: max(column, key=lambda name: column[name].mean) for title, column in columns.items()}

    def cells(name: str) -> Iterator[str]:
        for title, column in columns.items():
            text = str(column.get(name, ""))
            yield f"**{text}**" if name == best[title] else text

    ran = [method for method in METHODS.values() if any(method.name in column for column in columns.values())]
    rows = [[method.name, method.family, *cells(method.name)] for method in ran]
    return markdown(["method", "family", *columns], rows, len(columns))


def details(summary: Summary, amount: float) -> str:
    """Everything about one amount: changes per task, where the weights went, what training took."""
    tasks = [task.name for task in summary.tasks]
    shown = tasks if len(tasks) <= 5 else []
    header = ["method", "Delta_m", "worst task", *shown, "shared pruned", "own pruned", "emptied", "steps"]
    rows = []
    for method in summary.methods:
        found = summary.changes(method.name, amount)
        if not found:
            continue
        shared, own = summary.sparsity(method.name, amount)
        steps = next(run.steps for run in summary.runs.values() if run.method == method.name)
        rows.append(
            [
                method.name,
                str(summary.interval(method.name, amount, "mean")),
                str(summary.interval(method.name, amount, "worst")),
                *(str(Interval([change.by_task[task] for change in found.values()])) for task in shown),
                f"{shared:.1%}",
                f"{own:.1%}",
                f"{summary.emptied(method.name, amount):.1f}",
                str(steps),
            ]
        )
    return markdown(header, rows, len(header) - 1)


def dense_metrics(summary: Summary) -> str:
    """The dense network's metrics on the test split."""
    rows = [
        [task.name, metric, direction, str(_Plain([run.test[task.name][metric] for run in summary.dense.values()]))]
        for task in summary.tasks
        for metric, direction in task.better.items()
    ]
    return markdown(["task", "metric", "better", "dense"], rows, 1)


class _Plain(Interval):
    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.half:.2g}"


def comparisons(found: Iterable[Comparison]) -> str:
    """One line per comparison, with both paired differences in points."""
    header = ["method", "against", "pruned", "mean over tasks", "worst task", "verdict (mean / worst)"]
    rows = [
        [line.method, line.other, percent(line.amount), str(line.mean), str(line.worst), line.verdict] for line in found
    ]
    return markdown(header, rows, 4)


def learning_rates(tried: dict[str, dict[str, float]]) -> str:
    """The validation score of every learning rate that was tried."""
    rates = sorted({rate for scores in tried.values() for rate in scores}, key=float)
    rows = []
    for name in METHODS:
        if name in tried:
            best = best_rate(tried[name])
            cells = [f"{tried[name][rate]:.1f}" if rate in tried[name] else "" for rate in rates]
            rows.append(
                [
                    name,
                    *(f"**{cell}**" if float(rate) == best else cell for rate, cell in zip(rates, cells, strict=True)),
                ]
            )
    return markdown(["method", *rates], rows, len(rates))
