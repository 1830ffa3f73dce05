"""What validation says of adding a tensor's mean to its gradients before the root is taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import mean

from ..problem.relative import Interval
from ..pruning.methods import EXPONENTS, MEAN_ADDED
from .names import title
from .results import Result
from .tables import markdown, percent

RULE = "shares, damped"  # with an exponent


def paragraphs(results: Sequence[Result]) -> Iterator[str]:
    """The part of the page; nothing where it was not tried."""
    if not results:
        return
    yield "## The tensor's mean, added"
    yield (
        "The damped saliency of a weight is `abs(w) * A^e`, with `A` the sum of the task's gradients, so all weights "
        "that no gradient reaches tie at zero. With the tensor's mean of `A` added before the power is taken, size "
        "tells them apart. Mean change over the tasks and the task that lost most, on *validation*, in % of the dense "
        "network, and the paired difference with its 95 % interval. The seeds were run for this alone, and their test "
        f"split was never measured. {_rate_seeds(results)}"
    )
    rows = []
    for result in results:
        for exponent in EXPONENTS:
            for amount in result.summary.amounts:
                rows += _row(result, f"{RULE} {exponent}", amount)
    header = ["setting", "rule", "pruned", "seeds", "mean", "with it", "ahead by", "worst task", "with it", "ahead by"]
    yield markdown(header, rows, 8)


def _row(result: Result, rule: str, amount: float) -> list[list[str]]:
    without, added = (result.summary.changes(name, amount, "validation") for name in (rule, rule + MEAN_ADDED))
    seeds = sorted(without.keys() & added.keys())
    if len(seeds) < 2:
        return []
    cells = [title(result.name), rule, percent(amount), str(len(seeds))]
    for what in ("mean", "worst"):
        values = [[getattr(changes[seed], what) for seed in seeds] for changes in (without, added)]
        cells += [f"{mean(column):.1f}" for column in values]
        cells.append(str(Interval([after - before for before, after in zip(*values, strict=True)])))
    return [cells]


def _rate_seeds(results: Sequence[Result]) -> str:
    counts = {title(result.name): result.facts.get("rate seeds", 1) for result in results}
    shown = ", ".join(f"{name}: {count}" for name, count in counts.items())
    return f"Learning rates were chosen at 98 %, on other seeds ({shown})."
