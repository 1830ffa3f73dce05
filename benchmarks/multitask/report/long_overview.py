"""All settings of the long regime together: levels, each rule against each simple one, and what validation said."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from ..problem.relative import Interval, holm
from ..runs import best_rate
from .names import title
from .results import Result
from .summary import Summary
from .tables import by_method, markdown, percent


class Averaged(NamedTuple):
    """How much better a rule is than another in a setting, in points, averaged over the amounts."""

    setting: str
    what: str  # "mean" over the tasks, or the "worst" task
    interval: Interval
    corrected: float = 1.0  # p-value

    @property
    def word(self) -> str:
        """Wins, ties or loses."""
        return self.interval.word(self.corrected)


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


def matrix(results: Sequence[Result], methods: Sequence[str], others: Sequence[str], amounts: Sequence[float]) -> str:
    """One line per rule and simple rule: the mean difference over the settings, and how many are won, tied and lost."""
    rows = []
    for method in methods:
        for other in others:
            found = against(results, method, other, amounts)
            if method == other or not found:
                continue
            cells = []
            for what in ("mean", "worst"):
                lines = [line for line in found if line.what == what]
                words = [line.word for line in lines]
                cells += [
                    f"{mean(line.interval.mean for line in lines):.1f}",
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


def differences(results: Sequence[Result], method: str, others: Sequence[str], amounts: Sequence[float]) -> str:
    """One line per setting: how much a method is ahead of each simple rule, mean over the tasks and worst task."""
    rows = []
    for result in results:
        cells = []
        for other in others:
            found = [line for line in against(results, method, other, amounts) if line.setting == result.name]
            cells.append(" / ".join(marked(line) for line in found))
        seeds = max(len(result.summary.changes(method, amount)) for amount in amounts)
        rows.append([title(result.name), str(seeds), *cells])
    return markdown(["setting", "seeds", *others], rows, len(others) + 1)


def in_short(
    results: Sequence[Result], method: str, others: Sequence[str], amount: float, staged: Sequence[Result], stages: str
) -> str:
    """One line per setting: how much a method is ahead of each simple rule, in the mean over the tasks alone.

    Args:
        results: All settings.
        method: The method.
        others: The simple rules.
        amount: How much is pruned.
        staged: What :func:`run_in_stages` found.
        stages: The method in stages: the last column says how far it is ahead of the method itself.
    """
    rows = [
        [
            title(result.name),
            str(len(result.facts["tasks"])),
            *(_ahead(results, result, method, other, amount) for other in others),
            _ahead(staged, result, stages, method, amount),
        ]
        for result in results
    ]
    return markdown(["setting", "tasks", *others, "in stages, against one cut"], rows, len(others) + 2)


def _ahead(results: Sequence[Result], result: Result, method: str, other: str, amount: float) -> str:
    found = [line for line in against(results, method, other, [amount]) if line.setting == result.name]
    return "".join(marked(line) for line in found if line.what == "mean")


def run_in_stages(results: Sequence[Result], fresh: Sequence[Result], method: str) -> list[Result]:
    """Return the settings that a method was run in, of those that have fresh seeds, these."""
    ran = {r.name: r for r in [*results, *fresh] if any(own.name == method for own in r.summary.methods)}
    return [ran[result.name] for result in results if result.name in ran]


def totals(results: Sequence[Result], method: str, others: Sequence[str], amounts: Sequence[float]) -> str:
    """Say in a sentence how often a method wins, ties and loses against all the simple rules together."""
    words = [line.word for other in others for line in against(results, method, other, amounts)]
    found = ", ".join(f"{word} {words.count(word)}" for word in ("wins", "ties", "loses"))
    return f"Of these {len(words)} comparisons it {found}."


def _words(results: Sequence[Result], method: str, others: Sequence[str], amount: float) -> str:
    """How often a method wins, ties and loses against others."""
    words = [line.word for o in others if o != method for line in against(results, method, o, [amount])]
    return " / ".join(str(words.count(word)) for word in ("wins", "ties", "loses")) if words else ""


def all_at_once(results: Mapping[float, Sequence[Result]], method: str, others: Sequence[str]) -> str:
    """Say how often a method wins and loses if all comparisons, at all amounts, are corrected as one family.

    Args:
        results: The settings that are compared at each amount.
        method: The method.
        others: What it is compared with.
    """
    found = [line for each, some in results.items() for o in others for line in against(some, method, o, [each])]
    corrected = holm([line.interval.p_value for line in found])
    words = [line._replace(corrected=p).word for line, p in zip(found, corrected, strict=True)]
    return (
        f"`{method}`: {len(found)} comparisons, mean and worst task counted apart. Corrected over all of them at once "
        f"it wins {words.count('wins')} and loses {words.count('loses')}."
    )


def hints(results: Sequence[Result], method: str, others: Sequence[str], amounts: Sequence[float]) -> str:
    """One line per comparison whose interval leaves out zero on the wrong side, significant or not."""
    rows = [
        [title(line.setting), percent(each), other, "mean" if line.what == "mean" else "worst task", marked(line)]
        for each in amounts
        for other in others
        for line in against(results, method, other, [each])
        if line.interval.mean < 0 and line.interval.p_value < 0.05
    ]
    return markdown(["setting", "pruned", "against", "by", "points"], rows, 1)


def counted(results: Sequence[Result], methods: Sequence[str], others: Sequence[str], amounts: Sequence[float]) -> str:
    """One line per rule, one column per amount: how often it wins, ties and loses against all the simple rules."""
    rows = [[method, *(_words(results, method, others, amount) for amount in amounts)] for method in methods]
    return markdown(["method", *map(percent, amounts)], rows, len(amounts))


def marked(line: Averaged) -> str:
    """Write the interval, in bold where it wins or loses."""
    return str(line.interval) if line.word == "ties" else f"**{line.interval}**"


def validated(folder: Path, names: Sequence[str]) -> str:
    """One line per method, one column per setting: what the best learning rate reached on validation, of one seed."""
    tried = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/rates.json"))}
    columns = {title(setting): scores for setting, scores in tried.items()}
    rows = []
    for name in names:
        cells = [f"{max(scores[name].values()):.1f}" if name in scores else "" for scores in columns.values()]
        if any(cells):
            rows.append([name, *cells])
    return markdown(["method", *columns], rows, len(columns))


def trained_long_enough(folder: Path) -> str:
    """One line per setting: the dense network's validation metrics on the way, as changes to those at the end."""
    rows, header = [], ["setting", "learning rate", "steps"]
    for path in sorted(folder.glob("*/curve.json")):
        looks = json.loads(path.read_text())
        rate = str(best_rate(json.loads((path.parent / "rates.json").read_text())["dense"]))
        steps = looks[-1]["step"]
        header = [*header[:3], *(percent(round(look["step"] / steps, 2)) for look in looks)]
        cells = (f"{look[rate] - looks[-1][rate]:.1f}" for look in looks)
        rows.append([title(path.parent.name), rate, f"{steps:,}", *cells])
    return markdown(header, rows, len(header) - 2)


