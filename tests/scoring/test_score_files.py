"""Score files: complete or not there, and refused for a stated reason."""

import copy
import json
import pickle
from types import MappingProxyType

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from disparse_plugin import TaskScores, score_tasks
from disparse_plugin.agreement import Budget
from networks import TwoHeads, digit_batches, digit_losses


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "scores.safetensors"
    score_tasks(TwoHeads(), digit_losses, digit_batches()).save(path)
    return path


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="path: must be an existing file"):
        TaskScores.load(tmp_path / "none", TwoHeads())


def test_a_truncated_file(path):
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="path: must be a complete safetensors file"):
        TaskScores.load(path, TwoHeads())


def test_a_foreign_file(path):
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"path: must be a file of kind 'disparse_plugin\.scores', found None"):
        TaskScores.load(path, TwoHeads())


def test_a_newer_file(path):
    save_file({"x": torch.ones(1)}, path, {"kind": "disparse_plugin.scores", "version": "99", "facts": json.dumps({})})
    with pytest.raises(ValueError, match="path: must be of format version 1 or older, found 99"):
        TaskScores.load(path, TwoHeads())


def test_another_model(path):
    with pytest.raises(ValueError, match=r"found 4 of 4 parameters missing in it \(first: trunk.0.weight\)"):
        TaskScores.load(path, nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"must have the weight's shape \(7, 1, 3, 3\), found \(6, 1, 3, 3\)"):
        TaskScores.load(path, TwoHeads(width=7))


def test_a_failed_write_leaves_the_old_file(path, monkeypatch):
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr("disparse_plugin._support.files.os.fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        score_tasks(TwoHeads(), digit_losses, digit_batches()).save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_whether_scores_are_shares_is_kept_whatever_the_criterion_is_called(tmp_path):
    layer = nn.Linear(2, 1)
    table = {"a": {(layer, "weight"): torch.tensor([[0.25, 1.0]])}}
    for shares in (True, False):
        for name in ("mine", "lamp"):
            TaskScores(layer, table, criterion=name, shares=shares).save(tmp_path / "scores.safetensors")
            assert TaskScores.load(tmp_path / "scores.safetensors", layer).shares is shares


def test_the_checksum_is_of_the_shapes_too(path):
    """The very same bytes, under a header that says another shape."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name] = tensors[name].reshape(-1)
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="another checksum"):
        TaskScores.load(path, TwoHeads())


def test_scores_and_budgets_of_parts_can_be_copied_and_pickled():
    model = TwoHeads()
    scores = score_tasks(model, digit_losses, digit_batches(1))
    parts = Budget({"shared": 0.5, "a": 0.2, "b": 3}, min_keep=2)
    copied, (model_read, scores_read) = copy.deepcopy(scores), pickle.loads(pickle.dumps((model, scores)))
    for other in (copied, scores_read):
        assert (other.names, other.tasks) == (scores.names, scores.tasks)
        masks = zip(scores.masks(parts).values(), other.masks(copy.deepcopy(parts)).values(), strict=True)
        assert all(torch.equal(one, another) for one, another in masks)
        with pytest.raises(TypeError, match="does not support item assignment"):
            other["a"][other.parameters[0]] = torch.zeros(1)
    assert all(key[0] in set(model_read.modules()) for key in scores_read.parameters)
    assert pickle.loads(pickle.dumps(parts)) == parts
    assert isinstance(copy.copy(parts).amount, MappingProxyType)
