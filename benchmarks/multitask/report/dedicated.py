"""The page on sparse networks against dedicated multi-task methods, and on tickets at what they cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from ..pruning.methods import DENSE
from ..runs import Run, Store, best_rate
from .names import title
from .paired import Key, compare, confirmed, differences, said, table
from .results import KnownTask
from .summary import Summary
from .tables import percent

HEAD = """# Against dedicated methods

Written by `benchmarks/dedicated.py --page` from the runs in `benchmarks/results/dedicated`. The rules are those of the
other [results](accuracy.md): learning rates by validation on seeds that are not reported, here for every method at
every amount; the test split is measured once. These are small networks and few seeds, most of them trained shortly: a
first look, not a verdict. Changes are in % of the dense network of the same seed, trained and tuned on the plain sum of
the losses; intervals are 95 %, of Student's t; a difference *wins* or *loses* where its p-value is below 0.05 after
Holm's correction over its table. Two numbers with a slash are the mean over the tasks and the task that lost most. The
latter is a minimum over noisy tasks: below zero for any second network, and the more so the less it has in common with
the dense one. Compare it between pruned networks, never with zero."""

NOTES = {
    "yeast": """The networks pruned beside dense ones were measured twice on the test split: when four seeds had been
seen, none of their differences significant, the learning rates of tuning turned out to be noise by one seed, and were
chosen by three for new runs. Only these are here. Five seeds had been looked at when the last three came,
as planned;
the averages over rules, at the end, took the place of a table of single rules then.""",
}

BALANCED = """### Pruned and trained on the sum, or dense and balanced?

All networks are trained for as many steps. In the dense methods, torchjd's aggregators combine the tasks' gradients of
the shared trunk, and each head follows its own task. The pruned networks were trained on the plain sum, cut once, and
tuned in a second course, in which the learning rate rises and falls again; so was the dense network that changes are
relative to. The line *plain sum* says what a single course is worth by itself."""

AFTER = """### Both together: trained by {start}, then pruned

Dense networks are trained by {start}, cut once, and tuned on the plain sum; each against the same cut of a network that
the plain sum has trained, of as many steps."""

COSTLY = """### Tickets, rounds and windows, at their real cost and at equal cost

*Three cuts* prune in rounds and tune after each; *tuned longer* takes three times the steps of tuning in all. A
*lottery ticket* trains to the end, prunes by magnitude and goes back to early weights, three times. *Gradual* ones are
pruned while they are trained, until that share of all steps; SET, RigL and dynamic DiSparse move their masks while they
train, random ERK masks stay."""

ROUNDS = """### What rounds, longer tuning and pruning on the way buy

