"""Dense networks of dedicated multi-task methods, tickets at equal cost, and the page that compares them."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("torchmetrics", reason="needs pip install 'disparse-plugin[benchmarks]'")

import dedicated
from multitask import runs, settings
from multitask.problem.relative import Interval, holm
from multitask.pruning.procedures import iterative, lottery, lottery_steps, one_shot
from multitask.report.paired import compare, confirmed, differences, said, table
from multitask.report.results import KnownTask
from multitask.report.summary import Summary
from multitask.runs import Run, Store, choose_rates
from multitask.training.balanced import aggregated, aggregator, summed, uncertainty
from multitask.training.bench import Bench
from multitask.training.networks import SharedTrunk
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


@pytest.mark.parametrize(("name", "options"), [("UPGrad", {}), ("MGDA", {}), ("CAGrad", {"c": 0.5})])
def test_a_step_is_that_of_torchjd(name: str, options: dict[str, float], bench: Bench) -> None:
    autojac = pytest.importorskip("torchjd.autojac")
    try:
        combine = getattr(pytest.importorskip("torchjd.aggregation"), name)(**options)
    except ImportError as error:
        pytest.skip(str(error))
    batch = bench.training_batch(bench.order(1, 0)[0])
    found, expected = bench.initial(), bench.initial()
    aggregator(name, **options)(bench)(found, batch)
    features = expected.trunk(batch[0])
    outputs = expected.heads(features)
    losses = [task.loss(outputs[task.name], batch[1][task.name]) for task in bench.problem.tasks]
    autojac.mtl_backward(losses, features)
    autojac.jac_to_grad(expected.trunk.parameters(), combine)
    for (label, mine), theirs in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=label)


class Maps(nn.Module):
    """Gives two feature maps, the second made of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 8)

    def forward(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        first = self.first(inputs).relu()
        return [first, self.second(first)]


class OfBoth(nn.Linear):
    """A head on both maps."""

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        return super().forward(torch.cat(maps, 1))


def test_a_trunk_may_give_several_maps(bench: Bench) -> None:
    pytest.importorskip("torchjd")
    network = SharedTrunk(Maps(), {task.name: OfBoth(16, 2) for task in bench.problem.tasks})
    batch = bench.training_batch(bench.order(1, 0)[0])
    bench.summed(network, batch)["joint"].backward()
    expected = [parameter.grad for parameter in network.parameters()]
    network.zero_grad()
    aggregator("Sum")(bench)(network, batch)
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_the_dense_network_follows_the_aggregator_of_its_setting() -> None:
    pytest.importorskip("torchjd")
    half = aggregator("Constant", weights=torch.tensor([1.0, 0.0]))
    found = Bench(replace(SETTING, dense=half), made_up(), 3, 1e-2, CPU)
    expected = Bench(SETTING, made_up(), 3, 1e-2, CPU)
    expected.budget = replace(BUDGET, tune=0)
    reference = expected.run(aggregated("Constant", weights=torch.tensor([1.0, 0.0])), 0.0, 1e-2)
    for mine, theirs in zip(found.dense().parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine, theirs)


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


def test_rates_are_chosen_at_every_amount_of_a_method(tmp_path: Path) -> None:
    store, methods = Store(tmp_path, "signs"), [m for m in dedicated.GROUPS["balanced"] if m.name == "magnitude"]
    choose_rates(SETTING, made_up(), methods, store, CPU, everywhere=True)
    assert store.rates().keys() == {"dense", "magnitude at 90%", "magnitude at 95%"}


def test_rates_of_tuning_are_chosen_on_several_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = [method for method in dedicated.GROUPS["costly"] if method.name in ("magnitude, one cut", "SET")]
    both = Store(tmp_path / "both", "signs")
    choose_rates(SETTING, made_up(), methods, both, CPU, seeds=2)
    alone = []
    for seed in (runs.TUNING_SEED, runs.TUNING_SEED + 1):
        monkeypatch.setattr(runs, "TUNING_SEED", seed)
        store = Store(tmp_path / str(seed), "signs")
        store.set_rates({"dense": both.rates()["dense"]})
        choose_rates(SETTING, made_up(), methods, store, CPU)
        alone.append(store.rates())
    found, (first, second) = both.rates(), alone
    assert found["SET"] == first["SET"]  # a whole training
    for rate, score in found["magnitude, one cut"].items():
        assert score == pytest.approx((first["magnitude, one cut"][rate] + second["magnitude, one cut"][rate]) / 2)
    assert first["magnitude, one cut"] != second["magnitude, one cut"]


def _runs(levels: dict[str, list[float]]) -> list[Run]:
    """One task, whose accuracy is given by method and seed, better on validation by a tenth where the name ends so."""
    return [
        Run(
            setting="signs",
            method=method,
            amount=0.0 if method == "dense" else 0.9,
            seed=seed,
            rate=0.1,
            steps=18,
            weights=10,
            pruned=0,
            sparsity={},
            emptied=[],
            validation={"left": {"accuracy": value + 0.1 * method.endswith("best")}},
            test={"left": {"accuracy": value}},
            seconds=0.0,
        )
        for method, values in levels.items()
        for seed, value in enumerate(values)
    ]


def test_pairs_are_compared_seed_by_seed_and_corrected_together() -> None:
    levels = {
        "dense": [0.5, 0.5, 0.5],
        "a": [0.50, 0.51, 0.52],
        "b best": [0.60, 0.61, 0.62 + 1e-6],
        "c": [0.40, 0.41 - 1e-3, 0.42],
    }
    summary = Summary(_runs(levels), [KnownTask("left", {"accuracy": "higher"}, 1.0)])
    base, better, worse = ("a", 0.9), ("b best", 0.9), ("c", 0.9)
    found = compare(summary, [(key, base) for key in (base, better, worse)])
    assert [line.method for line in found] == [better, worse]  # a method is not compared with itself
    for line in found:
        points = [200 * (mine - its) for mine, its in zip(levels[line.method[0]], levels["a"], strict=True)]
        assert line.ahead["mean"].mean == pytest.approx(Interval(points).mean)
    p_values = holm([line.ahead[what].p_value for line in found for what in ("mean", "worst")])
    assert max(p_values) < 0.05
    assert [line.words["mean"] for line in found] == ["wins", "loses"]
    assert "In the mean over the tasks, significantly ahead: b best (90%, by 20.0); significantly behind: c" in said(
        found
    )
    assert "no difference is significant" in said(compare(summary, [(base, ("dense", 0.0))]))
    lines = table(summary, [base, better], found).splitlines()
    assert lines[2].endswith("|  |  |  |")
    assert lines[3].endswith("| a | 20.0 ± 0.0 / 20.0 ± 0.0 | wins / wins |")
    text = confirmed(summary, [better, worse], [base], ("pruned network", "dense one"))
    assert "*b best*, the best dense one *a*" in text
    assert "by 20.0 ± 0.0 (wins)" in text


def test_differences_are_averaged_over_rules() -> None:
    levels = {
        "dense": [0.5, 0.5, 0.5],
        "a, one": [0.50, 0.52, 0.51],
        "b, one": [0.40, 0.41, 0.42],
        "a, more": [0.52, 0.53, 0.54],
        "b, more": [0.41, 0.44, 0.45],
    }
    summary = Summary(_runs(levels), [KnownTask("left", {"accuracy": "higher"}, 1.0)])
    pairs = [(("more", 0.9), ("one", 0.9)), (("one", 0.9), ("one", 0.9))]
    (found,) = compare(summary, pairs, rules=["a, ", "b, "], views=["mean"])
    # per seed 200 times 0.02 and 0.01, 0.01 and 0.03, 0.03 and 0.03, averaged
    assert found.ahead["mean"].mean == pytest.approx((3 + 4 + 6) / 3)
    assert found.words == {"mean": "wins"}
    assert differences([found]).splitlines()[2] == f"| more | 90% | one | {found.ahead['mean']} | wins |"


def test_the_page_comes_from_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(settings.SETTINGS, "signs", SETTING)
    kept = ("plain sum", "uncertainty weighting", dedicated.DEFAULT, "lottery ticket", f"{dedicated.DEFAULT}, one cut")
    for group in ("balanced", "costly"):
        methods = [method for method in dedicated.GROUPS[group] if method.name in kept]
        monkeypatch.setitem(dedicated.GROUPS, group, methods)
    run = ["--data", "signs", "--out", str(tmp_path), "--quick", "--seeds", "2"]
    dedicated.main([*run, "--groups", "balanced", "costly"])
    dedicated.main([*run, "--groups", "balanced", "costly"])  # goes on where it was: nothing is left to do
    store = Store(tmp_path / "balanced", "signs")
    assert len(store.runs()) == 2 * (1 + 2 + 2)  # dense, two dense methods, one rule at two amounts
    assert len(Store(tmp_path / "costly", "signs").runs()) == 2 * (
        1 + 2 + 2
    )  # dense, a ticket and one cut at two amounts
    summary = Summary(store.runs(), [KnownTask(**task) for task in store.setting_facts()["tasks"]])
    page = tmp_path / "page.md"
    dedicated.main([*run, "--page", str(page)])
    text = page.read_text()
    keys = [("plain sum", 0.0), ("uncertainty weighting", 0.0), (dedicated.DEFAULT, 0.9)]
    assert table(summary, keys, compare(summary, [(key, keys[-1]) for key in keys])) in text
    assert "| lottery ticket | 98% | 37 |" in text
    assert "### Both together" not in text
    assert f"| {dedicated.DEFAULT}, one cut | 98% | 10 |" in text
    assert "trained longer" not in text
    shutil.copytree(store.folder, tmp_path / "long" / "balanced" / "signs")
    dedicated.main([*run, "--page", str(page)])
    longer, short = page.read_text().split("## signs, trained longer")[1].split("## signs\n")
    assert "lottery" not in longer
    assert longer.strip() in short
    if importlib.util.find_spec("torchjd"):
        dedicated.main([*run, "--groups", "after-PCGrad"])
        dedicated.main([*run, "--page", str(page)])
        assert f"| PCGrad, then {dedicated.DEFAULT} | 95% | 10 |" in page.read_text()
        assert "| PCGrad, then tuned on the sum | 0% | 10 |" in page.read_text()
