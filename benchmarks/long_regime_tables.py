"""Write the page on networks that were trained longer, and the README's table, from the runs of ``many_runs.py``.

    python benchmarks/long_regime_tables.py

No number is written by hand: tables, counts and the choice of the exponent come from the JSON lines.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from accuracy_tables import put, setting_in_words
from multitask.problem.relative import Interval, holm
from multitask.pruning.methods import EXPONENTS, METHODS, TUNED_AT
from multitask.report import exponent, hero, long_overview, mean_added, tables
from multitask.report.names import title
from multitask.report.results import Result, load_some
from multitask.report.summary import Summary
from multitask.runs import best_rate

ROOT = Path(__file__).parent.parent
KINDS = ("long", "chosen", "fresh", "own_rates", "mean_added/long")  # of runs; a page without one would lack rows
OLD_DEFAULT, DEFAULT = "DiSparse Taylor", "shares, damped 0.25"  # of disparse_pretrained
WINDOW = "gradual to 1/2"  # that of GradualPruning
STAGES = f"{DEFAULT}, {WINDOW}"
CHOSEN_ON = ("fashion+mnist", "fashion+mnist-adam-1-20", "yeast")  # exponents; other settings confirm
BASELINES = ("magnitude", "LAMP", "LAMP with reach", "adaptive Taylor, joint", "SNIP")

README_BEGIN = "<!-- accuracy: begin, written by benchmarks/long_regime_tables.py -->"
HEAD = """# Trained longer

In the [short runs](accuracy.md) networks are pruned after some hundred steps, when everything still moves. Here they
are trained longer before the cut, most of them ten times, and tuned for a fifth of that, as networks that people prune
are; each setting says how long.
Written by `benchmarks/long_regime_tables.py` from the runs in `benchmarks/results/long`; how to read the numbers is
under [Accuracy](accuracy.md), and how to run it under [Compare methods](guides/benchmark.md).

