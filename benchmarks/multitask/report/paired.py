"""Runs against others of the same seeds: how far each is ahead, as a table and in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from statistics import mean, median
from typing import NamedTuple, TypeAlias

from ..problem.relative import Interval, holm
from .summary import Summary
from .tables import markdown, percent

Key: TypeAlias = tuple[str, float]  # a method and how much it prunes
VIEWS = {"mean": "the mean over the tasks", "worst": "the task that lost most"}


class Paired(NamedTuple):
    """How far a method is ahead of another in points, by what is looked at; the words are after Holm's correction."""

    method: Key
    other: Key
    ahead: dict[str, Interval]
    words: dict[str, str]


def difference(summary: Summary, pairs: Sequence[tuple[Key, Key]], what: str) -> Interval | None:
    """Return how far methods are ahead of others, averaged over the pairs; None if not even two seeds have all."""
    by_seed = []
    for method, other in pairs:
        mine, theirs = summary.changes(*method), summary.changes(*other)
        by_seed.append({s: getattr(mine[s], what) - getattr(theirs[s], what) for s in mine.keys() & theirs.keys()})
    seeds = sorted(set.intersection(*map(set, by_seed)))
    return Interval([mean(each[seed] for each in by_seed) for seed in seeds]) if len(seeds) > 1 else None


def compare(
    summary: Summary,
    pairs: Iterable[tuple[Key, Key]],
    *,
    rules: Sequence[str] = ("",),
    views: Iterable[str] = tuple(VIEWS),
) -> list[Paired]:
    """Compare each method with the other of its pair; p-values are corrected over all of these comparisons.

    With several ``rules``, the names are of procedures, and the differences are averaged over the rules.
    """
    found = []
    for method, other in pairs:
        each = [((rule + method[0], method[1]), (rule + other[0], other[1])) for rule in rules]
        ahead = {what: difference(summary, each, what) for what in views}
        known = {what: interval for what, interval in ahead.items() if interval is not None}
        if method != other and known:
            found.append((method, other, known))
    corrected = iter(holm([interval.p_value for _, _, ahead in found for interval in ahead.values()]))
    return [
        Paired(method, other, ahead, {what: interval.word(next(corrected)) for what, interval in ahead.items()})
        for method, other, ahead in found
    ]


def differences(compared: Iterable[Paired]) -> str:
    """One line per comparison, without the levels."""
    rows = [[line.method[0], percent(line.method[1]), *_against(line)] for line in compared]
    return markdown(["method", "pruned", *AGAINST], rows, 1 + len(AGAINST))


AGAINST = ("against", "ahead by", "verdict")


def _against(line: Paired) -> list[str]:
    return [line.other[0], *(" / ".join(map(str, each.values())) for each in (line.ahead, line.words))]


def table(summary: Summary, keys: Sequence[Key], compared: Sequence[Paired]) -> str:
    """One line per method: its changes, and how far it is ahead of the one that it is compared with, if any."""
    by_method = {line.method: line for line in compared}
    steps = {(run.method, run.amount): run.steps for run in summary.runs.values()}
    rows = []
    for key in keys:
        if key not in steps:
            continue
        levels = [str(summary.interval(*key, what)) for what in VIEWS]
        line = by_method.get(key)
        cells = _against(line) if line else [""] * len(AGAINST)
        rows.append([key[0], percent(key[1]), f"{steps[key]:,}", *levels, *cells])
    header = ["method", "pruned", "steps", *VIEWS.values(), *AGAINST]
    return markdown(header, rows, 7)


def said(compared: Sequence[Paired]) -> str:
    """Say in sentences what is significant, and how small a difference could be found."""
    if not compared:
        return "Too few seeds to compare."
    sentences = []
    for what in compared[0].words:
        found = {side: ", ".join(_named(compared, what, word)) for side, word in SIDES.items()}
        parts = [f"{side}: {names}" for side, names in found.items() if names]
        sentences.append(f"In {VIEWS[what]}, {'; '.join(parts) or 'no difference is significant'}.")
    half = median(line.ahead["mean"].half for line in compared)
    sentences.append(f"The intervals of the mean are ± {half:.1f} in the median: smaller differences stay unseen.")
    return " ".join(sentences)


SIDES = {"significantly ahead": "wins", "significantly behind": "loses"}


def _named(compared: Sequence[Paired], what: str, word: str) -> Iterator[str]:
    for line in compared:
        if line.words[what] == word:
            yield f"{line.method[0]} ({percent(line.method[1])}, by {abs(line.ahead[what].mean):.1f})"


def validated(summary: Summary, keys: Sequence[Key]) -> Key:
    """Return the method with the highest mean on the *validation* split; the test split makes no choice."""

    def level(key: Key) -> float:
        return mean(change.mean for change in summary.changes(*key, "validation").values())

    return max(keys, key=level)


def confirmed(summary: Summary, first: Sequence[Key], second: Sequence[Key], called: tuple[str, str]) -> str:
    """Say how the best of two groups, chosen by validation, compare on the test split."""
    best = [validated(summary, keys) for keys in (first, second)]
    ahead = [difference(summary, [(best[0], best[1])], what) for what in VIEWS]
    if None in ahead:
        return ""
    words = " / ".join(f"{interval} ({interval.word()})" for interval in ahead if interval is not None)
    return (
        f"Chosen by validation, over all seeds here, the best {called[0]} is *{best[0][0]}*, the best {called[1]} "
        f"*{best[1][0]}*; on the test split the first is ahead by {words}, uncorrected."
    )
