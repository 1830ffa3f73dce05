"""The harness of benchmarks/accuracy.py, on a made-up problem: what it runs, what it counts, how it goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

pytest.importorskip("torchmetrics", reason="needs pip install 'disparse-plugin[benchmarks]'")

import accuracy
import accuracy_tables
from data_files import write_arrays
from disparse_plugin.masks import masks_of
from models.paper_network import PaperNetwork
from multitask import settings
from multitask.problem.relative import Interval, changes, mean_change
from multitask.problem.tasks import normals, segmentation
from multitask.pruning.methods import METHODS
from multitask.pruning.procedures import counts
from multitask.report import verdict
from multitask.report.results import KnownTask, load
from multitask.report.summary import Summary
from multitask.runs import Store
from multitask.training.bench import Bench, Course, batch_order
from signs import BUDGET, SETTING, command, made_up

AMOUNT = 0.9
CPU = torch.device("cpu")


@pytest.fixture
def bench() -> Bench:
    return Bench(SETTING, made_up(), seed=3, dense_rate=1e-2, device=CPU)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(settings.SETTINGS, "signs", SETTING)


CHANNEL_METHODS = [method for method in METHODS.values() if method.family == "channels"]


@pytest.mark.parametrize(
    "method",
    [method for method in METHODS.values() if method.name != "dense" and method not in CHANNEL_METHODS],
    ids=lambda m: m.name,
)
def test_every_method_prunes_exactly_what_is_asked(bench: Bench, method) -> None:
    found = bench.sparsity(method.procedure(bench, AMOUNT, 1e-2))
    allowed = len(bench.parts) if "by part" in method.name else 1  # each part is rounded on its own
    assert abs(found["pruned"] - AMOUNT * found["weights"]) <= allowed


@pytest.mark.parametrize("method", CHANNEL_METHODS, ids=lambda m: m.name)
def test_channels_are_gone_up_to_the_amount_and_outputs_stay(bench: Bench, method) -> None:
    before = sum(parameter.numel() for parameter in bench.initial().parameters())
    model = method.procedure(bench, AMOUNT, 1e-2)
    after = sum(parameter.numel() for parameter in model.parameters())
    unit = 256 + 1 + 2 * 32  # the largest there is: one of 128 features, with what makes it and what it feeds
    assert (1 - AMOUNT) * before - 2 * unit < after <= (1 - AMOUNT) * before
    assert {task: output.shape for task, output in model(bench.scored[0][0]).items()} == {
        "left": (16, 2),
        "right": (16, 2),
    }
    found = bench.sparsity(model)
    biases = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 1)
    assert found["weights"] - found["pruned"] == after - biases
    assert not found["emptied"]


def test_a_floor_leaves_every_layer_more_channels(bench: Bench) -> None:
    def least(name: str) -> float:
        pairs = zip(METHODS[name].procedure(bench, 0.99, 1e-2).parameters(), bench.initial().parameters(), strict=True)
        return min(len(after) / len(before) for after, before in pairs)

    assert least("DiSparse channels") < 0.5 * (1 - 0.99) ** 0.5 <= least("DiSparse channels, floor")


def test_channels_have_amounts_of_their_own(tmp_path: Path, known: None) -> None:
    accuracy.main(command(tmp_path / "runs", "--methods", "magnitude", "channels, Taylor, joint", "DiSparse channels"))
    result = load(tmp_path / "runs")[0]
    assert result.summary.amounts == [0.9, 0.98]
    assert result.channels.amounts == [*METHODS["DiSparse channels"].amounts]
    page = "\n\n".join(accuracy_tables.page(result))
    whole, channels = page.split("## Whole channels")
    assert "| DiSparse channels |" not in whole.split("learning rates tried")[0]
    assert str(result.channels.interval("DiSparse channels", 0.75, "worst")) in channels


@pytest.mark.parametrize("name", ["DiSparse Taylor, by part", "DiSparse static, by part"])
def test_budgets_by_part_leave_every_part_the_same_share(bench: Bench, name: str) -> None:
    shares = bench.sparsity(METHODS[name].procedure(bench, AMOUNT, 1e-2))["sparsity"]
    assert shares.keys() == {"shared", "left", "right"}
    assert all(share == pytest.approx(AMOUNT, abs=1e-3) for share in shares.values())


def test_a_floor_leaves_something_in_every_tensor_where_no_floor_does_not(bench: Bench) -> None:
    emptied = [
        bench.sparsity(METHODS[name].procedure(bench, 0.995, 1e-2))["emptied"]
        for name in ("magnitude", "DiSparse Taylor, floor")
    ]
    assert emptied[0]
    assert not emptied[1]


@pytest.mark.parametrize("name", [name for name in METHODS if name != "LTH"])
def test_every_method_takes_the_steps_that_it_says(bench: Bench, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert taken_steps(bench, name, monkeypatch) == METHODS[name].steps(bench) == 18


def test_the_lottery_ticket_takes_more_and_says_so(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert taken_steps(bench, "LTH", monkeypatch) == METHODS["LTH"].steps(bench) > 18


def taken_steps(bench: Bench, name: str, monkeypatch: pytest.MonkeyPatch) -> int:
    taken = []
    monkeypatch.setattr(
        bench, "training_batch", lambda which, real=bench.training_batch: taken.append(1) or real(which)
    )
    METHODS[name].procedure(bench, AMOUNT, 1e-2)
    return len(taken)


def test_twins_see_the_sum_and_differ_in_nothing_else() -> None:
    for method in METHODS.values():
        if method.twin:
            assert METHODS[method.twin].family == method.family
            assert not METHODS[method.twin].ours


def test_budgets_are_compared_with_a_method_of_the_same_family() -> None:
    pairs = [(method, METHODS[method.without]) for method in METHODS.values() if method.without]
    assert pairs
    assert all(method.family == without.family and without.ours for method, without in pairs)


def test_loss_weights_change_the_joint_masks_and_not_those_by_agreement() -> None:
    def kept(name: str, weights: tuple[float, float]) -> Tensor:
        problem = made_up()
        tasks = tuple(replace(task, weight=weight) for task, weight in zip(problem.tasks, weights, strict=True))
        bench = Bench(SETTING, replace(problem, tasks=tasks), 0, 1e-2, CPU)
        masks = masks_of(METHODS[name].procedure(bench, AMOUNT, 0.0))
        return torch.cat([mask.flatten() for mask in masks.values()])

    assert torch.equal(kept("DiSparse static", (1, 1)), kept("DiSparse static", (1, 100)))
    assert not torch.equal(kept("SNIP", (1, 1)), kept("SNIP", (1, 100)))


def test_rounds_prune_the_same_share_of_what_is_left(bench: Bench) -> None:
    model = bench.initial()
    total = bench.sparsity(model)["weights"]
    pruned = counts(model, 0.936, 3)
    assert sum(pruned) == round(0.936 * total)
    left = total - np.cumsum([0, *pruned])
    assert left[1:] / left[:-1] == pytest.approx(0.4, abs=1e-3)


def test_a_course_stopped_and_gone_on_with_is_one_course(bench: Bench) -> None:
    whole, halves = bench.initial(), bench.initial()
    Course(bench, whole, 8, 1e-2, stage=0).run()
    course = Course(bench, halves, 8, 1e-2, stage=0)
    course.run(until=3)
    course.run()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), halves.parameters(), strict=True))


def test_batches_go_through_all_samples_before_any_comes_again() -> None:
    order = batch_order(10, 5, 4, torch.Generator().manual_seed(0)).flatten()
    assert sorted(order[:10].tolist()) == sorted(order[10:].tolist()) == [*range(10)]


def test_changes_are_signed_by_the_direction_of_each_metric() -> None:
    task = KnownTask("depth", {"error": "lower", "delta": "higher"}, 1.0)
    dense, pruned = {"depth": {"error": 2.0, "delta": 0.5}}, {"depth": {"error": 3.0, "delta": 0.4}}
    assert changes([task], pruned, dense)["depth"] == pytest.approx((-50 - 20) / 2)
    assert mean_change([task], dense, dense) == 0


def test_intervals_are_those_of_students_t() -> None:
    for count in (2, 5, 40):
        values = np.random.default_rng(count).normal(size=count)
        expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
        found = Interval(values.tolist())
        assert (found.mean - found.half, found.mean + found.half) == pytest.approx([*expected])


def test_an_interrupted_benchmark_goes_on_where_it_was(tmp_path: Path, known: None) -> None:
    methods = ["--methods", "random", "DiSparse adaptive"]
    accuracy.main(command(tmp_path / "whole", *methods))
    accuracy.main(command(tmp_path / "broken", *methods))
    path = tmp_path / "broken" / "signs" / "seed1.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]))
    accuracy.main(command(tmp_path / "broken", *methods))
    assert len(lines) == 5
    assert timeless(tmp_path / "broken") == timeless(tmp_path / "whole")


def timeless(folder: Path) -> list[dict]:
    lines = [line for path in sorted(folder.glob("signs/seed*.jsonl")) for line in path.read_text().splitlines()]
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


def test_runs_of_another_budget_are_not_mixed(tmp_path: Path, known: None) -> None:
    accuracy.main(command(tmp_path, "--methods", "magnitude", "--seeds", "1"))
    with pytest.raises(ValueError, match=r"out: .* holds runs of another budget"):
        accuracy.main(command(tmp_path, "--methods", "magnitude", "--quick"))


def test_weights_must_fit_the_tasks(tmp_path: Path, known: None) -> None:
    with pytest.raises(ValueError, match=r"weights: one positive number for each of left, right; found \[1\.0\]"):
        accuracy.main(command(tmp_path, "--weights", "1"))


def test_an_unknown_method_is_told_what_there_is(tmp_path: Path, known: None) -> None:
    with pytest.raises(ValueError, match="method: one of dense, random"):
        accuracy.main(command(tmp_path, "--methods", "magic"))


def test_arbiters_that_are_no_different_with_two_tasks_are_left_out(tmp_path: Path, known: None) -> None:
    accuracy.main(command(tmp_path, "--seeds", "1", "--methods", "magnitude", "adaptive, majority"))
    assert {run.method for run in Store(tmp_path, "signs").runs()} == {"dense", "magnitude"}


def test_tables_and_plots_come_from_the_runs(tmp_path: Path, known: None) -> None:
    accuracy.main(command(tmp_path / "runs", "--methods", "random", "Taylor, joint", "DiSparse Taylor"))
    overview = tmp_path / "accuracy.md"
    overview.write_text(f"before\n{accuracy_tables.BEGIN}\nold\n{accuracy_tables.END}\nafter\n")
    accuracy_tables.main(["--results", str(tmp_path / "runs"), "--docs", str(tmp_path)])
    text = overview.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    summary = load(tmp_path / "runs")[0].summary
    shown = str(summary.interval("DiSparse Taylor", 0.9, "worst"))
    assert shown in overview.read_text()
    assert shown in (tmp_path / "accuracy" / "signs.md").read_text()
    won, tied, lost = verdict.counts([*verdict.twins(summary)], "worst")
    assert f"{won} / {tied} / {lost}" in text
    assert (tmp_path / "images" / "accuracy-signs.png").stat().st_size > 10_000


def test_the_best_baseline_is_chosen_without_the_test_split(tmp_path: Path, known: None) -> None:
    accuracy.main(command(tmp_path, "--methods", "random", "magnitude", "DiSparse Taylor"))
    store = Store(tmp_path, "signs")
    tasks = [KnownTask(**task) for task in store.setting_facts()["tasks"]]
    runs = store.runs()
    for run in runs:
        if run.method == "random":  # far ahead in validation, far behind in test
            for task in run.validation:
                run.validation[task]["accuracy"], run.test[task]["accuracy"] = 9.0, 0.0
    assert Summary(runs, tasks).best_baseline(0.9).name == "random"


@pytest.mark.parametrize("name", ["nyuv2", "nyuv2-40", "cityscapes"])
def test_the_papers_experiments_run_on_files_in_their_layout(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "nyuv2": {"classes": 13},
        "nyuv2-40": {"classes": 40},
        "cityscapes": {"label": "label_19", "normals": False, "classes": 19},
    }
    folder = name.removesuffix("-40")
    write_arrays(tmp_path, folder, size=(24, 40), counts=(20, 3), **files[name])
    real = settings.SETTINGS[name]
    narrow = replace(
        real,
        load=lambda root: getattr(settings, folder)(root, classes=files[name]["classes"], crop=17),
        network=lambda problem: PaperNetwork({task.name: task.outputs for task in problem.tasks}, width=4, hidden=8),
    )
    monkeypatch.setitem(settings.SETTINGS, name, narrow)
    out = tmp_path / "runs"
    methods = ["SNIP", "DiSparse static", "DiSparse dynamic", "DiSparse Taylor"]
    folders = ["--root", str(tmp_path), "--out", str(out)]
    accuracy.main(
        ["--data", name, *folders, "--quick", "--seeds", "1", "--amounts", "0.9", "--methods", *methods],
    )
    runs = {run.method: run for run in Store(out, name).runs()}
    assert runs.keys() == {"dense", *methods}
    assert {run.rate for run in runs.values() if run.method != "dense"} == {*real.budget.rates, *real.budget.tune_rates}
    assert all(abs(run.pruned - round(0.9 * run.weights)) == 0 for run in runs.values() if run.method != "dense")


def test_the_papers_network_and_hyperparameters_are_those_of_the_settings() -> None:
    budget = settings.SETTINGS["taskonomy"].budget
    assert (budget.train, budget.tune, budget.optimizer, budget.decay) == (100_000, 4_000, "adam", 5e-4)
    assert (budget.step_decay, budget.rates, budget.tune_rates) == ((0.3, 12_000), (1e-4,), (1e-6,))
    assert (budget.scored, budget.scored_size, budget.update_every) == (50, 4, 250)
    problem = replace(made_up(), tasks=(segmentation("segmentation", 40), normals("normals")), shape=(3, 65, 65))
    with torch.device("meta"):
        network = settings.SETTINGS["nyuv2"].network(problem)
    assert sum(p.numel() for n, p in network.named_parameters() if p.dim() == 4) == 67_581_120


def test_the_learning_rate_steps_down_where_the_budget_says_so() -> None:
    stepped = replace(SETTING, budget=replace(BUDGET, step_decay=(0.5, 4)))
    bench = Bench(stepped, made_up(), 0, 1e-2, CPU)
    course, rates = Course(bench, bench.initial(), 10, 0.8, stage=0), []
    course.run(after_step=lambda _: rates.append(course.optimizer.param_groups[0]["lr"]))
    assert rates == pytest.approx([0.8] * 4 + [0.4] * 4 + [0.2] * 2)
