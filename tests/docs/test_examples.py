"""The quickstart example: it runs, its table is complete and exact, its data and comparison are what it says."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from places import ROOT

for package in ("timm", "sklearn", "matplotlib"):
    pytest.importorskip(package, reason="the examples need pip install 'disparse-plugin[examples]'")

QUICKSTART = ROOT / "examples" / "quickstart.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart", QUICKSTART)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quickstart"] = module  # where the classes defined in the file look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, str]], Path]:
    """Run the example as a user does; return its table and the folder of its plot."""
    out = tmp_path_factory.mktemp("quickstart") / "new"
    command = [sys.executable, str(QUICKSTART), "--quick", "--seed", "3", "--out", str(out)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return read_table(done.stdout), out


def read_table(text: str) -> list[dict[str, str]]:
    """Read a Markdown table: one dict per row, keyed by the header."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    header, _, *rows = lines
    return [dict(zip(header, row, strict=True)) for row in rows]


def load(quickstart: ModuleType, seed: int) -> tuple:
    return quickstart.load_pictures(quickstart.QUICK._replace(train_pictures=4000, test_pictures=2000), seed, CPU)


def count_weights(quickstart: ModuleType) -> int:
    return sum(module.weight.numel() for module, _ in quickstart.prunable_parameters(quickstart.TwoHeads()))


def test_the_table_has_every_method_at_every_sparsity_after_the_dense_network(quickstart, quick_run):
    dense, *rows = quick_run[0]
    assert (dense["method"], dense["pruned"]) == ("dense", "0")
    wanted = itertools.product(("90%", "95%", "98%"), [method.name for method in quickstart.METHODS])
    assert [(row["asked"], row["method"]) for row in rows] == list(wanted)
    assert len(quickstart.METHODS) == 9


def test_every_method_prunes_exactly_the_asked_share_of_all_weights(quickstart, quick_run):
    weights = count_weights(quickstart)
    for row in quick_run[0]:
        share = float(row["asked"].rstrip("%")) / 100
        assert int(row["pruned"]) == round(share * weights), row


def test_the_table_says_how_each_task_and_part_fares(quick_run):
    for row in quick_run[0]:
        for column in ("trunk", "head 1", "head 2", "top-left", "bottom-right"):
            assert 0 <= float(row[column]) <= 100, row
        assert float(row["seconds"]) >= 0  # a quick run may round to nothing


def test_the_plot_is_a_picture_in_a_folder_made_for_it(quick_run):
    assert (quick_run[1] / "quickstart.png").read_bytes().startswith(b"\x89PNG")


def test_no_digit_is_both_trained_and_tested_on(quickstart):
    train, test = (set(pictures.digits.flatten().tolist()) for pictures in load(quickstart, seed=0))
    assert train.isdisjoint(test)
    assert len(train) > 2 * len(test) > 500  # nearly all of three quarters and of one quarter of the 1797 digits


def test_a_picture_shows_its_two_digits_where_its_labels_say(quickstart):
    bundled = quickstart.load_digits()
    for pictures in load(quickstart, seed=1):
        first, second = pictures.digits[:20].T.numpy()
        drawn = np.zeros((20, 11, 11))
        for number, (a, b) in enumerate(zip(first, second, strict=True)):
            for y, x in itertools.product(range(8), range(8)):
                drawn[number, y, x] = max(drawn[number, y, x], bundled.images[a, y, x] / 16)
                drawn[number, y + 3, x + 3] = max(drawn[number, y + 3, x + 3], bundled.images[b, y, x] / 16)
        # Enlarged three times by linear interpolation, every third pixel is one of the original.
        np.testing.assert_allclose(pictures.images[:20, 0, 1::3, 1::3].numpy(), drawn, atol=1e-6)
        _, labels = pictures.batch(slice(0, 20))
        assert labels["top-left"].tolist() == bundled.target[first].tolist()
        assert labels["bottom-right"].tolist() == bundled.target[second].tolist()


