"""The benchmarks of structured pruning: what their tables say, and what their data are."""

from __future__ import annotations

import argparse
import importlib.metadata
import time
from typing import Any

import pytest
import torch

pytest.importorskip("timm", reason="needs timm")
pytest.importorskip("segmentation_models_pytorch", reason="needs segmentation-models-pytorch")
coverage: Any = pytest.importorskip("structured_coverage", reason="needs torch-pruning")
page: Any = pytest.importorskip("coverage_page")
normalizer: Any = pytest.importorskip("structured_normalizer", reason="needs scikit-learn")


def entry(row: str, **changes: Any) -> dict[str, Any]:
    whole = {
        "parameters": 0.7,
        "macs": 0.6,
        "outside": 0.1,
        "outputs": 2e-15,
        "losses": 0.0,
        "deviation": 1e-9,
        "replay": True,
        "trains": True,
        "skipped": {"head": "makes an output of the model"},
        "seconds": 3.0,
        "versions": "torch 2.6.0, timm 1.0.8",
    }
    return {"row": row, **whole, **changes}


def test_the_coverage_page_says_what_lost_what_was_asked() -> None:
    partly = entry("timm/resnet26d", skipped={"conv1": "a removal breaks the model: the forward fails"})
    wrong = entry("modules/GLU", outputs=1e-2)
    cannot = {"row": "timm/dla34", "error": "ValueError: no | way", "versions": "torch 2.14.1, timm 1.0.31"}
    text = page.page([entry("timm/resnet18"), partly, cannot, wrong])
    assert (
        "All: 4 rows: 2 lose all that was asked, 1 partly, 1 cannot; 2 equal masking, are replayed and train." in text
    )
    assert "of which 49 lost all: 3 rows: 1 lose all" in text
    assert "| resnet18 | all | 0.70 | 0.60 | 0.10 | 2e-15 | 0e+00 | yes | yes | 3 |  |" in text
    assert "| resnet26d | **partly** |" in text
    assert "1: a removal breaks the model: the forward fails |" in text
    assert "| dla34 | cannot | | | | | | | | | ValueError: no / way |" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    assert "with torch 2.6.0, timm 1.0.8 (3 rows); torch 2.14.1, timm 1.0.31 (1 rows)." in text


def test_every_row_has_a_name_of_its_own_and_those_of_before_come_first() -> None:
    names = coverage.rows()
    assert len(set(names)) == len(names) > 200
    assert names[:2] == ["timm/resnet18", "timm/resnet26d"]
    assert names[page.OLD_ROWS - 1] == "smp/DPT+2"


def test_a_row_runs_in_a_process_of_its_own() -> None:
    found = coverage.guarded("transformers/DistilBERT", 120)
    assert found["parameters"] > 0.4
    assert page.is_right(found)
    assert not page.left_alone(found)
    assert f"torchvision {importlib.metadata.version('torchvision')}, transformers " in found["versions"]


def test_a_row_that_does_not_end_or_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(_: str) -> dict[str, Any]:
        raise MemoryError

    monkeypatch.setattr(coverage, "row", greedy)
    assert coverage.guarded("modules/GLU", 60)["error"] == "out of memory (8 GB)"
    monkeypatch.setattr(coverage, "row", lambda _: time.sleep(60))
    assert coverage.guarded("modules/GLU", 0.05)["error"] == "no end within 0 s"


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


def test_times_are_shares_of_the_first_model_of_the_same_round() -> None:
    interleaved: Any = pytest.importorskip("interleaved")
    order: list[str] = []

    def sleeper(name: str, seconds: float) -> Any:
        return lambda _: (order.append(name), time.sleep(seconds))

    found = interleaved.shares({"dense": sleeper("dense", 0.01), "half": sleeper("half", 0.005)}, torch.zeros(1), 3)
    assert order == ["dense", "half"] * 5
    assert found["dense"][1] == 1.0
    assert 0.005 <= found["half"][0] < found["dense"][0]
    assert found["half"][1] < 1


def test_the_table_of_times_compares_in_every_way_of_running() -> None:
    latency: Any = pytest.importorskip("structured_latency")
    torch.set_num_threads(1)
    models = {name: torch.nn.Conv2d(3, 4, 3) for name in ("dense", "other")}
    options = argparse.Namespace(rounds=2, compile=False)
    lines = latency.table(models, {}, torch.zeros(1, 3, 8, 8), options).splitlines()
    assert lines[0].split() == ["MACs", "left", "plain,", "ms", "left", "channels_last,", "ms", "left"]
    assert lines[1].split()[0::2] == ["dense", lines[1].split()[2], lines[1].split()[4]]
    assert [cell for cell in lines[1].split() if cell == "100.0%"] == ["100.0%"] * 3
    assert "conv" in latency.operations(models, torch.zeros(1, 3, 8, 8), 1)
