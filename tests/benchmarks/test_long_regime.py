"""The long regime of the benchmark and its page: stored apart, chosen by validation, corrected for many comparisons."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torchmetrics", reason="needs pip install 'disparse-plugin[benchmarks]'")

import accuracy
import accuracy_tables
import dedicated
import long_regime_tables
import scaling
from disparse_plugin.masks import masks_of
from multitask import settings
from multitask.problem.relative import Interval, holm
from multitask.pruning.methods import METHODS
from multitask.report import exponent, long_overview
from multitask.report.results import load
from multitask.settings import SETTINGS, prolonged
from multitask.training.bench import Bench
from signs import BUDGET, SETTING, command, made_up

DAMPED = ["damped 0.25, joint", "DiSparse damped 0.25", "shares, damped 0.25"]


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(settings.SETTINGS, "signs", SETTING)


def test_the_long_regime_differs_in_the_steps_and_in_more_rates_to_choose_from() -> None:
    long = prolonged(SETTING)
    assert (long.budget.train, long.budget.tune) == (3000, 600)
    assert all(METHODS[name].steps(Bench(long, made_up(), 0, 1e-2, torch.device("cpu"))) == 3600 for name in DAMPED)
    assert replace(long.budget, train=12, tune=6, rates=BUDGET.rates) == BUDGET
    assert min(long.budget.rates) < min(BUDGET.rates)
    assert max(long.budget.rates) > max(BUDGET.rates)
    assert (long.name, long.network) == (SETTING.name, SETTING.network)


def test_a_setting_that_is_long_already_is_not_shortened() -> None:
    with pytest.raises(ValueError, match=r"regime: long must lengthen .*, found nyuv2 with \d+ steps"):
        prolonged(SETTINGS["nyuv2"])


def test_a_network_that_starts_from_trained_weights_keeps_its_budget() -> None:
    assert prolonged(SETTINGS["trunk"]) is SETTINGS["trunk"]


def test_regimes_have_files_of_their_own(tmp_path: Path, known: None) -> None:
    accuracy.main(command(tmp_path, "--methods", "magnitude", "--quick"))
    short = load(tmp_path)[0].runs
    accuracy.main(command(tmp_path, "--methods", "LAMP", "--quick", "--regime", "long"))
    assert load(tmp_path)[0].runs == short
    assert {run.method for run in load(tmp_path / "long")[0].runs} == {"dense", "LAMP"}


def test_with_the_summed_loss_shares_and_percentiles_are_one_rule() -> None:
    bench = Bench(SETTING, made_up(), 3, 1e-2, torch.device("cpu"))
    bench.losses = bench.summed

    def kept(name: str) -> torch.Tensor:
        model = METHODS[name].procedure(bench, 0.9, 0.0)
        return torch.cat([mask.flatten() for mask in masks_of(model).values()])

    joint, percentiles, shares = map(kept, DAMPED)
    assert torch.equal(joint, percentiles)
    assert torch.equal(joint, shares)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holms_correction_rejects_what_its_steps_reject(p_values: list[float]) -> None:
    corrected = holm(p_values)
    for level in {0.05, *corrected}:
        rejected: set[int] = set()  # by the definition: from the smallest on, until one is too large
        for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
            if min(1.0, p_values[index] * (len(p_values) - place)) > level:
                break
            rejected.add(index)
        assert rejected == {index for index, p in enumerate(corrected) if p <= level}


def test_p_values_are_those_of_students_t() -> None:
    for count in (2, 5, 31):
        values = np.random.default_rng(count).normal(0.5, size=count)
        expected = scipy.stats.ttest_1samp(values, 0).pvalue
        assert Interval(values.tolist()).p_value == pytest.approx(expected)
    assert [Interval(values).p_value for values in ([3.0], [0.0, 0.0], [1.0, 1.0])] == [1.0, 1.0, 0.0]


def test_the_page_comes_from_the_runs(tmp_path: Path, known: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_regime_tables, "CHOSEN_ON", ("signs",))
    names = [name for name in METHODS if "damped" in name]
    methods = ["magnitude", "DiSparse Taylor", "DiSparse adaptive", *names]
    runs, readme = tmp_path / "benchmarks" / "results", tmp_path / "README.md"
    page = tmp_path / "docs" / "results_long_regime.md"
    (tmp_path / "docs" / "images").mkdir(parents=True)
    accuracy.main(command(runs, "--methods", *methods, "--quick", "--regime", "long"))
    readme.write_text(f"before\n{long_regime_tables.README_BEGIN}\nold\n{accuracy_tables.END}\nafter\n")
    with pytest.raises(SystemExit, match=r"needs finished runs under .*chosen, found none"):
        long_regime_tables.main(["--root", str(tmp_path)])
    assert not page.exists()
    (runs / "mean_added").mkdir()
    for kind in ("chosen", "fresh", "own_rates", "mean_added/long"):
        (runs / kind).symlink_to(runs / "long")
    long_regime_tables.main(["--root", str(tmp_path)])
    result, text = load(runs / "long")[0], page.read_text()
    assert str(result.summary.interval("DiSparse adaptive", 0.98, "worst")) in text
    found = long_regime_tables.paired(result.summary, [("DiSparse adaptive", "DiSparse Taylor")])
    assert f"| DiSparse adaptive | DiSparse Taylor | 90% | {found[0].mean} | {found[0].worst} |" in text
    assert re.search(r"\| shares, damped 0.25 \| magnitude \|", text)
    again = text[text.index("## Asked again: signs") :]
    ahead = result.summary.paired("shares, damped 0.25", "magnitude", 0.98, "mean")
    row = again[again.index("98% pruned:") :].split("| shares, damped 0.25 | ")[1]
    assert row.replace("*", "").startswith(f"{ahead} / ")
    stages = result.summary.paired("shares, damped 0.25, gradual to 1/2", "shares, damped 0.25", 0.98, "mean")
    row = text[text.index("### Pruned on the way, 98%") :].split("| signs | 2 | ")[1]
    assert row.replace("*", "").startswith(f"{stages} / ")
    words = [
        line.word
        for other in ("magnitude", "adaptive Taylor, joint")
        for line in long_overview.against([result], "shares, damped 0.25, gradual to 1/2", other, [0.98])
    ]
    counts = " / ".join(str(words.count(word)) for word in ("wins", "ties", "loses"))
    at = result.summary.amounts.index(0.98)
    row = text.split("| shares, damped 0.25, gradual to 1/2 | simple rules | ")[1].splitlines()[0]
    assert row.removesuffix(" |").split(" | ")[at] == counts
    short = readme.read_text().replace("*", "")
    row = short.split(f"| signs | {len(result.facts['tasks'])} | {ahead} |")[1].splitlines()[0]
    assert row.endswith(f" | {stages} |")
    assert "old" not in short
    on_the_way = result.summary.paired("shares, damped 0.25, cut at 1/4", "shares, damped 0.25", 0.98, "mean")
    row = again[again.index("Pruned on the way") :].split("| shares, damped 0.25, cut at 1/4 | ")[1]
    assert row.replace("*", "").startswith(f"{on_the_way} / ")
    added = text[text.index("## The tensor's mean, added") :]
    changes = [
        result.summary.changes(f"shares, damped 0.5{ending}", 0.98, "validation") for ending in ("", ", mean added")
    ]
    gain = Interval([changes[1][seed].mean - changes[0][seed].mean for seed in sorted(changes[0])])
    row = added.split("| signs | shares, damped 0.5 | 98% | ")[1].splitlines()[0]
    assert f" | {gain} | " in row
    own = text[text.index("## With learning rates of their own: signs") :]
    row = own[own.index("98% pruned:") :].split("| shares, damped 0.25 | ")[1]
    assert row.replace("*", "").startswith(f"{ahead} / ")
    pictures = {path.name: path.stat().st_size for path in (tmp_path / "docs" / "images").glob("hero-*.png")}
    assert len(pictures) == 4
    assert min(pictures.values()) > 10_000


def test_the_exponent_is_judged_by_validation_of_all_seeds_and_never_by_the_test_split(
    tmp_path: Path, known: None
) -> None:
    names = ["shares, damped 0.25", "shares, damped 0.5"]
    only = ("--methods", *names, "--quick", "--seeds", "1")
    accuracy.main(command(tmp_path / "reported", *only))
    accuracy.main(command(tmp_path / "chosen", *only, "--first-seed", "1001"))
    reported, validation = load(tmp_path / "reported"), load(tmp_path / "chosen")
    assert all(run.test == {} for run in validation[0].runs)
    everything = [*reported, *validation]
    for favoured, other in (names, names[::-1]):
        reported[0].rates.update({favoured: {"0.1": -9.0, "0.2": -2.0}, other: {"0.1": -3.0, "0.2": -1.0}})
        validation[0].rates.clear()
        for run in (run for result in everything for run in result.runs):
            right = 0.5 + 0.1 * (run.method == favoured)
            for task in run.validation:
                run.validation[task]["accuracy"] = right
            for task in run.test:  # what the test split says is the opposite
                run.test[task]["accuracy"] = 1 - right
        assert exponent.validated(everything, favoured, "signs") == pytest.approx({1000: -2.0, 0: 20.0, 1001: 20.0})
    text = [*exponent.paragraphs(reported, validation, ["signs"])][-1]
    assert "| shares, damped | signs | 3 | -0.3 | 12.7 | -13.0 ± 30.1 |" in text  # of (-1, 0, 0) and (-2, 20, 20)
    assert "| shares, damped | all |  | -0.3 | **12.7** | -13.0 |" in text


def test_courses_of_any_length_are_shown_by_shares_of_their_steps(tmp_path: Path) -> None:
    for name, steps in (("signs", 900), ("yeast", 3000)):
        (tmp_path / name).mkdir()
        looks = [{"step": steps // 3 * third, "0.1": -1.5 * (3 - third)} for third in (1, 2, 3)]
        (tmp_path / name / "curve.json").write_text(json.dumps(looks))
        (tmp_path / name / "rates.json").write_text(json.dumps({"dense": {"0.1": 0.0}}))
    table = long_overview.trained_long_enough(tmp_path)
    assert "| setting | learning rate | steps | 33% | 67% | 100% |" in table
    assert "| signs | 0.1 | 900 | -3.0 | -1.5 | 0.0 |" in table
    assert "| 3,000 | -3.0 | -1.5 | 0.0 |" in table


def test_no_page_is_made_of_a_folder_without_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, empty = tmp_path / "accuracy.md", str(tmp_path / "none")
    page.write_text(before := f"before\n{accuracy_tables.BEGIN}\nold\n{accuracy_tables.END}\nafter\n")
    monkeypatch.setattr(scaling, "PAGE", page)
    for write, words in (
        (long_regime_tables.main, ["--root", empty]),
        (accuracy_tables.main, ["--results", empty, "--docs", str(tmp_path)]),
        (dedicated.main, ["--out", empty, "--page", str(page)]),
        (scaling.main, ["--out", empty, "--page"]),
    ):
        with pytest.raises(SystemExit, match=r"needs .* found none; run "):
            write(words)
    assert page.read_text() == before


def test_settings_with_fresh_seeds_are_shown_in_stages_by_those(tmp_path: Path, known: None) -> None:
    stages = "magnitude, gradual to 1/2"
    accuracy.main(command(tmp_path, "--methods", stages, "--quick"))
    results = load(tmp_path)
    fresh = replace(results[0], facts={**results[0].facts, "fresh": True})
    other = replace(results[0], facts={**results[0].facts, "name": "other"})
    found = long_overview.run_in_stages([*results, other], [fresh], stages)
    assert [(result.name, "fresh" in result.facts) for result in found] == [("signs", True), ("other", False)]
    assert long_overview.run_in_stages(results, [], "magnitude") == []
    assert not [*long_overview.on_the_way([], "magnitude", "gradual to 1/2", ["LAMP"], 0.98)]


def test_averages_over_amounts_and_settings_are_paired_by_seed(tmp_path: Path, known: None) -> None:
    accuracy.main(command(tmp_path, "--methods", "magnitude", "DiSparse adaptive", "--quick"))
    result = load(tmp_path)[0]
    for run in result.runs:  # the adaptive one is ahead by 10 points in one task, at one amount, in seed 0 by 20
        value = 0.5
        if run.method == "DiSparse adaptive" and run.amount == 0.9:
            value += 0.1 if run.seed else 0.2
        run.test.update(left={"accuracy": value}, right={"accuracy": 0.5})
    found = long_overview.averaged(result.summary, "DiSparse adaptive", "magnitude", [0.9, 0.98], "mean")
    assert found == pytest.approx({0: 10.0, 1: 5.0})  # 20 % and 40 % of one task of two, at one amount of two
    assert set(long_overview.averaged(result.summary, "DiSparse adaptive", "magnitude", [0.9], "worst").values()) == {0}
    lines = long_overview.against([result, result], "DiSparse adaptive", "magnitude", [0.9, 0.98])
    assert [line.what for line in lines] == ["mean", "worst"] * 2
    alone = lines[0].interval.p_value
    assert lines[0].corrected == pytest.approx(min(1, 4 * alone))
    assert lines[0].interval.mean == pytest.approx(7.5)
    text = long_overview.matrix([result], ["DiSparse adaptive"], ["magnitude", "LAMP"], [0.9, 0.98])
    assert "| DiSparse adaptive | magnitude | 7.5 | 0 / 1 / 0 |" in text
    assert "LAMP" not in text