def test_the_same_seed_gives_the_same_rows_and_another_seed_others(quickstart):
    runs = [list(itertools.islice(quickstart.compare(quickstart.QUICK, seed, CPU), 4)) for seed in (5, 5, 6)]
    first, again, other = ([row._replace(seconds=0.0) for row in rows] for rows in runs)
    assert first == again
    assert first != other


def test_all_trained_copies_train_for_tune_steps_and_those_at_initialisation_for_all(quickstart, monkeypatch):
    steps = []
    monkeypatch.setattr(quickstart, "train", lambda *arguments: steps.append(arguments[2]))
    monkeypatch.setattr(quickstart, "AMOUNTS", (0.9,))
    rows = list(quickstart.compare(quickstart.QUICK._replace(train=7, tune=5), 0, CPU))
    by_method = dict(zip([row.method for row in rows], steps[1:], strict=True))
    assert steps[0] == 7
    assert {method: count for method, count in by_method.items() if count != 5} == {
        "DiSparse static (at init)": 12,
        "SNIP (at init)": 12,
    }


def test_help_names_every_option(quickstart, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        quickstart.main()
    text = capsys.readouterr().out
    assert all(option in text for option in ("--device", "--seed", "--out", "--quick"))


def test_without_matplotlib_it_says_what_to_install_before_it_trains(quickstart, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--out", str(tmp_path)])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'disparse-plugin\[plots\]'"):
        quickstart.main()
    assert capsys.readouterr().out == ""


def run_quickly(name: str, out: Path, *more: str) -> str:
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--quick", "--seed=1", f"--out={out}", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_smp_example_prunes_both_tasks_to_the_asked_amount(tmp_path: Path) -> None:
    text = run_quickly("smp_two_task", tmp_path, "--amount=0.8", "--encoder=mobilenet_v2")
    assert re.search(r"^all prunable .* 80\.00 %$", text, re.MULTILINE)
    assert len(re.findall(r"^(?:dense|summed loss|DiSparse) +[\d.]+% +[\d.]+%$", text, re.MULTILINE)) == 3
    assert (tmp_path / "smp_two_task.png").stat().st_size > 10_000


def test_a_detector_needs_no_more_than_its_own_losses(tmp_path: Path) -> None:
    text = run_quickly("detector", tmp_path)
    assert re.findall(r"^(\S[a-z ]+?)  +[\d.]+% +[\d.]+$", text, re.MULTILINE) == [
        "dense",
        "per task",
        "summed loss",
        "magnitude",
    ]
    assert (tmp_path / "detector.png").stat().st_size > 10_000


def test_the_text_model_is_pruned_to_the_asked_amount(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs pip install 'disparse-plugin[transformers]'")
    text = run_quickly("text_two_heads", tmp_path)
    assert re.search(r"^all prunable .* 80\.00 %$", text, re.MULTILINE)
    assert (tmp_path / "text_two_heads.png").stat().st_size > 10_000


def test_the_training_script_ends_at_the_asked_amount(tmp_path: Path) -> None:
    text = run_quickly("trainer_six_lines", tmp_path, "--amount=0.9")
    assert re.search(r"^all prunable .* 90\.00 %$", text, re.MULTILINE)
    source = (ROOT / "examples" / "trainer_six_lines.py").read_text(encoding="utf-8")
    assert source.count("  # <-\n") == 6
    assert (tmp_path / "trainer_six_lines.png").stat().st_size > 10_000


def test_two_of_four_are_left_everywhere(tmp_path: Path) -> None:
    text = run_quickly("semi_structured", tmp_path)
    assert text.count("non-zero in each block of 4: [2]") == 4
    assert (tmp_path / "semi_structured.png").stat().st_size > 10_000


def test_the_pages_of_the_gallery_are_those_of_its_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    gallery = importlib.import_module("gallery")
    assert sorted(gallery.ORDER) == sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
    runs = [path.stem for path in gallery.RUNS.glob("*.txt")]
    assert len(runs) > 5
    for name in gallery.ORDER:
        page = (ROOT / "docs" / "gallery" / f"{name}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {gallery.describe(name)[0]}\n"), "run python docs/gallery.py --pages"
        assert (name in runs) == bool(gallery.result_of(name))
        assert gallery.result_of(name) in page, "run python docs/gallery.py --pages"
