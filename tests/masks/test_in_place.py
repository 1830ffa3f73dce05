"""``DiSparseDynamic`` inside torch's pruning: one hook, one buffer, rewritten in place."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from disparse_plugin import prunable_parameters
from disparse_plugin.sparse_training import DiSparseDynamic, DiSparseScheduler
from networks import TwoHeads, digit_batches, digit_losses
from runs import Run, masks_of


def half(module):
    mask = torch.zeros_like(module.weight, dtype=torch.bool)
    mask.view(-1)[::2] = True
    return mask


def test_it_is_pruning_as_torch_knows_it():
    layer, plain = nn.Linear(4, 3), nn.Linear(4, 3)
    plain.load_state_dict(layer.state_dict())
    mask = half(layer)
    DiSparseDynamic.apply(layer, "weight", mask)
    prune.custom_from_mask(plain, "weight", mask)
    assert prune.is_pruned(layer)
    assert set(layer.state_dict()) == set(plain.state_dict())
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4)
    assert torch.equal(layer(x), plain(x))
    prune.remove(layer, "weight")
    assert not prune.is_pruned(layer)
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert torch.equal(layer.weight, plain.weight)
    assert layer.weight.is_leaf
    assert layer.weight.requires_grad


def test_parameters_keep_their_identity_and_order():
    model = TwoHeads()
    before = list(model.parameters())
    for module, name in prunable_parameters(model):
        DiSparseDynamic.apply(module, name, half(module))
    assert [id(p) for p in model.parameters()] == [id(p) for p in before]
    for module, name in prunable_parameters(model):
        prune.remove(module, name)
    assert [id(p) for p in model.parameters()] == [id(p) for p in before]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_mask_can_be_rewritten_after_a_forward_of_any_mode(mode):
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    hook = DiSparseDynamic.apply(layer, "weight", half(layer))
    with mode():
        seen = layer(x)
    before = seen.clone()
    hook.rewrite(layer, ~half(layer))
    assert torch.equal(seen, before)
    assert not layer.weight.any()  # what grows starts at 0
    assert layer.weight.is_leaf
    assert layer.weight.requires_grad
    layer(x).sum().backward()
    assert torch.equal(layer.weight_orig.grad != 0, ~half(layer))


def test_masks_of_torch_are_taken_over_with_one_hook():
    layer = nn.Linear(8, 4)
    prune.l1_unstructured(layer, "weight", 0.25)
    prune.random_unstructured(layer, "weight", 0.25)
    before, original = layer.weight_mask.clone(), layer.weight_orig
    DiSparseDynamic.apply(layer, "weight", half(layer))
    assert torch.equal(layer.weight_mask, before * half(layer))
    assert layer.weight_orig is original
    assert len(layer._forward_pre_hooks) == 1


def test_rewriting_is_in_place_and_what_regrows_starts_at_zero():
    layer = nn.Linear(4, 1)
    hook = DiSparseDynamic.apply(layer, "weight", torch.tensor([[1, 1, 0, 0]]))
    original, buffer = layer.weight_orig, layer.weight_mask
    kept = original[0, 1].item()
    hook.rewrite(layer, torch.tensor([[False, True, True, False]]))
    assert layer.weight_orig is original
    assert layer.weight_mask is buffer
    assert original.tolist() == [[0.0, kept, 0.0, 0.0]]
    assert buffer.tolist() == [[0.0, 1.0, 1.0, 0.0]]
    assert layer.weight.tolist() == [[0.0, kept, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([[1.0]], TypeError, "mask: must be a tensor"),
        (torch.ones(2, 2), ValueError, "mask: must have the tensor's shape"),
        (torch.full((1, 4), 0.5), ValueError, "mask: must hold 0 and 1"),
    ],
)
def test_a_bad_mask_leaves_the_module_alone(mask, error, message):
    layer = nn.Linear(4, 1)
    with pytest.raises(error, match=message):
        DiSparseDynamic.apply(layer, "weight", mask)
    assert list(layer._parameters) == ["weight", "bias"]
    assert not layer._forward_pre_hooks


def test_memory_formats_other_than_contiguous_work():
    runs = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        run = Run(model=TwoHeads().to(memory_format=memory_format), losses=digit_losses)
        run.train(6)
        runs.append(masks_of(run.model))
    # Convolutions round differently in the two formats, so the masks are similar, not equal.
    for name, mask in runs[0].items():
        assert int(mask.sum()) == int(runs[1][name].sum())
        assert (mask == runs[1][name]).float().mean() > 0.9


def test_an_ema_made_after_the_scheduler_follows_the_masks():
    run = Run()
    average = AveragedModel(run.model)
    for step in range(6):
        run.train(1, first=step)
        average.update_parameters(run.model)
    for name, mask in masks_of(run.model).items():
        assert torch.equal(masks_of(average.module)[name], mask)
    average.eval()(digit_batches(1)[0][0])
    for module, name in prunable_parameters(average.module):
        assert bool((getattr(module, name)[module.weight_mask == 0] == 0).all())


def test_a_pruned_model_can_be_copied_right_after_an_update():
    run = Run()
    assert run.train(2)
    twin = copy.deepcopy(run.model)
    assert all(torch.equal(mask, masks_of(twin)[name]) for name, mask in masks_of(run.model).items())


def test_a_scheduler_notices_that_its_masks_are_gone_or_changed():
    run = Run()
    run.train(1)
    prune.l1_unstructured(run.model.heads["a"], "weight", 0.1)
    with pytest.raises(ValueError, match="another pruning method was applied on top"):
        run.train(1, first=1)
    run = Run()
    run.train(1)
    run.model.heads["a"].weight_mask[0] = 1
    with pytest.raises(ValueError, match="must be changed by their scheduler only"):
        run.train(1, first=1)
    run = Run()
    run.train(1)
    prune.remove(run.model.heads["a"], "weight")
    with pytest.raises(ValueError, match="found it gone"):
        run.train(1, first=1)


class Attention(nn.Module):
    """The parent reads ``out.weight`` without running ``out``."""

    def __init__(self):
        super().__init__()
        self.out, self.head = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x):
        return {"a": self.head(nn.functional.linear(x, self.out.weight))}


@pytest.mark.parametrize("criterion", ["gradient", "random"])
def test_weights_that_a_parent_reads_directly_are_refused_at_the_first_step(criterion):
    model = Attention()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def losses(model, x):
        return {"a": model(x)["a"].square().mean()}

    keys = [(model.out, "weight"), (model.head, "weight")]
    options = {"amount": 0.5, "stop_at": 10, "criterion": criterion, "parameters": keys}
    scheduler = DiSparseScheduler(model, optimizer, losses, **options)
    batch = torch.randn(2, 3, 8)
    losses(model, batch)["a"].backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"out\.weight must be used by its own module's forward"):
        scheduler.step(batch)
