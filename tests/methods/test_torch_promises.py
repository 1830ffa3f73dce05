"""What torch promises for a method on one tensor of one module, for our methods in place of torch's."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from pruning_cases import CLASSES, KINDS, METHODS, Pruned, each_kind, each_method, pruning_hooks


@each_kind
@each_method
def test_the_parameter_moves_and_stays_the_same_object(kind, method):
    pruned = Pruned(kind, method)
    module, name = pruned.module, kind.name
    assert module._parameters[f"{name}_orig"] is pruned.parameter
    assert name not in module._parameters
    assert f"{name}_mask" in dict(module.named_buffers())
    assert pruned.mask.shape == pruned.parameter.shape
    assert pruned.mask.dtype == pruned.parameter.dtype
    assert set(pruned.mask.unique().tolist()) == {0, 1}
    assert torch.equal(getattr(module, name), pruned.parameter * pruned.mask)
    assert pruning_hooks(module) == [pruned.hook]
    assert isinstance(pruned.hook, CLASSES[method])
    assert prune.is_pruned(module)
    assert prune.is_pruned(nn.Sequential(nn.ReLU(), module))


@each_kind
@each_method
def test_every_forward_uses_the_masked_weight(kind, method):
    pruned = Pruned(kind, method)
    assert torch.equal(pruned.run(), pruned.expected())
    with torch.no_grad():
        pruned.parameter.add_(1)
    assert torch.equal(pruned.run(), pruned.expected())


@each_kind
@each_method
def test_an_optimizer_made_before_goes_on_and_masked_entries_get_no_gradient(kind, method):
    pruned = Pruned(kind, method)
    before = pruned.parameter.detach().clone()
    pruned.train()
    moved = pruned.parameter != before
    assert bool(moved.any())
    assert not bool((moved & (pruned.mask == 0)).any())
    assert torch.equal(pruned.run(), pruned.expected())


@each_kind
@each_method
@pytest.mark.parametrize("trained", [False, True])
def test_a_pruned_module_can_be_pickled_and_saved(kind, method, trained):
    pruned = Pruned(kind, method)
    if trained:
        pruned.train()
    output, file = pruned.run(), io.BytesIO()
    torch.save(pruned.module, file)
    file.seek(0)
    for twin in (pickle.loads(pickle.dumps(pruned.module)), torch.load(file, weights_only=False)):
        assert torch.equal(pruned.run(twin), output)
        assert isinstance(pruning_hooks(twin)[0], CLASSES[method])
        prune.remove(twin, kind.name)
        assert torch.equal(pruned.run(twin), output)


@each_kind
@each_method
def test_state_dicts_load_strictly_between_modules_of_the_same_form(kind, method):
    pruned, other = Pruned(kind, method), Pruned(kind, method)
    keys = set(pruned.module.state_dict())
    plain = kind.make()
    assert keys == set(plain.state_dict()) - {kind.name} | {f"{kind.name}_orig", f"{kind.name}_mask"}
    other.module.load_state_dict(pruned.module.state_dict())
    assert torch.equal(pruned.run(other.module), pruned.run())
    with pytest.raises(RuntimeError, match=f"{kind.name}_mask"):
        plain.load_state_dict(pruned.module.state_dict())
    with pytest.raises(RuntimeError, match=f"{kind.name}_mask"):
        pruned.module.load_state_dict(plain.state_dict())
    output = pruned.run()
    plain.load_state_dict(prune.remove(pruned.module, kind.name).state_dict())
    assert torch.equal(pruned.run(plain), output)


@each_kind
@each_method
def test_remove_makes_it_permanent(kind, method):
    pruned = Pruned(kind, method)
    pruned.train()
    module, output, mask = pruned.module, pruned.run(), pruned.mask
    values = pruned.parameter.detach() * mask
    assert prune.remove(module, kind.name) is module
    assert not prune.is_pruned(module)
    assert not pruning_hooks(module)
    assert module._parameters[kind.name] is pruned.parameter
    assert torch.equal(pruned.parameter, values)
    assert set(module.state_dict()) == set(kind.make().state_dict())
    assert torch.equal(pruned.run(), output)
    pruned.train()  # a plain module again: pruned entries may move, and the forward sees it
    assert bool((pruned.parameter[mask == 0] != 0).any())
    assert not torch.equal(pruned.run(), output)
    with pytest.raises(ValueError, match="has to be pruned before pruning can be removed"):
        prune.remove(module, kind.name)


@each_kind
@each_method
def test_deepcopy_fails_after_a_forward_with_gradients_as_for_torch(kind, method):
    """The effective weight is no leaf then (pytorch#37322); ``clone_pruned`` is there for that."""
    pruned = Pruned(kind, method)
    output = pruned.run().detach()
    with pytest.raises(RuntimeError, match="Only Tensors created explicitly by the user"):
        copy.deepcopy(pruned.module)
    with torch.no_grad():
        pruned.run()
    twin = copy.deepcopy(pruned.module)
    assert torch.equal(pruned.run(twin), output)
    with torch.no_grad():
        twin._parameters[f"{kind.name}_orig"].zero_()
    assert torch.equal(pruned.run(), output)


@each_method
def test_two_tensors_of_a_module_are_pruned_apart(method):
    attention = nn.MultiheadAttention(8, 2, kdim=4)
    names, plain = ["q_proj_weight", "k_proj_weight"], set(attention.state_dict())
    for name in names:
        METHODS[method](attention, name)
    assert [hook._tensor_name for hook in pruning_hooks(attention)] == names
    prune.remove(attention, names[0])
    assert prune.is_pruned(attention)
    assert set(attention.state_dict()) == plain - {names[1]} | {f"{names[1]}_orig", f"{names[1]}_mask"}
    prune.remove(attention, names[1])
    assert not prune.is_pruned(attention)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "structured"])
