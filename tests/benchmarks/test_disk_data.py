"""NYU-v2, Cityscapes and Taskonomy from tiny files in their public layouts, and what is done to them in training."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image

from data_files import write_arrays, write_taskonomy
from models.paper_network import NYU_V2, TASKONOMY, PaperNetwork
from multitask.data.cityscapes import cityscapes
from multitask.data.disk import MEAN, SPREAD, UNKNOWN, Augment, OnDisk
from multitask.data.nyuv2 import nyuv2
from multitask.data.taskonomy import taskonomy
from multitask.problem.paper_setup import SETUPS
from multitask.problem.tasks import IGNORE

SPLITS = ("train", "validation", "test")


def write_cityscapes(root, **options):
    """The folders of Cityscapes have their labels in label_19, and no normals."""
    write_arrays(root, "cityscapes", **{"label": "label_19", "normals": False, **options})


LOADERS = {"nyuv2": (nyuv2, lambda root: write_arrays(root, "nyuv2"), {"only": ("segmentation", "normals", "depth")})}
LOADERS["cityscapes"] = (cityscapes, write_cityscapes, {})
LOADERS["taskonomy"] = (taskonomy, write_taskonomy, {"size": 8})


def load(root, name):
    """Write and load one data set, cropped to 6x6."""
    loader, write, options = LOADERS[name]
    write(root)
    return loader(root, crop=6, **options)


def whole(split):
    """All samples of a split."""
    return split.batch(torch.arange(len(split)))


def sample_numbers(split):
    """Which sample every picture is from, by its grey."""
    pictures, _ = whole(split)
    return (100 * (pictures[:, 0].amax((1, 2)) * SPREAD[0] + MEAN[0])).round().int().tolist()


@pytest.mark.parametrize("name", LOADERS)
def test_every_task_can_be_trained_and_judged(tmp_path, name):
    problem = load(tmp_path, name)
    pictures, targets = problem.train.batch(torch.tensor([1, 0]))
    assert problem.name == name
    assert problem.shape == (3, 6, 6) == tuple(pictures.shape[1:])
    assert pictures.dtype == torch.float32
    pictures, targets = problem.test.batch(torch.tensor([0]))
    assert list(targets) == [task.name for task in problem.tasks]
    for task in problem.tasks:
        output = torch.randn(1, task.outputs, 3, 3, requires_grad=True)
        task.loss(output, targets[task.name]).backward()
        metrics = task.metrics()
        metrics.update(output.detach(), targets[task.name])
        assert set(metrics.compute()) == set(task.better)
        assert output.grad.abs().sum() > 0
        assert targets[task.name].shape[-2:] == pictures.shape[-2:]


@pytest.mark.parametrize("name", ["nyuv2", "cityscapes"])
def test_validation_pictures_are_taken_from_training_and_val_is_the_test(tmp_path, name):
    problem = load(tmp_path, name)
    assert [len(getattr(problem, split)) for split in SPLITS] == [9, 1, 3]
    names = {split: list(getattr(problem, split).keys) for split in SPLITS}
    assert sorted(names["train"] + names["validation"]) == sorted(map(str, range(10)))
    assert sample_numbers(problem.validation) == [int(key) for key in names["validation"]]
    assert sample_numbers(problem.test) == [0, 1, 2]
    assert "9 train, 1 validation, 3 test" in problem.facts["split"]
    loader, _, options = LOADERS[name]
    others = {loader(tmp_path, crop=6, seed=seed, **options).validation.keys for seed in range(5)}
    assert len(others) > 1


def test_arrays_become_targets(tmp_path):
    problem = load(tmp_path, "nyuv2")
    pictures, targets = whole(problem.test)
    assert pictures.shape == (3, 3, 12, 16)
    assert torch.allclose(pictures[2], ((0.02 - torch.tensor(MEAN)) / torch.tensor(SPREAD)).view(3, 1, 1))
    assert (targets["segmentation"][:, :, :8] == IGNORE).all()
    assert (targets["segmentation"][:, :, 8:] == torch.arange(3)[:, None, None]).all()
    assert (targets["depth"] == torch.arange(1.0, 4)[:, None, None, None]).all()
    assert torch.equal(targets["normals"][1, :, 0, 0], torch.tensor([1.0, 0, 0]))
    assert targets["segmentation"].dtype == torch.int64


def test_pictures_may_be_bytes(tmp_path):
    write_arrays(tmp_path, "nyuv2")
    before = whole(nyuv2(tmp_path).test)[0]
    for path in (tmp_path / "nyuv2" / "val" / "image").glob("*.npy"):
        np.save(path, (np.load(path) * 255).round().astype(np.uint8))
    assert torch.allclose(whole(nyuv2(tmp_path).test)[0], before, atol=0.01)


def test_cityscapes_labels_may_lie_in_a_folder_without_number(tmp_path):
    write_cityscapes(tmp_path, label="label")
    assert int(whole(cityscapes(tmp_path).test)[1]["segmentation"][1, 0, -1]) == 1


@pytest.mark.parametrize("between", ["", "taskonomy"])
def test_taskonomy_is_scaled_as_by_the_authors(tmp_path, between):
    write_taskonomy(tmp_path, between=between)
    problem = taskonomy(tmp_path, size=8)
    assert [len(getattr(problem, split)) for split in SPLITS] == [4, 2, 2]
    pictures, targets = whole(problem.test)
    assert torch.allclose(pictures[0, :, 0, 0], (0.2 - torch.tensor(MEAN)) / torch.tensor(SPREAD))
    assert targets["segmentation"][0, :, 0].tolist() == [IGNORE, 0, 1, 2, 3, 4, 5, 6]
    assert torch.allclose(targets["depth"][0, 0, :-1], torch.tensor(10 / 16))  # log2(1024) of 16
    assert (targets["depth"][0, 0, -1] == 0).all()
    assert torch.allclose(targets["normals"][0, :, 3, 3], torch.tensor([1.0, 0, 0]), atol=0.01)
    assert (targets["normals"][0, :, [0, -1]] == 0).all()
    assert torch.allclose(targets["keypoints"], torch.tensor(0.0), atol=0.01)
    assert (targets["edges"] == 1).all()


def test_taskonomy_is_resized_and_split_by_building(tmp_path):
    write_taskonomy(tmp_path, buildings={"a": "train", "b": "train", "c": "test"})
    problem = taskonomy(tmp_path, size=4, only=("depth",))
    assert whole(problem.test)[0].shape == (2, 3, 4, 4)
    places = [{key["picture"].parent.name for key in getattr(problem, split).keys} for split in SPLITS]
    assert sorted(map(len, places)) == [1, 1, 1]
    assert set.union(*places) == {"a", "b", "c"}
    assert places[2] == {"c"}


def test_crops_keep_targets_on_their_pixels():
    """A picture whose pixels are all different, and targets that repeat it."""
    values = torch.arange(1.0, 1 + 20 * 30).view(1, 20, 30)
    targets = {"depth": values, "segmentation": values[0].long() % 200, "normals": values.expand(3, -1, -1)}
    starts, mirrored = set(), set()
    for _ in range(60):
        picture, cut = Augment(9, scale=(1.0, 1.0))(values.expand(3, -1, -1), dict(targets))
        assert picture.shape == (3, 9, 9)
        assert torch.equal(picture[:1], cut["depth"])
        assert torch.equal(cut["depth"][0].long() % 200, cut["segmentation"])
        turned = bool(picture[0, 0, 0] > picture[0, 0, 1])
        assert torch.equal(cut["normals"], picture * torch.tensor([-1.0 if turned else 1.0, 1.0, 1.0]).view(3, 1, 1))
        starts.add(float(picture.min()))
        mirrored.add(turned)
    assert mirrored == {True, False}
    assert len(starts) > 20


def test_zoomed_pictures_that_are_too_small_stand_among_unknown_pixels():
    targets = {
        "segmentation": torch.zeros(10, 10, dtype=torch.int64),
        **{task: torch.ones(1, 10, 10) for task in ("depth", "edges", "keypoints")},
        "normals": torch.ones(3, 10, 10),
    }
    picture, cut = Augment(10, scale=(0.5, 0.5))(torch.full((3, 10, 10), 7.0), targets)
    inside = torch.zeros(10, 10, dtype=torch.bool)
    inside[2:7, 2:7] = True
    assert torch.equal(picture[0] == 7, inside)
    assert (picture[:, ~inside] == 0).all()
    for task, target in cut.items():
        outside = target[..., ~inside].float()
        assert outside.isnan().all() if math.isnan(UNKNOWN[task]) else (outside == UNKNOWN[task]).all()
        assert (target[..., inside].abs() == (task != "segmentation")).all()
    large, _ = Augment(10, scale=(2.0, 2.0))(torch.arange(100.0).view(1, 10, 10).expand(3, -1, -1), targets)
    assert float(large.max() - large.min()) < 70  # a quarter of the picture


def test_training_pictures_follow_torchs_seed_and_others_do_not_change(tmp_path):
    problem = load(tmp_path, "nyuv2")
    which = torch.arange(3)

    def seeded(split, seed):
        torch.manual_seed(seed)
        return split.batch(which)[1]["segmentation"]

    assert torch.equal(seeded(problem.train, 0), seeded(problem.train, 0))
    assert not torch.equal(seeded(problem.train, 0), seeded(problem.train, 1))
    assert torch.equal(seeded(problem.test, 0), seeded(problem.test, 1))


def test_samples_are_read_only_when_asked_for():
    read = []

    def get(key):
        read.append(key)
        return torch.zeros(3, 2, 2), {"depth": torch.full((1, 2, 2), float(key))}

    split = OnDisk([5, 6, 7], get)
    assert len(split) == 3
    assert read == []
    assert split.batch(torch.tensor([2, 0]))[1]["depth"][:, 0, 0, 0].tolist() == [7, 5]
    assert read == [7, 5]


@pytest.mark.parametrize(("loader", "folder"), [(nyuv2, "nyuv2"), (cityscapes, "cityscapes"), (taskonomy, "taskonomy")])
def test_missing_data_say_where_they_belong(tmp_path, loader, folder):
    with pytest.raises(FileNotFoundError, match=f"{folder}/ holds") as caught:
        loader(tmp_path)
    assert str(tmp_path / folder) in str(caught.value)
    assert f"{folder}.py" in str(caught.value)


def test_a_missing_file_is_named_before_training(tmp_path):
    write_arrays(tmp_path, "nyuv2")
    (tmp_path / "nyuv2" / "val" / "normal" / "2.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"normal/2\.npy"):
        nyuv2(tmp_path)
    write_taskonomy(tmp_path)
    (tmp_path / "taskonomy" / "normal" / "two" / "point_1_view_1_domain_normal.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"view point_1_view_1 in .*two"):
        taskonomy(tmp_path)


@pytest.mark.parametrize(
    ("folder", "array", "rule"),
    [
        ("image", np.zeros((12, 16)), r"needs shape \(height, width, 3\) in .*0\.npy, found \(12, 16\)"),
        ("label", np.zeros((12, 16, 1)), r"needs shape \(height, width\) in"),
        ("label", np.full((12, 16), 40), r"classes: needs labels below 13 in .*0\.npy, found 40"),
        ("normal", np.zeros((3, 16, 3)), r"to be as large as its image, \(12, 16\), found \(3, 16\)"),
    ],
)
def test_arrays_that_do_not_fit_are_named(tmp_path, folder, array, rule):
    write_arrays(tmp_path, "nyuv2")
    np.save(tmp_path / "nyuv2" / "val" / folder / "0.npy", array)
    with pytest.raises(ValueError, match=rule):
        nyuv2(tmp_path).test.batch(torch.tensor([0]))


def test_a_picture_of_the_wrong_kind_is_named(tmp_path):
    write_taskonomy(tmp_path)
    path = tmp_path / "taskonomy" / "normal" / "four" / "point_0_view_1_domain_normal.png"
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(path)
    with pytest.raises(ValueError, match=r"needs 3 channels in .*domain_normal.*found 1"):
        taskonomy(tmp_path).test.batch(torch.tensor([0]))


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"only": ("segmentation", "boxes")}, r"only: needs tasks among .* found \['boxes'\]"),
        ({"only": ()}, "only: needs at least one"),
        ({"only": ("depth", "depth")}, "each once"),
        ({"weights": {"boxes": 1.0}}, "weights: needs tasks among"),
        ({"share": 1.0}, "share: needs a number between 0 and 1"),
    ],
)
def test_tasks_that_there_are_not(tmp_path, options, rule):
    write_arrays(tmp_path, "nyuv2")
    with pytest.raises(ValueError, match=rule):
        nyuv2(tmp_path, **options)


def test_a_split_without_buildings_is_an_error(tmp_path):
    write_taskonomy(tmp_path, buildings={"a": "train", "b": "train"})
    with pytest.raises(ValueError, match="needs buildings for test"):
        taskonomy(tmp_path)


def test_the_papers_setups_fit_their_data_and_its_network():
    assert dict(SETUPS["nyuv2"].classes) == NYU_V2
    assert dict(SETUPS["taskonomy"].classes) == TASKONOMY
    for setup in SETUPS.values():
        assert setup.weights.keys() == setup.classes.keys()
        assert setup.dynamic_stop < setup.iterations
        with torch.device("meta"):
            outputs = PaperNetwork(setup.classes, width=4, hidden=8)(torch.empty(1, 3, setup.crop, setup.crop))
        assert {task: output.shape[1] for task, output in outputs.items()} == dict(setup.classes)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setup.batch = 1


@pytest.mark.parametrize("name", LOADERS)
def test_problems_have_the_papers_weights(tmp_path, name):
    problem = load(tmp_path, name)
    assert {task.name: task.weight for task in problem.tasks} == {
        task.name: SETUPS[name].weights.get(task.name, 1.0) for task in problem.tasks
    }