Each against one cut, averaged over the rules: with so few tests, differences can be seen that no single rule shows."""


LONG = "long"  # the folder of the runs that were trained longer


class Options(NamedTuple):
    """What the tables are about."""

    default: str  # the rule that all are compared with
    sparse: tuple[float, ...]  # pruned beside dense networks
    sparser: tuple[float, ...]  # where everything is pruned


def page(folder: Path, options: Options) -> Iterator[str]:
    """The whole page, in paragraphs."""
    yield HEAD
    for part, how in ((folder / LONG, ", trained longer"), (folder, "")):
        for setting in sorted({path.parent.name for path in part.glob("*/*/setting.json")}):
            yield f"## {title(setting)}{how}"
            if (part / "balanced" / setting).exists():
                yield from _balanced(part, setting, options)
            if (part / "costly" / setting).exists():
                yield from _costly(part, setting, options)


def _balanced(folder: Path, setting: str, options: Options) -> Iterator[str]:
    store = Store(folder / "balanced", setting)
    yield _told(store)
    yield from filter(None, [_converged(store, folder.parent / "long"), NOTES.get(setting)])
    summary = _summary(store, store.runs())
    dense, keys = [key for key in _keys(summary) if not key[1] and key[0] != DENSE.name], _keys(summary)
    yield BALANCED
    for amount in options.sparse:
        pruned = [key for key in keys if key[1] == amount]
        compared = compare(summary, ((key, (options.default, amount)) for key in [*dense, *pruned]))
        yield f"**{percent(amount)} pruned**"
        yield table(summary, [*dense, *pruned], compared)
        yield said(compared)
        yield confirmed(summary, pruned, dense, ("pruned network", "dense one"))
    yield "**The dense ones against the plain sum.** " + said(
        compare(summary, ((key, ("plain sum", 0.0)) for key in dense), views=["mean"])
    )
    for path in sorted(folder.glob(f"after-*/{setting}")):
        start = path.parent.name.removeprefix("after-")
        runs = [*store.runs(), *(_renamed(run, start) for run in Store(path.parent, setting).runs())]
        yield from _after(_summary(store, runs), start)


def _after(summary: Summary, start: str) -> Iterator[str]:
    prefix = f"{start}, then "
    after = [key for key in _keys(summary) if key[0].startswith(prefix)]
    compared = compare(summary, ((key, (key[0].removeprefix(prefix), key[1])) for key in after))
    yield AFTER.format(start=start)
    yield table(summary, after, compared)
    yield said(compared)


def _renamed(run: Run, start: str) -> Run:
    return replace(run, method=f"{start}, then tuned on the sum") if run.method == DENSE.name else run


def _costly(folder: Path, setting: str, options: Options) -> Iterator[str]:
    store = Store(folder / "costly", setting)
    yield _told(store)
    summary = _summary(store, store.runs())
    every = [key for key in _keys(summary) if key[1]]
    yield COSTLY
    for amount in options.sparser:
        keys = [key for key in every if key[1] == amount]
        compared = compare(summary, ((key, (f"{options.default}, one cut", amount)) for key in keys))
        yield f"**{percent(amount)} pruned**"
        yield table(summary, keys, compared)
        yield said(compared)
    rules = [name.removesuffix("one cut") for name, _ in _keys(summary) if name.endswith("one cut")]
    procedures = {name.removeprefix(rule) for name, _ in every for rule in rules if name.startswith(rule)}
    pairs = (((name, amount), ("one cut", amount)) for amount in options.sparser for name in sorted(procedures))
    compared = compare(summary, pairs, rules=list(dict.fromkeys(rules)))
    yield ROUNDS
    yield differences(compared)
    yield said(compared)


def _summary(store: Store, runs: Sequence[Run]) -> Summary:
    return Summary(runs, [KnownTask(**task) for task in store.setting_facts()["tasks"]])


def _keys(summary: Summary) -> list[Key]:
    """Return the methods and amounts in the order they were run."""
    return [*dict.fromkeys((run.method, run.amount) for run in summary.runs.values())]


def _converged(store: Store, longer: Path) -> str:
    """Say what dense networks reach on validation here and in the long regime, if that was run."""
    if not (longer / store.setting).exists():
        return ""
    here, there = (_dense_level(each.runs()) for each in (store, Store(longer, store.setting)))
    return (
        f"The dense network's first metric on validation, a mean over tasks and seeds, is {here:.3f} here, and "
        f"{there:.3f} [trained longer](results_long_regime.md)."
    )


def _dense_level(runs: Sequence[Run]) -> float:
    dense = [run.validation for run in runs if run.method == DENSE.name]
    return mean(next(iter(metrics.values())) for measured in dense for metrics in measured.values())


def _told(store: Store) -> str:
    seeds = len({run.seed for run in store.runs()})
    hours = sum(run.seconds for run in store.runs()) / 3600
    facts = store.setting_facts()
    budget: dict[str, Any] = facts["budget"]
    first, second = (", ".join(f"{rate:g}" for rate in budget[name]) for name in ("rates", "tune_rates"))
    tried = store.rates()[DENSE.name]
    more = set(map(float, tried)) - set(budget["rates"])
    dense = (
        f" The rate of the dense network that is pruned, {best_rate(tried):g}, is that of the long regime."
        if more
        else ""
    )
    return (
        f"{seeds} seeds of {budget['train']:,} + {budget['tune']} steps, {hours:.1f} hours of one core; learning rates "
        f"of whole trainings from {first} by one other seed, after a cut of a trained network from {second} by "
        f"{facts['rate seeds']}.{dense}"
    )
