"""Masks on a model: copying, attaching, applying, folding."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from disparse_plugin import disparse_static
from disparse_plugin.masks import (
    apply_masks,
    attach_masks,
    clone_pruned,
    fold,
    masks_of,
)
from masks import equal_masks
from networks import Snapshot, TwoHeads, digit_batches, digit_losses


@pytest.fixture
def model():
    return TwoHeads().eval()


@pytest.fixture
def pruned(model):
    disparse_static(model, digit_losses, digit_batches(), 0.9)
    return model


def outputs(model):
    with torch.no_grad():
        return torch.cat(list(model.eval()(digit_batches(1)[0][0]).values()))


class TestClone:
    def test_right_after_pruning(self, pruned):
        before = Snapshot(pruned)
        twin = clone_pruned(pruned)
        before.check()
        assert torch.equal(outputs(twin), outputs(pruned))
        assert equal_masks(masks_of(twin), masks_of(pruned))
        assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in pruned.parameters()}

    def test_the_copy_can_be_copied_by_deepcopy(self, pruned):
        again = copy.deepcopy(clone_pruned(pruned))
        assert torch.equal(outputs(again), outputs(pruned))

    def test_the_copy_trains_on_its_own(self, pruned):
        twin, before = clone_pruned(pruned), outputs(pruned)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        sum(digit_losses(twin, digit_batches(1)[0]).values()).backward()
        optimizer.step()
        assert torch.equal(outputs(pruned), before)
        assert not torch.equal(outputs(twin), before)

    def test_a_dense_model(self, model):
        assert torch.equal(outputs(clone_pruned(model)), outputs(model))


class TestAttach:
    def test_a_checkpoint_of_a_pruned_model_loads_strictly(self, pruned):
        fresh = TwoHeads().eval()
        with pytest.raises(RuntimeError, match="weight_mask"):
            fresh.load_state_dict(pruned.state_dict())
        attach_masks(fresh, masks_of(pruned))
        fresh.load_state_dict(pruned.state_dict())
        assert torch.equal(outputs(fresh), outputs(pruned))

    def test_a_folded_model_loads_strictly_into_a_dense_one(self, pruned):
        expected = outputs(pruned)
        fresh = TwoHeads().eval()
        fresh.load_state_dict(fold(pruned).state_dict())
        assert torch.equal(outputs(fresh), expected)

    def test_an_existing_mask_is_replaced_in_place(self, pruned):
        layer = pruned.trunk[0]
        buffer, hooks = layer.weight_mask, list(layer._forward_pre_hooks.values())
        attach_masks(pruned, {(layer, "weight"): ~masks_of(pruned)["trunk.0.weight"]})
        assert layer.weight_mask is buffer
        assert list(layer._forward_pre_hooks.values()) == hooks
        assert torch.equal(layer.weight, layer.weight_orig * layer.weight_mask)

    @pytest.mark.parametrize(
        ("masks", "error", "message"),
        [
            ({"nothing.weight": torch.ones(1).bool()}, ValueError, "found nothing.weight which is not"),
            ({(nn.Linear(2, 2), "weight"): torch.ones(2, 2).bool()}, ValueError, r"found \(Linear, 'weight'\)"),
            ({"trunk.0.weight": torch.ones(6, 1, 3, 3)}, TypeError, "must be a bool tensor, found torch.float32"),
            ({"trunk.0.weight": torch.ones(3).bool()}, ValueError, r"shape \(6, 1, 3, 3\), found \(3,\)"),
        ],
    )
    def test_what_does_not_fit_changes_nothing(self, model, masks, error, message):
        masks = {"trunk.3.weight": torch.ones(6, 6, 3, 3).bool(), **masks}
        before = Snapshot(model)
        for function in (attach_masks, apply_masks):
            with pytest.raises(error, match=message):
                function(model, masks)
        before.check()


def test_an_average_takes_the_masks_of_the_model(pruned):
    average = TwoHeads().eval()
    apply_masks(average, pruned)
    assert not prune.is_pruned(average)
    weights = dict(average.named_parameters())
    for name, mask in masks_of(pruned).items():
        assert (weights[name][~mask] == 0).all()
        assert (weights[name][mask] != 0).all()


def test_fold_leaves_a_plain_model(pruned):
    before = outputs(pruned)
    assert fold(pruned) is pruned
    assert not prune.is_pruned(pruned)
    assert set(pruned.state_dict()) == set(TwoHeads().state_dict())
    assert torch.equal(outputs(pruned), before)


def test_masks_that_cannot_all_be_attached_leave_those_that_were_there(monkeypatch):
    net = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False))
    attach_masks(net[0], {"weight": torch.tensor([[True, False]])})
    custom = prune.custom_from_mask

    def failing(module, name, mask):
        if module is net[1]:
            raise KeyError("weight_mask")
        return custom(module, name, mask)

    monkeypatch.setattr(prune, "custom_from_mask", failing)
    before = net[0].weight.clone()
    new = torch.tensor([[False, True]])
    with pytest.raises(KeyError, match="weight_mask"):
        attach_masks(net, {"0.weight": new, "1.weight": new})
    assert net[0].weight_mask.tolist() == [[1.0, 0.0]]
    assert torch.equal(net[0].weight, before)
    assert [name for name, _ in net[1].named_parameters()] == ["weight"]


def test_applied_masks_show_at_once_in_a_model_that_carries_masks():
    layer = nn.Linear(3, 1, bias=False)
    attach_masks(layer, {"weight": torch.tensor([[True, True, False]])})
    apply_masks(layer, {"weight": torch.tensor([[False, True, True]])})
    assert (layer.weight != 0).tolist() == [[False, True, False]]


def test_masks_that_nothing_would_apply_are_refused():
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    attention = nn.MultiheadAttention(4, 2)
    for model, name, why in ((tied, "0.weight", "tied"), (attention, "out_proj.weight", "no pruning hook masks it")):
        mask = torch.zeros_like(model.get_parameter(name), dtype=torch.bool)
        with pytest.raises(ValueError, match=why):
            attach_masks(model, {name: mask})
        assert not masks_of(model)


def test_keys_that_are_none_are_named(pruned):
    mask = torch.ones(1, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"masks: every key must be a name or a \(module, name\) pair, found int: 3"):
        attach_masks(pruned, {3: mask})
    masks = {(nn.Linear(1, 1), "weight"): mask}
    with pytest.raises(ValueError, match="fit by name"):
        attach_masks(pruned, masks)


def test_masks_are_applied_inside_an_average(pruned):
    average = AveragedModel(clone_pruned(pruned))
    with torch.no_grad():
        average.module.trunk[0].weight_orig.fill_(1.0)
    apply_masks(average, pruned)
    assert torch.equal(average.module.trunk[0].weight_orig != 0, pruned.trunk[0].weight_mask != 0)


def averaged(model):
    """An average, of buffers too, of two models; the masks of the first layer have nothing in common."""
    average = AveragedModel(clone_pruned(model), use_buffers=True)
    average.update_parameters(model)
    with torch.no_grad():
        model.trunk[0].weight_mask.mul_(-1).add_(1)
        model.trunk[0].weight_orig.fill_(1.0)
    average.update_parameters(model)
    assert average.module.trunk[0].weight_mask.unique().tolist() == [0.5]
    return average


def test_the_mean_of_masks_in_an_average_becomes_the_mask_of_the_model(pruned):
    average = averaged(pruned)
    stored, others = average.module.trunk[0].weight_orig.clone(), masks_of(average.module)
    apply_masks(average, pruned)
    layer, mask = average.module.trunk[0], pruned.trunk[0].weight_mask
    assert torch.equal(layer.weight_mask, mask)
    assert torch.equal(layer.weight_orig, stored * mask)
    assert torch.equal(layer.weight, stored * mask)
    now = masks_of(average.module)
    assert all(torch.equal(now[name], other) for name, other in others.items() if name != "trunk.0.weight")


def test_a_mean_of_masks_that_stays_is_refused(pruned):
    average = averaged(pruned)
    before = Snapshot(average)
    masks = {name: mask for name, mask in masks_of(pruned).items() if name != "trunk.0.weight"}
    with pytest.raises(ValueError, match=r"trunk\.0\.weight must carry a mask of zeros and ones.*attach_masks puts"):
        apply_masks(average, masks)
    before.check()
