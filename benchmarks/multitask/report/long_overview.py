"""All settings of the long regime together: averages over the amounts, and each rule against each simple one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import mean
from typing import NamedTuple

from ..problem.relative import Interval, holm
from .names import title
from .results import Result
from .summary import Summary
from .tables import by_method, markdown, percent

LEVEL = 0.05


class Averaged(NamedTuple):
    """How much better a rule is than another in a setting, in points, averaged over the amounts."""

    setting: str
    what: str  # "mean" over the tasks, or the "worst" task
    interval: Interval
    corrected: float = 1.0  # p-value

    @property
    def word(self) -> str:
        """Wins, ties or loses."""
        if self.corrected >= LEVEL:
            return "ties"
        return "wins" if self.interval.mean > 0 else "loses"


def averaged(summary: Summary, method: str, other: str, amounts: Sequence[float], what: str) -> dict[int, float]:
    """Return by seed how much better a method is than another, averaged over the amounts; only complete seeds."""
    found = []
    for amount in amounts:
        first, second = summary.changes(method, amount), summary.changes(other, amount)
        both = first.keys() & second.keys()
        found.append({seed: getattr(first[seed], what) - getattr(second[seed], what) for seed in both})
    complete = set.intersection(*(set(each) for each in found)) if found else set()
    return {seed: mean(each[seed] for each in found) for seed in sorted(complete)}


def against(results: Sequence[Result], method: str, other: str, amounts: Sequence[float]) -> list[Averaged]:
    """Compare two methods in every setting; the p-values are corrected over all of these comparisons."""
    found = [
        Averaged(result.name, what, Interval([*values.values()]))
        for result in results
        for what in ("mean", "worst")
        if len(values := averaged(result.summary, method, other, amounts, what)) > 1
    ]
    corrected = holm([line.interval.p_value for line in found])
    return [line._replace(corrected=p) for line, p in zip(found, corrected, strict=True)]


def overall(results: Sequence[Result], method: str, other: str, amounts: Sequence[float], what: str) -> Interval | None:
    """Return the difference averaged over all settings too, with an interval over the seeds that all have."""
    found = [averaged(result.summary, method, other, amounts, what) for result in results]
    found = [each for each in found if each]
    if not found or not (seeds := set.intersection(*(set(each) for each in found))):
        return None
    return Interval([mean(each[seed] for each in found) for seed in sorted(seeds)])


def matrix(results: Sequence[Result], methods: Sequence[str], others: Sequence[str], amounts: Sequence[float]) -> str:
    """One line per rule and simple rule: the settings won, tied and lost, and the difference over all of them."""
    rows = []
    for method in methods:
        for other in others:
            found = against(results, method, other, amounts)
            if method == other or not found:
                continue
            cells = []
            for what in ("mean", "worst"):
                words = [line.word for line in found if line.what == what]
                cells += [
                    str(overall(results, method, other, amounts, what) or ""),
                    " / ".join(str(words.count(word)) for word in ("wins", "ties", "loses")),
                ]
            rows.append([method, other, *cells])
    header = ["method", "against", "mean over tasks", "won / tied / lost", "worst task", "won / tied / lost"]
    return markdown(header, rows, 4)


def by_setting(results: Sequence[Result], amounts: Sequence[float], what: str) -> str:
    """One line per method, one column per setting, averaged over the amounts; the best in bold."""
    columns = {}
    for result in results:
        names = [method.name for method in result.summary.methods]
        values = {name: _level(result.summary, name, amounts, what) for name in names}
        column = {name: Interval(value) for name, value in values.items() if value}
        if column:
            columns[title(result.name)] = column
    return by_method(columns) if columns else ""


def _level(summary: Summary, name: str, amounts: Sequence[float], what: str) -> list[float]:
    found = [summary.changes(name, amount) for amount in amounts]
    complete = set.intersection(*(set(each) for each in found))
    return [mean(getattr(each[seed], what) for each in found) for seed in sorted(complete)]


def paragraphs(
    results: Sequence[Result], methods: Sequence[str], others: Sequence[str], amounts: Sequence[float]
) -> Iterator[str]:
    """The part of the page on all settings."""
    which = ", ".join(percent(amount) for amount in amounts)
    yield "## All settings together"
    yield f"Averages over {which} pruned. The mean over the tasks, in % of the dense network:"
    yield by_setting(results, amounts, "mean")
    yield "The task that lost most:"
    yield by_setting(results, amounts, "worst")
    yield (
        "Each rule against each simple one: the paired difference in points over all settings, then in how many "
        "settings it wins, ties and loses (corrected over the settings, mean and worst task)."
    )
    yield matrix(results, [*methods, "LAMP with reach"], others, amounts)