def test_a_bias_can_be_pruned_beside_its_weight(method):
    layer, x = nn.Linear(8, 4), torch.randn(2, 8)
    for name in ("weight", "bias"):
        METHODS[method](layer, name)
    masked = nn.functional.linear(x, layer.weight_orig * layer.weight_mask, layer.bias_orig * layer.bias_mask)
    assert int(layer.bias_mask.sum()) < 4
    assert torch.equal(layer(x), masked)


@pytest.mark.parametrize("pruned", [False, True])
def test_a_vector_has_no_channels(pruned):
    layer = nn.Linear(8, 4)
    if pruned:
        prune.random_unstructured(layer, "bias", 1)
    hooks = pruning_hooks(layer)
    with pytest.raises(ValueError, match=r"name: must be a tensor of at least two dimensions, found one of shape"):
        METHODS["structured"](layer, "bias")
    assert pruning_hooks(layer) == hooks


@each_method
def test_a_method_that_fails_leaves_nothing_behind(method, monkeypatch):
    def fail(*_, **__):
        raise ArithmeticError

    layer, x = nn.Linear(8, 4), torch.randn(2, 8)
    weight, output = layer.weight, layer(x)
    monkeypatch.setattr(CLASSES[method], "compute_mask", fail)
    with pytest.raises(ArithmeticError):
        METHODS[method](layer, "weight")
    assert set(layer._parameters) == {"weight", "bias"}
    assert layer.weight is weight
    assert not layer._buffers
    assert not layer._forward_pre_hooks
    assert not prune.is_pruned(layer)
    assert torch.equal(layer(x), output)


@pytest.mark.parametrize("method", ["static", "pretrained", "bound", "structured"])
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("amount", [-0.1, -1, 1.1, 33, float("nan"), float("inf"), "half", None, True])
def test_an_amount_out_of_range_leaves_the_module_alone(method, pruned, amount):
    layer = nn.Linear(8, 4)
    if pruned:
        prune.random_unstructured(layer, "weight", 0.5)
    before, hooks = copy.deepcopy(dict(layer.state_dict())), pruning_hooks(layer)
    with pytest.raises((ValueError, TypeError), match="amount: "):
        METHODS[method](layer, "weight", amount)
    assert pruning_hooks(layer) == hooks
    assert before.keys() == layer.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


@each_method
@pytest.mark.parametrize("name", ["kernel", "training", "running_mean"])
def test_what_is_no_parameter_is_refused(method, name):
    norm = nn.BatchNorm1d(4)
    with pytest.raises(ValueError, match=f"parameters: {name} must be a parameter, found"):
        METHODS[method](norm, name)
    assert not norm._forward_pre_hooks


def test_an_lstm_trains_on_after_its_weights_were_pruned_and_made_permanent():
    """RNNs keep a flat list of their weights beside the attributes; all must go through the mask, and back again."""
    kind = KINDS["LSTM"]
    for method in METHODS:
        module, x = kind.make(), torch.randn(kind.shape)
        names = [name for name in dict(module.named_parameters()) if name.startswith("weight")]
        for name in names:
            METHODS[method](module, name)
        for name in names:
            assert any(weight is getattr(module, name) for weight in module._flat_weights)
        output = kind.run(module, x)
        for name in names:
            prune.remove(module, name)
        assert torch.equal(kind.run(module, x), output)
        assert all(isinstance(weight, nn.Parameter) for weight in module._flat_weights)
        kind.run(module, x).sum().backward()
        assert all(parameter.grad is not None for parameter in module.parameters())
