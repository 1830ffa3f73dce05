"""Dense networks of dedicated multi-task methods, tickets at equal cost, and the page that compares them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("torchmetrics", reason="needs pip install 'disparse-plugin[benchmarks]'")

import dedicated
from multitask import settings
from multitask.pruning.procedures import iterative, lottery, lottery_steps, one_shot
from multitask.report.dedicated import lines, table
from multitask.report.results import KnownTask
from multitask.report.summary import Summary
from multitask.runs import Store
from multitask.training.balanced import aggregated, summed, uncertainty
from multitask.training.bench import Bench
from signs import BUDGET, SETTING, made_up

CPU = torch.device("cpu")


@pytest.fixture
def bench() -> Bench:
    return Bench(SETTING, made_up(), 3, 1e-2, CPU)


def test_the_sum_of_the_gradients_trains_as_the_sum_of_the_losses(bench: Bench) -> None:
    pytest.importorskip("torchjd")
    found, expected = bench.run(aggregated("Sum"), 0.0, 1e-3), bench.run(summed, 0.0, 1e-3)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_an_aggregator_trains_the_trunk_and_leaves_the_heads_to_their_tasks(bench: Bench) -> None:
    pytest.importorskip("torchjd")
    bench.budget = replace(bench.budget, train=1, tune=0)
    weights = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    half, whole = (bench.run(aggregated("Constant", weights=each), 0.0, 1e-3) for each in weights)
    same = {name: torch.equal(value, whole.state_dict()[name]) for name, value in half.state_dict().items()}
    assert all(same[name] == name.startswith("heads") for name in same if name.endswith("weight"))


def test_uncertainty_weighting_begins_with_the_plain_sum_and_leaves_it(bench: Bench) -> None:
    bench.budget = replace(bench.budget, train=1, tune=0)
    first, plain = bench.run(uncertainty, 0.0, 1e-2), bench.run(summed, 0.0, 1e-2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), plain.parameters(), strict=True))
    bench.budget = replace(bench.budget, train=6)
    later, plain = bench.run(uncertainty, 0.0, 1e-2), bench.run(summed, 0.0, 1e-2)
    assert not all(torch.equal(a, b) for a, b in zip(later.parameters(), plain.parameters(), strict=True))


def test_a_network_without_one_trunk_is_refused(bench: Bench) -> None:
    pytest.importorskip("torchjd")
    bench.initial = lambda: nn.Linear(2, 2)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"setting: needs a network with one trunk .*, found Linear"):
        aggregated("MGDA")(bench, 0.0, 0.1)


@pytest.mark.parametrize(
    ("procedure", "expected"),
    [
        (one_shot(None, 3), 3 * BUDGET.tune),
        (iterative(dedicated.CUTS["magnitude"], times=3), 3 * BUDGET.tune),
        (lottery(dedicated.CUTS["magnitude"], share=0.5), 9 + 3 * 9),  # back to the first of nine steps, three times
    ],
    ids=["one cut", "three cuts", "ticket"],
)
def test_procedures_take_the_steps_that_they_are_said_to(procedure, expected, bench: Bench, monkeypatch) -> None:
    bench.dense()
    taken = []
    monkeypatch.setattr(
        bench, "training_batch", lambda which, real=bench.training_batch: taken.append(1) or real(which)
    )
    procedure(bench, 0.9, 1e-2)
    assert len(taken) == expected


def test_tickets_of_equal_cost_take_what_one_training_takes() -> None:
    long = Bench(replace(SETTING, budget=replace(BUDGET, train=3000, tune=600)), made_up(), 0, 0.1, CPU)
    assert lottery_steps(long, share=dedicated.EQUAL) == pytest.approx(3600, rel=0.001)
    assert lottery_steps(long) == pytest.approx(3.7 * 3600, rel=0.001)


def test_the_page_comes_from_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(settings.SETTINGS, "signs", SETTING)
    kept = ("plain sum", "uncertainty weighting", dedicated.DEFAULT, "lottery ticket", f"{dedicated.DEFAULT}, one cut")
    for group, methods in dedicated.GROUPS.items():
        monkeypatch.setitem(dedicated.GROUPS, group, [method for method in methods if method.name in kept])
    run = ["--data", "signs", "--out", str(tmp_path), "--quick", "--seeds", "2"]
    dedicated.main(run)
    dedicated.main(run)  # goes on where it was: nothing is left to do
    store = Store(tmp_path / "balanced", "signs")
    assert len(store.runs()) == 2 * (1 + 2 + 2)  # dense, two dense methods, one rule at two amounts
    summary = Summary(
        store.runs(), [KnownTask(**task) for task in store.setting_facts()["tasks"]], reference="plain sum"
    )
    assert summary.interval("plain sum", 0.0, "mean").mean == 0  # type: ignore[union-attr]
    found = {(line.method, line.amount): line for line in lines(summary, (dedicated.DEFAULT, 0.9))}
    ahead = found["uncertainty weighting", 0.0].ahead[0].mean
    levels = [summary.interval(*key, "mean").mean for key in (("uncertainty weighting", 0.0), (dedicated.DEFAULT, 0.9))]  # type: ignore[union-attr]
    assert ahead == pytest.approx(levels[0] - levels[1])
    assert f"| {dedicated.DEFAULT} | 90% | 10 |" in table(summary, (dedicated.DEFAULT, 0.9))
    page = tmp_path / "page.md"
    dedicated.main([*run, "--page", str(page)])
    assert table(summary, (dedicated.DEFAULT, 0.9)) in page.read_text()
    assert "| lottery ticket | 98% | 37 |" in page.read_text()
