"""A point to go back to is of tensors by name: in what has taken their place it is found, or refused."""

import pytest
import torch
from torch import nn

from disparse_plugin.sparse_training import RewindPoint


def trained():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(5, 3)).square().mean().backward()
    optimizer.step()


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def assign(model):
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()}, assign=True)


def test_parameters_that_were_replaced_in_the_optimizer_too_are_found():
    model, optimizer = trained()
    before, point = snapshot(model), RewindPoint(model, optimizer)
    assign(model)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    step(model, optimizer)
    point.rewind()
    assert same(snapshot(model), before)
    assert set(optimizer.state) == set(model.parameters())


def test_buffers_of_modules_that_were_replaced_are_found():
    model, optimizer = trained()
    before, point = snapshot(model), RewindPoint(model, optimizer)
    model[1], old = nn.SyncBatchNorm(4), model[1]
    model[1].weight, model[1].bias = old.weight, old.bias
    point.rewind()
    assert same(snapshot(model), before)


def another_layer(model, optimizer):
    model[2] = nn.Linear(4, 2)
    optimizer.add_param_group({"params": model[2].parameters()})


def another_shape(model, optimizer):
    model[2].weight = nn.Parameter(torch.zeros(3, 4))


def a_layer_less(model, optimizer):
    del model[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model, optimizer: assign(model), "optimizer: must train the same .* load_state_dict without assign"),
        (another_layer, "optimizer: must train the same parameters, in the same order"),
        (another_shape, r"model: must have the tensors .* found 1 gone or of another shape \(first: 2\.weight\)"),
        (a_layer_less, r"model: must have the tensors .* found 2 gone or of another shape \(first: 2\.weight\)"),
    ],
)
def test_what_has_no_place_is_refused_before_anything_is_written(change, message):
    model, optimizer = trained()
    point = RewindPoint(model, optimizer)
    step(model, optimizer)
    change(model, optimizer)
    before, moments = snapshot(model), [id(value) for value in optimizer.state.values()]
    with pytest.raises(ValueError, match=message):
        point.rewind()
    assert same(snapshot(model), before)
    assert [id(value) for value in optimizer.state.values()] == moments