Rules: the learning rate of each method is the one that did best on the *validation* split of a seed that is not
reported, at 98 %. The default, *shares, damped 0.25*, is that of four rules which did best on validation, by the mean
over {chosen_on}. The test split chooses nothing.
A comparison *wins* or *loses* where its p-value (paired, Student's t) is below 0.05 after Holm's correction: over the
settings, for each two rules at an amount, where settings are shown together; over all comparisons of its table on a
setting's own part. So a comparison can win in one table and tie in another. The intervals are not corrected. With few
seeds that is a high bar, and an interval that leaves out zero is a hint.

* *DiSparse Taylor*: `criterion="taylor"`, the paper's rule. *DiSparse adaptive*: `"layer_adaptive(taylor)"`.
* *DiSparse damped e*: `"layer_adaptive(damped(taylor, e))"`, still the paper's rule.
* *Shares, damped e*: the same criterion with `arbiter="sum"`. *LAMP with reach*: `"lamp"` with `arbiter="sum"`.
* *Joint*: the same on the summed loss. *Adaptive* is layer-adaptive.
"""


class Paired(NamedTuple):
    """A method against another at one amount, in points: how much better, and with which corrected p-values."""

    method: str
    other: str
    amount: float
    mean: Interval
    worst: Interval
    corrected: tuple[float, float] = (1.0, 1.0)

    @property
    def words(self) -> tuple[str, str]:
        """Wins, ties or loses: by the mean over the tasks, and by the task that lost most."""
        intervals = (self.mean, self.worst)
        found = [interval.word(p) for interval, p in zip(intervals, self.corrected, strict=True)]
        return found[0], found[1]


def paired(summary: Summary, pairs: Sequence[tuple[str, str]]) -> list[Paired]:
    """Compare pairs of methods at every amount that both were run at, and correct over all of them."""
    found = []
    for method, other in pairs:
        for amount in summary.amounts:
            both = [summary.paired(method, other, amount, what) for what in ("mean", "worst")]
            if both[0] is not None and both[1] is not None:
                found.append(Paired(method, other, amount, both[0], both[1]))
    corrected = holm([interval.p_value for line in found for interval in (line.mean, line.worst)])
    return [
        line._replace(corrected=(corrected[2 * place], corrected[2 * place + 1])) for place, line in enumerate(found)
    ]


def comparison(found: Sequence[Paired]) -> Iterator[str]:
    """Count in a sentence, then one line per comparison; nothing where nothing was compared."""
    if not found:
        return
    words = list(zip(*(line.words for line in found), strict=True))
    counts = [", ".join(f"{word} {column.count(word)}" for word in ("wins", "ties", "loses")) for column in words]
    yield f"Of {len(found)} comparisons, mean over the tasks: {counts[0]}; worst task: {counts[1]}."
    rows = [
        [
            line.method,
            line.other,
            tables.percent(line.amount),
            str(line.mean),
            str(line.worst),
            " / ".join(f"{p:.2f}" for p in line.corrected),
            " / ".join(line.words),
        ]
        for line in found
    ]
    header = ["method", "against", "pruned", "mean over tasks", "worst task", "corrected p", "verdict (mean / worst)"]
    yield tables.markdown(header, rows, 5)


def setting_page(result: Result, candidates: Sequence[str], joint: Sequence[str]) -> Iterator[str]:
    """The part of one setting, in paragraphs."""
    summary = result.summary
    yield f"## {title(result.name)}"
    rates = sorted(float(rate) for rate in result.rates["dense"])
    highest = sum(best_rate(tried) == rates[-1] for tried in result.rates.values())
    note = f" The highest rate of the grid, {rates[-1]:g}, was best for {highest} of the methods." if highest else ""
    yield setting_in_words(result) + note
    for heading, what in (("Mean over the tasks", "mean"), ("Task that lost most", "worst")):
        yield f"### {heading}, {title(result.name)}"
        yield tables.by_amount(summary, what)
    yield "<details><summary>All comparisons, and the learning rates tried</summary>"
    yield "Against plain Taylor per task."
    yield from comparison(paired(summary, [(name, OLD_DEFAULT) for name in candidates]))
    yield "Against the summed loss."
    yield from comparison(paired(summary, [(m.name, m.twin) for m in summary.methods if m.twin]))
    yield "Against what is simple."
    others = [*BASELINES, *joint]
    yield from comparison(paired(summary, [(a, b) for a in candidates for b in others if a != b]))
    yield tables.learning_rates(result.rates)
    yield "</details>"


def asked_again(results: Sequence[Result], rules: Sequence[str], simple: Sequence[str]) -> Iterator[str]:
    """The part on seeds that were run when all else was known, to see what stays; nothing where there are none."""
    for result in results:
        said = (
            f"{len(result.summary.seeds)} seeds, run on the {result.facts.get('device', 'cpu')} when everything else "
            "here was known, with the same learning rates, to see what holds."
        )
        yield from at_every_amount(result, "Asked again", said, rules, simple)
        ran = {method.name for method in result.summary.methods}
        if windows := [name for name in METHODS if name in ran and METHODS[name].family == "on the way"]:
            yield (
                f"Pruned on the way, {tables.percent(TUNED_AT)}, in as many steps altogether, against one cut of the "
                "trained network, and against five stages until a half, the window of `GradualPruning`:"
            )
            others = [name for name in [DEFAULT, *simple, STAGES] if name in ran]
            yield ahead(result, windows, others, TUNED_AT)


def with_own_rates(results: Sequence[Result], rules: Sequence[str], simple: Sequence[str]) -> Iterator[str]:
    """The part where the learning rates were chosen at the amount that is measured; nothing where there are no runs."""
    for result in results:
        said = (
            f"The same {len(result.summary.seeds)} seeds, but the learning rate of each method is the one that did "
            "best on validation at this amount (`many_runs.py --rates-at`)."
        )
        yield from at_every_amount(result, "With learning rates of their own", said, rules, simple)


def at_every_amount(
    result: Result, heading: str, said: str, rules: Sequence[str], simple: Sequence[str]
) -> Iterator[str]:
    """One table per amount: how far rules are ahead of what is simple, as far as they were run."""
    yield f"## {heading}: {title(result.name)}"
    yield (
        f"{said} How far each rule is ahead, in points, mean over the tasks / worst task; bold where significant after "
        "correction over these two."
    )
    ran = {method.name for method in result.summary.methods}
    for amount in result.summary.amounts:
        yield f"{tables.percent(amount)} pruned:"
        yield ahead(result, [r for r in rules if r in ran], [name for name in simple if name in ran], amount)


def ahead(result: Result, rules: Sequence[str], others: Sequence[str], amount: float) -> str:
    """One line per rule: how far it is ahead of each other, mean over the tasks / worst task."""
    rows = []
    for rule in rules:
        found = [long_overview.against([result], rule, other, [amount]) if other != rule else [] for other in others]
        rows.append([rule, *(" / ".join(map(long_overview.marked, lines)) for lines in found)])
    return tables.markdown(["method", *others], rows, len(others))


def page(
    results: Sequence[Result],
    validation: Sequence[Result],
    folder: Path,
    fresh: Sequence[Result] = (),
    own_rates: Sequence[Result] = (),
    with_mean: Sequence[Result] = (),
) -> Iterator[str]:
    """The whole page, in paragraphs.

    Args:
        results: The runs.
        validation: The runs of seeds that serve for choices only.
        folder: Where the runs lie.
        fresh: The runs of seeds that serve to ask again.
        own_rates: Runs with learning rates chosen at the amount that is measured.
        with_mean: Runs of rules with and without the tensor's mean added, for choices only.
    """
    yield HEAD.rstrip().replace("{chosen_on}", "; ".join(f"*{title(name)}*" for name in CHOSEN_ON))
    devices, versions = ({part for r in results for part in r.facts[of].split(" and ")} for of in ("device", "torch"))
    yield (
        f"Run so far: {'; '.join(title(result.name) for result in results)}; on {' and '.join(sorted(devices))}, with "
        f"torch {' and '.join(sorted(versions))}."
    )
    damped = [f"{rule} {each}" for rule in exponent.RULES for each in EXPONENTS]
    rules = [OLD_DEFAULT, "DiSparse adaptive", *damped, "LAMP with reach"]
    ran = {method.name for result in results for method in result.summary.methods}
    yield from long_overview.paragraphs(results, rules, DEFAULT, [n for n in BASELINES if n in ran], TUNED_AT)
    staged = long_overview.run_in_stages(results, fresh, STAGES)
    yield from long_overview.on_the_way(staged, DEFAULT, WINDOW, [n for n in BASELINES if n in ran], TUNED_AT)
    yield "### On validation"
    yield (
        "What the best of the learning rates reached at 98 %, mean over the tasks, on the validation split of the one "
        "seed that is not reported. Settings without runs on the test split have only this."
    )
    families = ("one-shot", "at the start", "on the way")
    yield long_overview.validated(folder, [name for name in METHODS if METHODS[name].family in families])
    yield (
        "*Cut at 1/4* and *gradual* prune on the way, in as many steps as the others take to train and to tune: once "
        "after a quarter of them, or in five stages up to a half or three quarters. They were run on another day than "
        "the cuts of trained networks, beside another dense network of the same seed."
    )
    yield from exponent.paragraphs(results, validation, CHOSEN_ON)
    yield from mean_added.paragraphs(with_mean)
    asked = [DEFAULT, "shares, damped 0.5", "DiSparse damped 0.5"]
    yield from asked_again(fresh, asked, BASELINES)
    yield from with_own_rates(own_rates, asked, BASELINES)
    yield "## Trained long enough?"
    yield (
        "The dense network of the unreported seed on its way: validation metrics, mean over the tasks, as changes to "
        "those at the end of the training, in points. The learning rate falls to zero over the course, so that the "
        "last steps gain the most they can; where the last column but one is near zero, more steps would gain little."
    )
    yield long_overview.trained_long_enough(folder)
    joint = sorted({f"damped {name.split()[-1]}, joint" for name in damped})
    for result in results:
        yield from setting_page(result, ["DiSparse adaptive", *damped, "LAMP with reach"], joint)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository: its runs are read, its pages written")
    root: Path = parser.parse_args(arguments).root
    found = [load_some(root / "benchmarks" / "results" / kind, "many_runs.py") for kind in KINDS]
    results, validation, fresh, own_rates, with_mean = found
    to, folder = root / "docs" / "results_long_regime.md", root / "benchmarks" / "results" / "long"
    parts = page(results, validation, folder, fresh, own_rates, with_mean)
    to.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    staged = long_overview.run_in_stages(results, fresh, STAGES)
    short = long_overview.in_short(results, DEFAULT, BASELINES[:4], TUNED_AT, staged, STAGES)
    put(root / "README.md", [short], README_BEGIN)
    hero.draw_all(results, staged, root / "docs" / "images", DEFAULT, STAGES)
    print(f"{to}: {', '.join(result.name for result in results)}")


if __name__ == "__main__":
    main()
