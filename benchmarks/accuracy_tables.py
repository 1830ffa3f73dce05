"""Write the result pages and the plots from the runs that benchmarks/accuracy.py made.

    python benchmarks/accuracy_tables.py

One page per setting, ``docs/accuracy/NAME.md``; between the marks of ``docs/accuracy.md`` all settings side by side.
No number is written by hand: tables, counts and times come from the JSON lines.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from multitask.report import curves, overview, tables
from multitask.report.names import file_name, title
from multitask.report.results import Result, load_some
from multitask.report.summary import Summary
from multitask.report.verdict import Comparison, baselines, budgets, tally, twins

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- accuracy: begin, written by benchmarks/accuracy_tables.py -->", "<!-- accuracy: end -->"
HEAD = """Written by `benchmarks/accuracy_tables.py` from the runs in `benchmarks/results`. How to read it, and what all
settings say together, is under [Accuracy](../accuracy.md)."""


def page(result: Result) -> Iterator[str]:
    """The page of a setting, in paragraphs."""
    yield f"# {title(result.name)}"
    yield HEAD
    yield setting_in_words(result)
    yield f"![Metrics of each task against sparsity](../images/{curve(result)})"
    yield "## Delta_m"
    yield tables.by_amount(result.summary, "mean")
    yield "## Task that lost most"
    yield tables.by_amount(result.summary, "worst")
    yield "## Each task's own scores against the summed loss"
    yield from compared([*twins(result.summary)])
    yield "## Against the best baseline of the family"
    yield from compared([*baselines(result.summary)])
    if found := [*budgets(result.summary)]:
        yield "## Floors and budgets per part against none"
        yield from compared(found)
    yield from all_about(result.summary)
    if result.channels.methods:
        yield from channels_page(result.channels)
    yield "<details><summary>The dense network, and the learning rates tried</summary>"
    yield tables.dense_metrics(result.summary)
    yield tables.learning_rates(result.rates)
    yield "</details>"


def curve(result: Result) -> str:
    """Name the file of a setting's plot."""
    return f"accuracy-{file_name(result.name)}.png"


def all_about(summary: Summary) -> Iterator[str]:
    """Everything about each amount, folded away."""
    for amount in summary.amounts:
        yield f"<details><summary>All about {tables.percent(amount)}</summary>"
        yield tables.details(summary, amount)
        yield "</details>"


def channels_page(summary: Summary) -> Iterator[str]:
    """The part of a setting about whole channels."""
    yield "## Whole channels"
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
        f"`{result.name}`: {len(facts['tasks'])} tasks, loss weights {result.loss_weights};",
        f"{samples['train']} / {samples['validation']} / {samples['test']} samples to train, choose and test on;",
        f"{runs[0].weights} prunable weights; {budget['train']} + {budget['tune']} steps of",
        f"{budget['batch_size']} samples ({budget['optimizer']});",
        f"{len(result.summary.seeds)} seeds, {len(runs)} runs"
        + (
            f", {result.hours:.1f} h of one core."
            if facts.get("device", "cpu") == "cpu"
            else f", on {facts['device']}."
        ),
    ]
    return " ".join(part for part in parts if part)


def section(results: Sequence[Result]) -> Iterator[str]:
    """All settings side by side, in paragraphs."""
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
    yield "```{toctree}\n:hidden:\n\n" + "\n".join(f"accuracy/{file_name(each.name)}" for each in results) + "\n```"


def folded(results: Sequence[Result], amount: float, words: str, side: overview.Side) -> Iterator[str]:
    """All methods at one amount, folded away."""
    for heading, what in (
        ("The mean change over the tasks (Delta_m)", "mean"),
        ("The change of the task that lost most", "worst"),
    ):
        if table := overview.side_by_side(results, amount, what, side):
            share = tables.percent(amount)
            yield f"<details><summary>{heading}, in % of the dense network, with {share} {words}</summary>"
            yield table
            yield "</details>"


def put(path: Path, paragraphs: Iterable[str], begin: str = BEGIN) -> None:
    """Put paragraphs between the marks of a file."""
    text = path.read_text(encoding="utf-8")
    start, end = text.find(begin), text.find(END)
    if start < 0 or end < start:
        raise ValueError(f"{path.name}: it must have the lines {begin!r} and {END!r}")
    path.write_text(text[:start] + "\n\n".join([begin, *paragraphs, ""]) + text[end:], encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    options = parser.parse_args(arguments)
    results = load_some(options.results, "accuracy.py")
    (options.docs / "accuracy").mkdir(parents=True, exist_ok=True)
    for result in results:
        curves.draw(result.summary, options.docs / "images" / curve(result))
        text = "\n\n".join(page(result)) + "\n"
        (options.docs / "accuracy" / f"{file_name(result.name)}.md").write_text(text, encoding="utf-8")
    put(options.docs / "accuracy.md", section(results))
    print(f"{len(results)} settings: {', '.join(result.name for result in results)}")


if __name__ == "__main__":
    main()
