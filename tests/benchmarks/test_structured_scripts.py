"""The benchmarks of structured pruning: what their tables say, and what their data are."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
import torch

pytest.importorskip("timm", reason="needs timm")
pytest.importorskip("segmentation_models_pytorch", reason="needs segmentation-models-pytorch")
coverage: Any = pytest.importorskip("structured_coverage", reason="needs torch-pruning")
normalizer: Any = pytest.importorskip("structured_normalizer", reason="needs scikit-learn")


def answer(**changes: Any) -> dict[str, Any]:
    whole = {
        "achieved": 0.5,
        "of_all": 0.48,
        "parameters": 0.7,
        "macs": 0.6,
        "deviation": 1e-7,
        "groups": 8,
        "alone": {},
    }
    return {**whole, "seconds": 3.0, **changes}


def test_the_coverage_table_says_how_much_of_what_was_asked() -> None:
    partly = answer(of_all=0.012, alone={"conv1": "a removal breaks the model: the forward fails"})
    results = [
        {"row": "timm/a", "ours": answer(), "bare": {"error": coverage.OUT_OF_MEMORY}},
        {"row": "timm/b", "ours": partly, "bare": {"achieved": 0.5}},
        {
            "row": "timm/c",
            "ours": {"error": "ValueError: no", "seconds": 1.0},
            "bare": {"error": "no end within 120 s"},
        },
    ]
    text = coverage.table(results, {"ours": 300, "bare": 120})
    assert "300 s for `remove_channels` and 120 s for torch-pruning alone" in text
    assert "| timm/a | works | 0.500 | 0.480 | 0.700 | 0.600 | 1e-07 | 8 / 0 |  | 3 | out of memory (8 GB) |" in text
    assert "| timm/b | works, partly (1% of 50%) |" in text
    assert "Of 3 rows, 2 work with `remove_channels` (2 of them equal" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1


@pytest.mark.parametrize(
    ("stderr", "words"), [("Traceback\nMemoryError\n", "out of memory (8 GB)"), ("", "died (-9)"), ("oh\n", "oh\n")]
)
def test_a_row_that_dies_says_why(stderr: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], -9, stdout="", stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert coverage._run_side("timm/a", "bare", 1.0)["error"] == words


def test_a_row_that_wants_too_much_memory_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def greedy(row: str) -> dict[str, Any]:
        raise MemoryError

    monkeypatch.setattr(coverage, "bare", greedy)
    monkeypatch.setattr(coverage.resource, "setrlimit", lambda *_: None)
    coverage._one_row("timm/a", "bare")
    assert json.loads(capsys.readouterr().out) == {"error": "out of memory (8 GB)"}


def test_the_data_of_the_normalizer_benchmark() -> None:
    train, test = normalizer.labelled(0, 0), normalizer.labelled(0, 1)
    assert train["x"].shape == (2000, 1, 16, 48)
    assert bool((train["greatest"] >= train["first"]).all())
    assert not torch.equal(train["x"], test["x"])
    dense = normalizer.scattered(0, 0)
    assert dense["x"].shape == (600, 1, 32, 32)
    assert bool(((dense["classes"] > 0) == (dense["clean"][:, 0] > 0)).all())
    assert set(dense["classes"].unique().tolist()) == {0, 1, 2}


def test_the_normalizer_table_shows_the_worst_task() -> None:
    runs = [({"a": 90.0, "b": 80.0}, {(0.5, "mean"): {"a": 88.0, "b": 70.0, "MACs left": 50.0, "narrowest": 25.0}})]
    assert "| 50% | mean | 50.0 | 25.0 | 88.0 ± 0.0 | 70.0 ± 0.0 | 10.0 ± 0.0 |" in normalizer.table("x", runs)


def test_the_table_of_transformers_says_what_was_removed_and_checked() -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    transformers: Any = pytest.importorskip("structured_transformers")
    torch.set_num_threads(1)
    cells = transformers.row("DistilBERT")
    assert float(cells[1]) > 0.4
    assert float(cells[4]) < transformers.TOLERANCE
    assert cells[5:7] == ["yes", "yes"]
    text = transformers.table([cells, ["Other", "cannot", *[""] * 7]])
    assert "Of 2 models, 1 lose channels, and 1 of them at least 40 %" in text


def test_the_table_of_times_compares_with_the_dense_network() -> None:
    latency: Any = pytest.importorskip("structured_latency")
    torch.set_num_threads(1)
    models = {"dense": torch.nn.Linear(4, 4), "half": torch.nn.Linear(4, 4)}
    found = latency.times(models, torch.zeros(1, 4), rounds=2)
    assert set(found) == set(models)
    assert all(0 < seconds < 1 for seconds in found.values())
    lines = latency.table({}, {"dense": 0.002, "half": 0.001}).splitlines()
    assert lines[1].split() == ["dense", "100.0%", "2.00", "100.0%"]
    assert lines[2].split() == ["half", "100.0%", "1.00", "50.0%"]