def on_the_way(
    staged: Sequence[Result], default: str, window: str, simple: Sequence[str], amount: float
) -> Iterator[str]:
    """The part of the page on pruning in stages while training; nothing where that was not run.

    Args:
        staged: What :func:`run_in_stages` found.
        default: The rule that is cut by.
        window: When it is cut, as methods are named.
        simple: The simple rules, which cut once.
        amount: How much is pruned, where it is shown setting by setting.
    """
    if not staged:
        return
    yield f"### Pruned on the way, {percent(amount)}"
    yield (
        f"`{default}, {window}`: five stages until a half of the training, each scored on four batches, in as many "
        "steps altogether as the others take to train and to tune. (`GradualPruning` has this window by default, but "
        "more stages, scored on one batch each: see yeast, asked again.) How far it is ahead of one cut of the trained "
        "network, and of magnitude in the same stages, in points: mean over the tasks / worst task; bold where "
        "significant after correction over the settings. Settings that have fresh seeds (below) are shown by those. "
        "Stages were run on a CPU, also where the cuts, and the dense network of the same seed, are from a card."
    )
    stages, others = f"{default}, {window}", [default, "LAMP with reach", "magnitude", f"magnitude, {window}"]
    yield differences(staged, stages, others, [amount])
    yield (
        f"At every amount that it was run at, with the learning rate of {percent(amount)}: how often it wins, ties and "
        f"loses against all the simple rules cut once ({'; '.join(simple)}), and against the default cut once; and how "
        "often the default does, on the same settings and seeds."
    )
    amounts = sorted({run.amount for result in staged for run in result.runs if run.method == stages})
    ran = {each: [result for result in staged if result.summary.changes(stages, each)] for each in amounts}
    rows = [
        [method, called, *(_words(some, method, rivals, each) for each, some in ran.items())]
        for method, rivals, called in (
            (stages, simple, "simple rules"),
            (stages, [default], "the default, cut once"),
            (default, simple, "simple rules"),
        )
    ]
    yield markdown(["method", "against", *map(percent, ran)], rows, len(ran))
    yield " ".join(all_at_once(ran, method, simple) for method in (stages, default))


def paragraphs(
    results: Sequence[Result], methods: Sequence[str], default: str, others: Sequence[str], amount: float
) -> Iterator[str]:
    """The part of the page on all settings."""
    which = percent(amount)
    yield f"## All settings together, {which}"
    yield (
        f"At {which}, where the learning rates were chosen. At other amounts a rate chosen at {which} suits some "
        "methods less than others; the numbers further down say what one rate for all amounts does, not which rule is "
        "better there. The mean over the tasks, in % of the dense network:"
    )
    yield by_setting(results, [amount], "mean")
    yield "The task that lost most:"
    yield by_setting(results, [amount], "worst")
    yield f"### The default against what is simple, {which}"
    yield (
        f"How far `{default}`, what `disparse_pretrained` does by default, is ahead, in points: mean over the tasks / "
        "worst task, with 95 % intervals; bold where significant after correction over the settings."
    )
    yield differences(results, default, others, [amount])
    yield totals(results, default, others, [amount])
    yield f"### Every rule against what is simple, {which}"
    yield "The mean difference over the settings in points, and in how many of them it wins, ties and loses."
    yield matrix(results, methods, others, [amount])
    yield "### At every amount"
    yield (
        "How often each rule wins, ties and loses against all of the simple ones, over the settings, by the mean over "
        f"the tasks and by the worst task. One learning rate serves all amounts, that of {which}."
    )
    amounts = sorted({each for result in results for each in result.summary.amounts if each <= amount})
    yield counted(results, methods, others, amounts)
    yield all_at_once(dict.fromkeys(amounts, results), default, others)
    yield "Hints against it: where it is behind by more than the interval, significantly (bold) or not."
    yield hints(results, default, others, amounts)
    yield "Each rule against the default:"
    yield counted(results, [method for method in methods if method != default], [default], amounts)
