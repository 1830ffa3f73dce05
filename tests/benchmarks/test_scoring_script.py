"""The benchmark of scoring: its network, its baseline and its table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import scoring
from disparse_plugin import prunable_parameters, score_tasks
from models.paper_network import NYU_V2, TASK_SETS, TASKONOMY, PaperNetwork, random_batches, task_losses
from scoring_variants import CRITERIA, Meter, authors_masks, authors_scores, count_weights, parse, run

QUICK = ["--width=4", "--hidden=8", "--size=33", "--batch=1", "--batches=1"]


@pytest.mark.parametrize(("tasks", "weights"), [(NYU_V2, 67_581_120), (TASKONOMY, 136_705_216)])
def test_the_network_has_the_size_of_the_paper(tasks, weights):
    with torch.device("meta"):
        network = PaperNetwork(tasks)
        shapes = {task: tuple(output.shape) for task, output in network(torch.empty(2, 3, 321, 321)).items()}
    assert count_weights(network) == weights
    assert count_weights(network.trunk) == 21_267_648
    assert shapes == {task: (2, classes, 41, 41) for task, classes in tasks.items()}


@pytest.mark.parametrize("tasks", TASK_SETS.values(), ids=len)
def test_the_authors_procedure_keeps_what_the_package_keeps(tasks):
    """The union of the tasks' top quarters is one cut of the agreement scores; so the two time the same result."""
    network = PaperNetwork(tasks, width=4, hidden=8).eval()
    batches = random_batches(tasks, batches=2, batch=2, size=33)
    shared = len(prunable_parameters(network.trunk))
    # A quarter of every task's weights is a whole number, so all tasks keep exactly the same ratio.
    union, heads = authors_masks(authors_scores(network, batches), shared, 0.25, Meter("cpu"))
    expected = [*union, *(mask for masks in heads.values() for mask in masks)]
    pruned = sum(int((~mask).sum()) for mask in expected)
    found = score_tasks(network, task_losses, batches).masks(pruned)
    assert 0.5 < pruned / count_weights(network) < 0.75
    assert len(found) == len(expected)
    assert all(torch.equal(mask, other) for mask, other in zip(found.values(), expected, strict=True))


@pytest.mark.parametrize("tasks", TASK_SETS)
@pytest.mark.parametrize(
    ("variant", "steps"),
    [
        ("floor", {"scoring"}),
        *((name, {"scoring", "masks"}) for name in CRITERIA),
        ("authors", {"scoring", "topk", "masks"}),
    ],
)
def test_a_procedure_is_measured(variant, steps, tasks, device):
    found = run(parse([f"--variant={variant}", f"--tasks={tasks}", f"--device={device.type}", *QUICK]))
    assert set(found["seconds"]) == set(found["cpu_seconds"]) == set(found["peak_mib"]) == steps
    assert all(value > 0 for step in steps for value in (found["seconds"][step], found["peak_mib"][step]))
    trunk = count_weights(PaperNetwork({}, width=4))
    assert found["scores"] == found["weights"] + (tasks - 1) * trunk
    json.dumps(found)


def test_the_table_holds_medians_of_interleaved_runs(monkeypatch, capsys):
    order, scoring_seconds = [], {"floor": 10.0, "package": 11.0, "recommended": 12.0, "authors": 33.0}

    def measured(arguments, tasks, variant):
        order.append((tasks, variant))
        noise = 5.0 if 4 <= len(order) - 1 < 8 else 1.0  # one busy moment
        seconds = {"scoring": scoring_seconds[variant], "masks": 1.0, "topk": 4.0}
        found = {step: noise * value for step, value in seconds.items()}
        peaks = dict.fromkeys(seconds, 1024.0 * {"floor": 1, "package": 2, "recommended": 3, "authors": 5}[variant])
        facts = {"weights": 7, "scores": 2**28, "torch": "0", "threads": 3, "device": ""}
        return {"seconds": found, "cpu_seconds": dict.fromkeys(seconds, 1.0), "peak_mib": peaks, **facts}

    monkeypatch.setattr(scoring, "run_one", measured)
    scoring.main(["--tasks", "2", "--repeats", "3"])
    printed = capsys.readouterr().out
    assert order == [(2, variant) for _ in range(3) for variant in scoring.VARIANTS]
    for row in (
        "| scoring: b / a | 1.10 |",
        "| scoring: c / b | 3.00 |",
        "| recommended criterion, scoring: d / a | 1.20 | <= 1.35 |",
        "| scores to masks: b / topk of c | 0.25 |",
        "| peak memory of scoring: b - a - scores | +0 MiB |",
        "| peak memory of scoring: c / b | 2.50 |",
    ):
        assert row in printed
    assert "3 torch threads; torch 0" in printed
    scoring.main(["--tasks", "2", "--clock", "cpu", "--repeats", "1"])
    assert "| scoring: c / b | 1.00 |" in capsys.readouterr().out


@pytest.mark.slow
def test_the_script_runs():
    script = Path(scoring.__file__)
    done = subprocess.run([sys.executable, str(script), "--quick"], check=True, capture_output=True, text=True)
    weights = [count_weights(PaperNetwork(tasks, width=4, hidden=8)) for tasks in TASK_SETS.values()]
    assert f"| prunable weights | {weights[0]:,} | {weights[1]:,} |" in done.stdout
    assert sum(line.startswith("| ") for line in done.stdout.splitlines()) == len(scoring.ROWS) + 1
