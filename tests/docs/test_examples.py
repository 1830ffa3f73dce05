"""The quickstart example: it runs, its table is complete and exact, its data and comparison are what it says."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import itertools
import re
import runpy
import sys
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy import ndimage

from places import ROOT, python

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
    done = python(QUICKSTART, "--quick", "--seed", "3", "--out", out, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "its figures mean nothing" in done.stdout
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
    assert len(quickstart.METHODS) == 7


def test_every_method_prunes_exactly_the_asked_share_of_all_weights(quickstart, quick_run):
    weights = count_weights(quickstart)
    for row in quick_run[0]:
        share = float(row["asked"].rstrip("%")) / 100
        assert int(row["pruned"]) == round(share * weights), row


def test_the_table_says_how_each_task_and_part_fares(quick_run):
    for row in quick_run[0]:
        for column in ("trunk", "head 1", "head 2", "digit, %"):
            assert 0 <= float(row[column]) <= 100, row
        assert 0 < float(row["turn, °"]) < 60, row
        assert float(row["seconds"]) >= 0  # a quick run may round to nothing


def test_the_plot_is_a_picture_in_a_folder_made_for_it(quick_run):
    assert (quick_run[1] / "quickstart.png").read_bytes().startswith(b"\x89PNG")


def test_the_main_job_shows_what_is_recommended(quickstart):
    model, data = quickstart.TwoHeads(), load(quickstart, seed=0)[0].first(1)
    shown = quickstart.METHODS[0].prune(model, data, 0.5)
    assert (
        shown.criterion
        == quickstart.disparse_pretrained(quickstart.TwoHeads(), quickstart.task_losses, data, 0.5).criterion
    )
    assert shown.tasks == quickstart.TASKS
    assert quickstart.METHODS[1].prune(quickstart.TwoHeads(), data, 0.5).tasks == ("joint",)


def test_no_digit_is_both_trained_and_tested_on(quickstart):
    train, test = (set(pictures.digits.tolist()) for pictures in load(quickstart, seed=0))
    assert train.isdisjoint(test)
    assert len(train) > 2 * len(test) > 500  # nearly all of three quarters and of one quarter of the 1797 digits


def test_a_picture_shows_its_digit_turned_as_its_answers_say(quickstart):
    bundled = quickstart.load_digits()
    for pictures in load(quickstart, seed=1):
        images, answers = pictures.batch(slice(0, 40))
        assert answers["digit"].tolist() == bundled.target[pictures.digits[:40]].tolist()
        assert answers["turn"].abs().max() <= 60
        for image, place, degrees in zip(images[:, 0], pictures.digits[:40], answers["turn"].tolist(), strict=True):
            upright = np.kron(bundled.images[place] / 16, np.ones((2, 2)))
            ways = [ndimage.rotate(upright, sign * degrees, reshape=False, order=1) for sign in (-1, 1)]
            clockwise, other = (np.abs(way - image.numpy()).mean() for way in ways)  # scipy turns the other way round
            assert clockwise < 0.13, degrees  # that is made up of blocks, this is interpolated
            assert abs(degrees) < 15 or 1.5 * clockwise < other, degrees


def test_the_same_seed_gives_the_same_rows_and_another_seed_others(quickstart):
    runs = [list(itertools.islice(quickstart.compare(quickstart.QUICK, seed, CPU), 4)) for seed in (5, 5, 6)]
    first, again, other = ([row._replace(seconds=0.0) for row in rows] for rows in runs)
    assert first == again
    assert first != other


def test_every_copy_is_tuned_for_as_long(quickstart, monkeypatch):
    steps = []
    monkeypatch.setattr(quickstart, "train", lambda *arguments: steps.append(arguments[2]))
    monkeypatch.setattr(quickstart, "AMOUNTS", (0.9,))
    rows = list(quickstart.compare(quickstart.QUICK._replace(train=7, tune=5), 0, CPU))
    assert steps == [7, *(5 for _ in rows)]


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
    """Run an example, in this process: half of a quick run of its own would be imports."""
    script, text = str(ROOT / "examples" / f"{name}.py"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), contextlib.redirect_stdout(text):
        warnings.simplefilter("default")  # as in a run of its own
        patch.setattr(sys, "argv", [script, "--quick", "--seed=1", f"--out={out}", *more])
        runpy.run_path(script, run_name="__main__")
    says_so = "its figures mean nothing" in text.getvalue()
    assert says_so == (name != "semi_structured")  # where two of four are left, however few steps there are
    return text.getvalue()


def test_the_smp_example_prunes_both_tasks_to_the_asked_amount(tmp_path: Path) -> None:
    text = run_quickly("smp_two_task", tmp_path, "--amount=0.8", "--encoder=mobilenet_v2")
    assert re.search(r"^all prunable .* 80\.00 %$", text, re.MULTILINE)
    assert len(re.findall(r"^(?:dense|summed loss|DiSparse) +[\d.]+% +[\d.]+%$", text, re.MULTILINE)) == 3
    assert (tmp_path / "smp_two_task.png").stat().st_size > 10_000


def test_a_detector_needs_no_more_than_its_own_losses(tmp_path: Path) -> None:
    text = run_quickly("detector", tmp_path)
    assert re.findall(r"^(\S[A-Za-z ]+?)  +[\d.]+% +[\d.]+$", text, re.MULTILINE) == [
        "dense",
        "per task",
        "summed loss",
        "LAMP",
        "magnitude",
    ]
    assert (tmp_path / "detector.png").stat().st_size > 10_000


def test_the_text_model_is_pruned_to_the_asked_amount(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs pip install 'disparse-plugin[transformers]'")
    text = run_quickly("text_two_heads", tmp_path)
    assert re.search(r"^all prunable .* 95\.00 %$", text, re.MULTILINE)
    assert (tmp_path / "text_two_heads.png").stat().st_size > 10_000


def test_the_training_script_ends_at_the_asked_amount(tmp_path: Path) -> None:
    text = run_quickly("trainer_six_lines", tmp_path, "--amount=0.9")
    assert re.search(r"^all prunable .* 90\.00 %$", text, re.MULTILINE)
    source = (ROOT / "examples" / "trainer_six_lines.py").read_text(encoding="utf-8")
    assert source.count("  # <-\n") == 6
    assert (tmp_path / "trainer_six_lines.png").stat().st_size > 10_000


def test_a_trunk_of_timm_loses_channels(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning", reason="needs pip install 'disparse-plugin[structured]'")
    text = run_quickly("structured_timm", tmp_path, "--amounts=0.5", "--model=resnet10t")
    assert re.findall(r"^(\w[a-z ]+?) +(\d+%)(?: +[\d.]+){5}$", text, re.MULTILINE) == [
        ("dense", "0%"),
        ("per task", "50%"),
        ("summed loss", "50%"),
        ("magnitude", "50%"),
    ]
    assert (tmp_path / "structured_timm.png").stat().st_size > 10_000


def test_a_small_smp_model_comes_back_from_its_file(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning", reason="needs pip install 'disparse-plugin[structured]'")
    text = run_quickly("structured_smp", tmp_path, "--encoder=mobilenet_v2")
    rows = dict(
        re.findall(r"^(dense|channels removed|fine-tuned|rebuilt from file) +([\d.]+ +[\d.]+)$", text, re.MULTILINE)
    )
    assert len(rows) == 4
    assert rows["rebuilt from file"] == rows["fine-tuned"]
    assert (tmp_path / "structured_smp.png").stat().st_size > 10_000


def test_sparse_training_keeps_the_asked_number_of_weights(quickstart, tmp_path: Path) -> None:
    rows = read_table(run_quickly("sparse_training", tmp_path, "--amounts=0.9"))
    assert [row["method"] for row in rows][:3] == ["DiSparse dynamic", "RigL", "SET"]
    assert {int(row["pruned"]) for row in rows} == {round(0.9 * count_weights(quickstart))}
    assert (tmp_path / "sparse_training.png").stat().st_size > 10_000


def test_amounts_are_shown_as_they_were_asked_for(quickstart, tmp_path: Path) -> None:
    rows = read_table(run_quickly("sparse_training", tmp_path, "--amounts=0.999"))
    assert {row["asked"] for row in rows} == {"99.9%"}


@pytest.mark.parametrize(
    ("name", "flag"),
    [("sparse_training", "--seeds"), ("structured_timm", "--epochs"), ("watershed", "--batches")],
)
def test_a_count_below_one_is_refused_by_its_name(quickstart, name: str, flag: str, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_quickly(name, tmp_path, f"{flag}=0")
    assert f"{flag}: must be at least 1, found 0" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "words"), [({"seg": 0}, "found no rgb"), ({"rgb": 0, "seg": 0}, "found 3 pictures")])
def test_the_watershed_says_what_is_missing_in_data_of_ones_own(given, words, tmp_path: Path, capsys) -> None:
    shapes = {"rgb": (3, 16, 16, 3), "seg": (3, 16, 16)}
    np.savez(tmp_path / "own.npz", **{name: np.zeros(shapes[name]) for name in given})
    with pytest.raises(SystemExit) as ended:
        run_quickly("watershed", tmp_path, "--data", str(tmp_path / "own.npz"))
    assert words in f"{ended.value} {capsys.readouterr().err}"


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "examples").glob("*.py"))])
def test_an_output_folder_that_cannot_be_made_is_said_before_the_work(quickstart, name, tmp_path, monkeypatch) -> None:
    for package in ("transformers", "torch_pruning"):
        pytest.importorskip(package, reason="needs pip install 'disparse-plugin[transformers,structured]'")
    (tmp_path / "file").touch()
    monkeypatch.setattr(torch.Tensor, "backward", None)
    monkeypatch.setattr(torch.autograd, "grad", None)
    with pytest.raises(OSError, match="file"):
        run_quickly(name, tmp_path / "file" / "out")


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "examples").glob("*.py"))])
def test_all_examples_take_the_same_options(name: str) -> None:
    source = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    assert [flag for flag in ("--device", "--seed", "--out", "--quick") if f'"{flag}"' not in source] == []


def test_two_of_four_are_left_everywhere(tmp_path: Path) -> None:
    text = run_quickly("semi_structured", tmp_path)
    assert text.count("non-zero in each block of 4: [2]") == 4
    assert (tmp_path / "semi_structured.png").stat().st_size > 10_000


def test_the_pages_of_the_gallery_are_those_of_its_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    gallery = importlib.import_module("gallery")
    assert sorted(gallery.ORDER) == sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
    runs = [path.stem for path in gallery.RUNS.glob("*.txt")]
    assert sorted(runs) == sorted(gallery.ORDER)
    for name in gallery.ORDER:
        page = (ROOT / "docs" / "gallery" / f"{name}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {gallery.describe(name)[0]}\n"), "run python docs/gallery.py --pages"
        assert gallery.result_of(name) in page, "run python docs/gallery.py --pages"
        assert (gallery.PICTURES / f"{name}.png").exists()
    for table, place in ((gallery.readme_table(), ROOT), (gallery.examples_table(), ROOT / "examples")):
        assert table in (place / "README.md").read_text(encoding="utf-8"), "run python docs/gallery.py --pages"
