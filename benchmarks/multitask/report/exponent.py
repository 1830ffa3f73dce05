"""What validation says of the exponent of the damped saliency."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import mean

from ..problem.relative import Interval
from ..pruning.methods import EXPONENTS, TUNED_AT
from ..runs import TUNING_SEED
from .names import title
from .results import Result
from .tables import markdown

RULES = ("DiSparse damped", "shares, damped")  # each with an exponent


def validated(results: Sequence[Result], method: str, setting: str) -> dict[int, float]:
    """Return what a method reached on the validation split of a setting, mean over the tasks, by seed.

    Of the seed that learning rates are chosen on, what the best of them reached.
    """
    found: dict[int, float] = {}
    for result in results:
        if result.name == setting:
            if method in result.rates:
                found[TUNING_SEED] = max(result.rates[method].values())
            changes = result.summary.changes(method, TUNED_AT, "validation")
            found.update({seed: change.mean for seed, change in changes.items()})
    return found


def paragraphs(results: Sequence[Result], validation: Sequence[Result], settings: Sequence[str]) -> Iterator[str]:
    """The part of the page on the exponent."""
    yield "## The exponent"
    yield (
        "Mean change over the tasks on validation, at 98 %, in % of the dense network: means over all seeds that both "
        "exponents were run with, reported or not, and the paired difference with its 95 % interval; the better mean "
        "over the settings in bold. Of all four, shares with the smaller exponent did best, and are the default. Seeds "
        "beyond 1000 were run for this alone, and their test split was never measured. The default was changed when "
        "these numbers, and those of the test split of the settings run on a card, were known; runs on other machines "
        "came later."
    )
    everything = [*results, *validation]
    rows = []
    for rule in RULES:
        names = [f"{rule} {exponent}" for exponent in EXPONENTS]
        levels: list[list[float]] = [[] for _ in names]
        for setting in settings:
            by_seed = [validated(everything, name, setting) for name in names]
            seeds = sorted(set.intersection(*(set(values) for values in by_seed)))
            if not seeds:
                continue
            means = [mean(values[seed] for seed in seeds) for values in by_seed]
            for column, value in zip(levels, means, strict=True):
                column.append(value)
            difference = Interval([by_seed[0][seed] - by_seed[-1][seed] for seed in seeds])
            rows.append([rule, title(setting), str(len(seeds)), *(f"{value:.1f}" for value in means), str(difference)])
        if not all(levels):
            continue
        overall = [mean(column) for column in levels]
        cells = [f"**{value:.1f}**" if value == max(overall) else f"{value:.1f}" for value in overall]
        rows.append([rule, "all", "", *cells, f"{overall[0] - overall[-1]:.1f}"])
    columns = [f"exponent {exponent}" for exponent in EXPONENTS]
    yield markdown(["rule", "setting", "seeds", *columns, f"{EXPONENTS[0]} ahead by"], rows, len(EXPONENTS) + 2)
