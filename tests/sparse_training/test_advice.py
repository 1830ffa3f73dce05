"""What an error advises works when it is followed, and what cannot work is refused before the training."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from disparse_plugin.masks import attach_masks, masks_of
from disparse_plugin.sparse_training import DiSparseScheduler, GradualPruning, layer_counts
from runs import Run

SIDES = st.integers(1, 3000)


@given(st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=4), st.data())
def test_the_advised_amount_fits(shapes, data):
    dense = data.draw(st.sets(st.integers(0, len(shapes) - 1)))
    densities = data.draw(st.dictionaries(st.integers(0, len(shapes) - 1), st.floats(1e-6, 1.0)))
    for amount in (0.01, 0.5, 0.9, 1.0):
        for options in ({"dense": dense}, {"distribution": densities}, {"distribution": "uniform"}):
            try:
                layer_counts(shapes, amount, **options)
            except ValueError as error:
                count, total = map(int, re.search(r"amount=(\d+) / (\d+) would fit", str(error)).groups())
                assert sum(layer_counts(shapes, count / total, **options)) == total - count
                assert layer_counts(shapes, count, **options) == layer_counts(shapes, count / total, **options)


def test_the_advised_amount_fits_where_it_fills_fewer_layers():
    """Keeping 5 would fill the second layer, keeping 4 would not, and then it must lose an entry."""
    with pytest.raises(ValueError, match=r"amount=2 / 5 would fit"):
        layer_counts([(1, 1), (1, 2), (1, 2)], 0.01, {0: 1.0, 2: 0.75})
    assert layer_counts([(1, 1), (1, 2), (1, 2)], 2 / 5, {0: 1.0, 2: 0.75}) == [1, 1, 1]


def pair():
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    return model, torch.optim.SGD(model.parameters(), 0.1)


@pytest.mark.parametrize(
    ("densities", "kept"),
    [((0.5, 0.98), [64, 15]), ((0.5, 0.02), [64, 1]), ((1.0, 0.5), [128, 8]), ((0.999, 1), [127, 16])],
)
def test_densities_for_every_layer_need_no_amount(densities, kept):
    model, optimizer = pair()
    distribution = dict(zip(("0.weight", "2.weight"), densities, strict=True))
    DiSparseScheduler(model, optimizer, lambda model, x: {"a": model(x).mean()}, distribution=distribution, stop_at=9)
    assert [int(model[index].weight_mask.sum()) for index in (0, 2)] == kept


class GradualRun(Run):
    scheduler_class = GradualPruning


@pytest.mark.parametrize("times", [{"start_at": 10, "stop_at": 20}, {"start_at": 15, "stop_at": 20}, {"stop_at": 20}])
def test_the_advised_times_fit_a_training_that_was_too_short(times):
    run = GradualRun(**times)
    run.train(12)
    advised = dict(re.findall(r"(start_at|stop_at)=(\d+)", run.scheduler.unfinished().split("pass e.g. ")[1]))
    other = GradualRun(**{**times, **{name: int(step) for name, step in advised.items()}})
    assert len(other.train(12)) > 1
    assert other.scheduler.unfinished() is None


def three_layers():
    layers = [nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2)]
    return nn.Sequential(*layers)


def square(model, x):
    return {"a": model(x).square().mean()}


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"amount": 0.97, "min_keep": 5}, "404 of 416 to prune and 15 protected"),
        ({"amount": lambda step: 0.97, "min_keep": 5}, "404 of 416 to prune and 15 protected"),
        ({"amount": 0.97, "min_keep": 0.1}, "404 of 416 to prune and 42 protected"),
        ({"amount": 0.9, "min_keep": 2, "pattern": "channels"}, "31 of 34 to prune and 6 protected"),
    ],
)
def test_an_amount_that_the_last_stage_would_refuse_is_refused_at_once(options, found):
    model = three_layers()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with pytest.raises(ValueError, match=f"min_keep: must leave enough to prune, found {found}; lower either"):
        GradualPruning(model, optimizer, square, update_every=2, stop_at=8, **options)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("pruned", [False, True])
def test_an_amount_that_just_fits_is_reached(pruned):
    model = three_layers()
    if pruned:  # of a tensor of which two are left, two stay
        mask = torch.arange(32).reshape(2, 16) < 2
        attach_masks(model, {"4.weight": mask})
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    amount = 416 - (12 if pruned else 15)
    options = {"amount": amount, "min_keep": 5, "update_every": 2, "stop_at": 4}
    pruning = GradualPruning(model, optimizer, square, **options)
    for batch in torch.randn(4, 16, 8):
        optimizer.zero_grad()
        square(model, batch)["a"].backward()
        optimizer.step()
        pruning.step(batch)
    assert sum(int(mask.sum()) for mask in masks_of(model).values()) == 416 - amount
    with pytest.raises(ValueError, match="min_keep: must leave enough"):
        GradualPruning(model, optimizer, square, **{**options, "amount": amount + 1})
