"""Write docs/accuracy.md, its plots and the README's result section from the runs that benchmarks/accuracy.py made.

    python benchmarks/accuracy_tables.py

No number is written by hand: tables, counts of wins, ties and losses, and times all come from the JSON lines.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from multitask.report import curves, overview, tables
from multitask.report.results import Result, load
from multitask.report.summary import Summary
from multitask.report.verdict import Comparison, baselines, budgets, tally, twins

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- accuracy: begin, written by benchmarks/accuracy_tables.py -->", "<!-- accuracy: end -->"
HEAD = """# Accuracy

Written by `benchmarks/accuracy_tables.py` from the runs in `benchmarks/results`, made by `benchmarks/accuracy.py`.

All numbers are changes relative to the dense network of the same seed, in per cent, negative for worse: of a task, the
mean over its metrics, each signed by its direction; *Delta_m* is the mean over the tasks. Each is a mean over the seeds
with its 95 % interval (Student's t). Paired differences are between runs of the same seed. Learning rates were chosen
per method on the validation split of a seed that is not reported, the best baseline on the validation split as well;
the test split was measured once per run. *Emptied* counts weight tensors with nothing left.

`adaptive` is layer-adaptive Taylor (`layer_adaptive("taylor")`). A *twin* differs from the method in seeing the
weighted sum of the losses in place of each task's own, and in nothing else. A comparison *wins* or *loses* where
its 95 % interval leaves out zero; of twenty comparisons without any difference, one would do so by chance.
"""


def page(results: Sequence[Result]) -> Iterator[str]:
    """The page of the documentation, in paragraphs."""
    yield HEAD
    for result in results:
        yield f"## {result.name}"
        yield setting_in_words(result)
        yield f"![Metrics against sparsity](images/accuracy-{result.name}.png)"
        yield "### Delta_m"
        yield tables.by_amount(result.summary, "mean")
        yield "### Task that lost most"
        yield tables.by_amount(result.summary, "worst")
        yield "### Each task's own scores against the summed loss"
        yield from compared([*twins(result.summary)])
        yield "### Against the best baseline of the family"
        yield from compared([*baselines(result.summary)])
        if found := [*budgets(result.summary)]:
            yield "### Floors and budgets per part against none"
            yield from compared(found)
        yield from all_about(result.summary)
        if result.channels.methods:
            yield from channels_page(result.channels)
        yield "<details><summary>The dense network, and the learning rates tried</summary>"
        yield tables.dense_metrics(result.summary)
        yield tables.learning_rates(result.rates)
        yield "</details>"


def all_about(summary: Summary) -> Iterator[str]:
    """Everything about each amount, folded away."""
    for amount in summary.amounts:
        yield f"<details><summary>All about {tables.percent(amount)}</summary>"
        yield tables.details(summary, amount)
        yield "</details>"


def channels_page(summary: Summary) -> Iterator[str]:
    """The part of a setting about whole channels."""
    yield "### Whole channels"
    yield "Removed from the trained network for good; the amount is of all parameters. Delta_m:"
    yield tables.by_amount(summary, "mean")
    yield "The task that lost most:"
    yield tables.by_amount(summary, "worst")
    yield (
        "Paired differences of each task's own scores to the summed loss, then to the best baseline; last, of a floor "
        'and of the mean as the arbiter of how many channels go from each layer (`across="mean"`), to neither.'
    )
    for find in (twins, baselines, budgets):
        yield from compared([*find(summary)])
    yield from all_about(summary)


def compared(found: Sequence[Comparison]) -> Iterator[str]:
    """A sentence that counts, then the table."""
    if found:
        yield f"Paired differences in points: {tally(found)}."
        yield tables.comparisons(found)


def setting_in_words(result: Result) -> str:
    """Say what was run."""
    facts, runs = result.facts, result.runs
    budget, samples = facts["budget"], facts["samples"]
    parts = [
        facts["note"],
        f"{len(facts['tasks'])} tasks, loss weights {result.loss_weights};",
        f"{samples['train']} / {samples['validation']} / {samples['test']} samples to train, choose and test on;",
        f"{runs[0].weights} prunable weights; {budget['train']} + {budget['tune']} steps of",
        f"{budget['batch_size']} samples ({budget['optimizer']});",
        f"{len(result.summary.seeds)} seeds, {len(runs)} runs, {result.hours:.1f} h of one core.",
    ]
    return " ".join(part for part in parts if part)


def section(results: Sequence[Result]) -> Iterator[str]:
    """The README's section, in paragraphs: all settings side by side."""
    yield BEGIN
    yield overview.what_was_run(results)
    yield from sorted({result.facts["note"] for result in results} - {""})
    yield (
        "Comparisons won / tied / lost, by the 95 % interval of the paired differences over the seeds: first of the "
        "mean over the tasks, then of the task that lost most."
    )
    yield overview.won_tied_lost(results)
    for amount in (0.9, 0.98):
        yield from folded(results, amount, "of the weights pruned", overview.weights_of)
    for amount in (0.75, 0.9):
        yield from folded(results, amount, "of the parameters removed in whole channels", overview.channels_of)
    yield END


def folded(results: Sequence[Result], amount: float, words: str, side: overview.Side) -> Iterator[str]:
    """All methods at one amount, folded away."""
    for title, what in (
        ("The mean change over the tasks (Delta_m)", "mean"),
        ("The change of the task that lost most", "worst"),
    ):
        if table := overview.side_by_side(results, amount, what, side):
            share = tables.percent(amount)
            yield f"<details><summary>{title}, in % of the dense network, with {share} {words}</summary>"
            yield table
            yield "</details>"


def replaced(text: str, new: str) -> str:
    """Put the section between its marks."""
    start, end = text.find(BEGIN), text.find(END)
    if start < 0 or end < start:
        raise ValueError(f"README.md: it must have the lines {BEGIN!r} and {END!r}")
    return text[:start] + new + text[end + len(END) :]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    options = parser.parse_args(arguments)
    results = load(options.results)
    for result in results:
        curves.draw(result.summary, options.docs / "images" / f"accuracy-{result.name}.png")
    (options.docs / "accuracy.md").write_text("\n\n".join(page(results)) + "\n")
    options.readme.write_text(replaced(options.readme.read_text(), "\n\n".join(section(results))))
    print(f"{len(results)} settings: {', '.join(result.name for result in results)}")


if __name__ == "__main__":
    main()
