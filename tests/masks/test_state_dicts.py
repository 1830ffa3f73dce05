"""A model takes the masks of the state dict that it loads: gains, loses, keeps its order, or stays as it was."""

import pytest
import torch
from torch.nn.utils import prune

from disparse_plugin import disparse_static
from disparse_plugin.masks import masks_of
from disparse_plugin.masks.in_place import attach_in_place
from disparse_plugin.masks.state_dicts import follow_masks, match_masks
from masks import equal_masks
from networks import Snapshot, TwoHeads, digit_batches, digit_losses


@pytest.fixture
def pruned():
    model = TwoHeads().eval()
    disparse_static(model, digit_losses, digit_batches(), 0.5)
    return model


def test_a_dense_model_gains_the_masks(pruned):
    model = TwoHeads()
    match_masks(model, pruned.state_dict())
    model.load_state_dict(pruned.state_dict())
    assert equal_masks(masks_of(model), masks_of(pruned))
    assert list(dict(model.named_parameters())) == list(dict(pruned.named_parameters()))


def test_a_pruned_model_loses_them(pruned):
    dense, weight = TwoHeads(), pruned.trunk[0].weight_orig
    match_masks(pruned, dense.state_dict())
    pruned.load_state_dict(dense.state_dict())
    assert not prune.is_pruned(pruned)
    assert pruned.trunk[0].weight is weight
    assert list(pruned.state_dict()) == list(dense.state_dict())


def order(model):
    return [name.removesuffix("_orig") for name, _ in model.named_parameters()]


def test_a_state_sorted_by_name_leaves_the_order_as_it_is(pruned):
    # Files of safetensors are sorted: where the Trainer of transformers resumed, moments went to other tensors.
    model, built = TwoHeads(), order(TwoHeads())
    match_masks(model, dict(sorted(pruned.state_dict().items())))
    assert prune.is_pruned(model)
    assert order(model) == built
    match_masks(model, dict(sorted(TwoHeads().state_dict().items())))
    assert not prune.is_pruned(model)
    assert order(model) == built


def test_other_masks_take_the_place_of_its_own(pruned):
    other = TwoHeads()
    attach_in_place(other, {name: ~mask for name, mask in masks_of(pruned).items()})
    handles = follow_masks(pruned)
    pruned.load_state_dict(other.state_dict())
    assert equal_masks(masks_of(pruned), masks_of(other))
    for handle in handles:
        handle.remove()
    with pytest.raises(RuntimeError, match="weight_orig"):
        pruned.load_state_dict(TwoHeads().state_dict())


def test_a_mask_that_does_not_fit_changes_nothing(pruned):
    model = TwoHeads()
    before, state = Snapshot(model), pruned.state_dict()
    state["heads.b.weight_mask"] = torch.ones(1)
    with pytest.raises(ValueError, match=r"state_dict: the mask of heads\.b\.weight must have the shape \(3, 96\)"):
        match_masks(model, state)
    before.check()
