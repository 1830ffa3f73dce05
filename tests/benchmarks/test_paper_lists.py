"""The archives of the paper's experiments, from tiny files in their layout."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from archive_files import SIZE, save, write_cityscapes, write_nyuv2, write_taskonomy_list
from multitask.data import paper_lists
from multitask.data.disk import MEAN, SPREAD
from multitask.data.paper_lists import cityscapes_list, nyuv2_list, taskonomy_list
from multitask.problem.tasks import IGNORE, segmentation
from multitask.settings import SETTINGS


def grey(split):
    pictures, _ = split.batch(torch.arange(len(split)))
    return (pictures[:, 0, 0, 0] * SPREAD[0] + MEAN[0]).tolist()


def test_nyuv2_is_read_as_it_is_listed(tmp_path):
    write_nyuv2(tmp_path)
    problem = nyuv2_list(tmp_path, only=("segmentation", "normals", "depth"))
    assert [len(getattr(problem, split)) for split in ("train", "validation", "test")] == [9, 1, 3]
    assert grey(problem.test) == pytest.approx([0.0, 10 / 255, 20 / 255], abs=1e-6)
    _, targets = problem.test.batch(torch.tensor([2]))
    assert targets["segmentation"][0, :, 0].unique().tolist() == [IGNORE]
    assert targets["segmentation"][0, :, 1:].unique().tolist() == [2]
    assert bool((targets["normals"][0, :, 0] == 0).all())
    expected = F.normalize(2 * torch.tensor([254.0, 127.0, 127.0]) / 255 - 1, dim=0)
    torch.testing.assert_close(targets["normals"][0, :, 1, 0], expected)
    raw = nyuv2_list(tmp_path, only=("normals",), centred=False).test.batch(torch.tensor([2]))[1]["normals"]
    torch.testing.assert_close(raw[0, :, 1, 0], F.normalize(torch.tensor([127.0, 127.0, 254.0]), dim=0))
    assert targets["depth"].shape == (1, 1, *SIZE)
    assert targets["depth"].unique().tolist() == [3.0]
    assert {task.name: task.weight for task in problem.tasks} == {"segmentation": 1.0, "normals": 20.0, "depth": 1.0}


def test_cityscapes_takes_the_labels_of_19_classes(tmp_path):
    write_cityscapes(tmp_path)
    problem = cityscapes_list(tmp_path)
    assert grey(problem.test) == pytest.approx([0.0, 0.01, 0.02], abs=1e-6)
    _, targets = problem.test.batch(torch.tensor([2]))
    assert targets["segmentation"][0, :, 0].unique().tolist() == [IGNORE]
    assert targets["segmentation"][0, :, 1:].unique().tolist() == [2]
    assert targets["depth"].unique().tolist() == [2.0]
    pictures, _ = problem.train.batch(torch.tensor([0]))
    assert pictures.shape == (1, 3, 224, 224)


def test_taskonomy_is_found_where_the_files_are(tmp_path):
    files = write_taskonomy_list(tmp_path)
    problem = taskonomy_list(files)
    splits = {split: getattr(problem, split).keys for split in ("train", "validation", "test")}
    assert [len(keys) for keys in splits.values()] == [4, 2, 2]
    buildings = {split: {entry[0].parent.name for entry in keys} for split, keys in splits.items()}
    assert len(buildings["train"] | buildings["validation"]) == 3  # none is in both
    _, targets = problem.test.batch(torch.tensor([0]))
    assert list(targets) == [task.name for task in problem.tasks]
    assert targets["segmentation"][0, 0].unique().tolist() == [IGNORE]  # stored 0
    assert targets["segmentation"][0, 3].unique().tolist() == [2]  # stored 3


def test_the_loss_is_the_weighted_mean_of_cross_entropy():
    factors = torch.tensor([0.5, 2.0, 1.0])
    outputs, target = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    target[:, 0] = IGNORE
    found = segmentation("s", 3, class_weights=factors).loss(outputs, target)
    torch.testing.assert_close(found, F.cross_entropy(outputs, target, factors, ignore_index=IGNORE))
    nothing = segmentation("s", 3, class_weights=factors).loss(outputs, torch.full_like(target, IGNORE))
    assert nothing == 0


def test_taskonomy_weighs_its_classes(tmp_path):
    problem = taskonomy_list(write_taskonomy_list(tmp_path), only=("segmentation",))
    outputs, target = torch.randn(1, 17, 4, 4), torch.randint(0, 17, (1, 4, 4))
    expected = F.cross_entropy(outputs, target, torch.linspace(0.5, 2.0, 17))
    torch.testing.assert_close(problem.tasks[0].loss(outputs, target), expected)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda root: (root / "cityscape.json").unlink(), FileNotFoundError, "found no such file or folder; see paper"),
        (
            lambda root: (root / "cityscape.json").write_text('{"train": []}'),
            ValueError,
            "needs a list of samples under 'train'",
        ),
        (
            lambda root: (root / "cityscape.json").write_text('{"train": [["a.npy"]]}'),
            ValueError,
            "needs 5 files for each sample",
        ),
        (lambda root: (root / "test/depth/1.npy").unlink(), FileNotFoundError, "test/depth/1.npy, found no such file"),
        (lambda root: np.save(root / "test/image/1.npy", np.ones(SIZE)), ValueError, "needs shape (height, width, 3)"),
        (lambda root: np.save(root / "test/label_19/1.npy", np.ones((2, 6, 8))), ValueError, "or (height, width, 1)"),
        (
            lambda root: np.save(root / "test/label_19/1.npy", np.ones((3, 8))),
            ValueError,
            "needs segmentation as large",
        ),
    ],
)
def test_what_is_missing_or_wrong_is_named(tmp_path, spoil, error, message):
    write_cityscapes(tmp_path)
    spoil(tmp_path)
    with pytest.raises(error, match=re.escape(message)):
        cityscapes_list(tmp_path).test.batch(torch.tensor([1]))


def test_a_picture_of_other_channels_is_named(tmp_path):
    write_nyuv2(tmp_path)
    save(tmp_path / "test" / "seg" / "1.png", np.zeros((*SIZE, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"needs 1 channels in .*1\.png, found 3"):
        nyuv2_list(tmp_path).test.batch(torch.tensor([1]))


def test_class_weights_must_fit(tmp_path):
    files = write_taskonomy_list(tmp_path)
    np.save(files / "semseg_prior_factor.npy", np.ones(16))
    with pytest.raises(ValueError, match=r"needs 17 class weights .*, found 16"):
        taskonomy_list(files)


def test_every_list_has_a_setting():
    loaders = {SETTINGS[f"{name}-archive"].load for name in ("nyuv2", "cityscapes", "taskonomy")}
    assert loaders == {paper_lists.nyuv2_list, paper_lists.cityscapes_list, paper_lists.taskonomy_list}
