"""Checkpoints in the authors' names: those of their own code's state dicts, read, written back, and refused by name."""

import hashlib
import json
import re

import pytest
import torch
from torch.nn.utils import prune

from disparse_plugin import prunable_parameters
from disparse_plugin.masks import masks_of
from models.authors_checkpoint import authors_name, authors_state, load_authors_checkpoint, read_authors_state
from models.paper_network import NYU_V2, TASKONOMY, PaperNetwork

TASKS = {"segmentation": 5, "normals": 3}


def small(seed=0, tasks=TASKS):
    torch.manual_seed(seed)
    return PaperNetwork(tasks, width=4, hidden=8).eval()


def pruned(seed=0):
    network = small(seed)
    prune.global_unstructured(prunable_parameters(network), prune.L1Unstructured, amount=0.6)
    return network


# Sums over the sorted names and shapes of the state dicts that the authors' released code builds.
THEIRS = {"nyuv2": (NYU_V2, 264, "abe485fbfdc406e2"), "taskonomy": (TASKONOMY, 336, "beb98ea27e8ba289")}


@pytest.mark.parametrize("name", THEIRS)
def test_every_name_and_shape_is_theirs(name):
    tasks, entries, expected = THEIRS[name]
    with torch.device("meta"):
        state = authors_state(PaperNetwork(tasks))
    assert len(state) == entries
    assert state["backbone.blocks.3.2.bn2.running_var"].shape == (512,)
    assert state["backbone.ds.2.0.weight"].shape == (256, 128, 1, 1)
    assert state["task1_fc1_c0.conv3.weight"].shape == (tasks["segmentation"], 1024, 1, 1)
    listed = json.dumps(sorted((name, list(value.shape)) for name, value in state.items()))
    assert hashlib.sha256(listed.encode()).hexdigest().startswith(expected)


@pytest.mark.parametrize("make", [small, pruned])
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_is_written_is_read_again(tmp_path, make, wrapped):
    network, path = make(seed=1), tmp_path / "theirs.pth"
    state = authors_state(network)
    torch.save({"state_dict": state, "iter": 3} if wrapped else state, path)
    for other in (small(seed=2), pruned(seed=2)):
        load_authors_checkpoint(other, path)
        images = torch.randn(2, 3, 17, 17)
        for task, output in network(images).items():
            torch.testing.assert_close(other(images)[task], output, rtol=0, atol=0)
        assert masks_of(other).keys() == masks_of(network).keys()
        assert all(torch.equal(mask, masks_of(network)[name]) for name, mask in masks_of(other).items())


def test_masks_are_as_they_store_them():
    state = authors_state(pruned())
    assert state["backbone.blocks.0.0.conv1.weight_mask"].dtype == torch.int32
    assert state["backbone.ds.1.0.weight_orig"].is_floating_point()
    assert "backbone.conv1.weight" not in state


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("backbone.conv1.weight_orig"), "needs 'backbone.conv1.weight_orig' beside its mask"),
        (lambda s: s.pop("backbone.bn1.bias"), "needs 'backbone.bn1.bias', found no such entry (1 are missing)"),
        (lambda s: s.update({"task3_fc1_c0.conv1.bias": torch.zeros(1)}), "found 'task3_fc1_c0.conv1.bias' too"),
        (
            lambda s: s.update({"backbone.bn1.bias": torch.zeros(2)}),
            "needs shape (4,) for 'backbone.bn1.bias', found (2,)",
        ),
        (
            lambda s: s["backbone.conv1.weight_mask"].fill_(2),
            "needs zeros and ones in the shape of its weight for the mask of 'backbone.conv1.weight'",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(spoil, message):
    state, network = authors_state(pruned(seed=1)), pruned(seed=2)
    spoil(state)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        read_authors_state(network, state)
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_tasks_in_another_order_are_noticed():
    state = authors_state(small())
    with pytest.raises(ValueError, match=r"give the tasks of the checkpoint in its order, now normals, segmentation"):
        read_authors_state(small(tasks=dict(reversed(TASKS.items()))), state)


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"path: needs a state dict of tensors in .*list\.pth, found list"):
        load_authors_checkpoint(small(), tmp_path / "list.pth")


def test_a_task_is_named_by_its_place():
    assert authors_name("heads.b.branches.0.0.weight", ("a", "b")) == "task2_fc1_c0.conv1.weight"
