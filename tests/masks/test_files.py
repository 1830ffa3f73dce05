"""Mask files: what comes back, how large they are, and what is refused."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from disparse_plugin import disparse_static, score_tasks
from disparse_plugin.masks import apply_masks, keep_tasks, load_masks, masks_of, save_masks
from masks import equal_masks
from networks import Snapshot, TwoHeads, digit_batches, digit_losses


@pytest.fixture
def model():
    return TwoHeads().eval()


@pytest.fixture
def pruned(model):
    disparse_static(model, digit_losses, digit_batches(), 0.9)
    return model


@pytest.fixture
def path(tmp_path):
    return tmp_path / "masks.safetensors"


def test_round_trip(pruned, path):
    facts = {"method": "DiSparseStatic", "criterion": "snip", "amount": 0.9, "tasks": ["a", "b"]}
    save_masks(pruned, path, facts=facts)
    fresh = TwoHeads()
    assert load_masks(fresh, path) == facts
    assert equal_masks(masks_of(fresh), masks_of(pruned))


def test_masks_take_one_bit_per_weight(path):
    model = nn.Sequential(nn.Linear(400, 400))
    prune.random_unstructured(model[0], "weight", 0.5)
    save_masks(model, path)
    assert path.stat().st_size < 400 * 400 / 8 + 1000


def test_masks_of_single_tasks(model, path):
    scores = disparse_static(model, digit_losses, digit_batches(), 0.9)
    own = keep_tasks(model, scores, ["b"])
    save_masks(model, path, tasks={"b": own})
    fresh = TwoHeads()
    load_masks(fresh, path, task="b")
    assert equal_masks(masks_of(fresh), {n: own[k] for n, k in zip(scores.names, scores.parameters, strict=True)})
    with pytest.raises(ValueError, match=r"task: must be one of \['b'\] stored in .*, found 'a'"):
        load_masks(fresh, path, task="a")


def test_what_does_not_fit_changes_nothing(pruned, path):
    save_masks(pruned, path)
    other, wider = nn.Sequential(nn.Linear(2, 2)), TwoHeads(width=7)
    marked = TwoHeads()
    prune.random_unstructured(marked.trunk[0], "bias", 1)
    cases = [
        (other, "every name must be a parameter of the model"),
        (wider, "must have the shape"),
        (marked, r"model: must carry no other masks .* \(first: trunk.0.bias\)"),
    ]
    for model, message in cases:
        before = Snapshot(model)
        with pytest.raises(ValueError, match=message):
            load_masks(model, path)
        before.check()


def test_files_of_another_kind(pruned, path):
    score_tasks(pruned, digit_losses, digit_batches()).save(path)
    with pytest.raises(ValueError, match=r"must be a file of kind 'disparse_plugin\.masks', found 'disparse_plugin"):
        load_masks(TwoHeads(), path)
    with pytest.raises(ValueError, match="model: must carry at least one mask, found none"):
        save_masks(TwoHeads(), path)


def test_masks_that_scale_weights_are_not_taken_for_masks_of_zeros_and_ones(model, path):
    prune.custom_from_mask(model.trunk[0], "weight", torch.full_like(model.trunk[0].weight, 0.5))
    average = TwoHeads()
    before = Snapshot(average)
    message = r"parameters: trunk\.0\.weight must carry a mask of zeros and ones.*; .*save_pruned keeps it as it is"
    with pytest.raises(ValueError, match=message):
        save_masks(model, path)
    with pytest.raises(ValueError, match=message):
        apply_masks(average, model)
    before.check()
    assert not path.exists()
