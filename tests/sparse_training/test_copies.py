"""Copies of a scheduler with its model and optimizer: they go on, and the original is not touched."""

import copy
import pickle

import pytest
import torch
from torch import nn

from disparse_plugin.sparse_training import DiSparseScheduler, GradualPruning


def losses(model, x):
    out = model(x)
    return {"a": out[:, 0].square().mean(), "b": (out[:, 1] - 1).square().mean()}


def trained(net, optimizer, scheduler, steps):
    for _ in range(steps):
        x = torch.randn(16, 8)
        optimizer.zero_grad()
        sum(losses(net, x).values()).backward()
        optimizer.step()
        scheduler.step(x)
    with torch.no_grad():
        net(torch.randn(1, 8))  # torch cannot copy the weight of a pruned layer that was made with a graph


def started(kind, steps):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scheduler = kind(net, optimizer, losses, amount=0.75, update_every=2, stop_at=20)
    trained(net, optimizer, scheduler, steps)
    return net, optimizer, scheduler


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("kind", [DiSparseScheduler, GradualPruning])
@pytest.mark.parametrize("steps", [0, 4])
def test_a_copy_counts_the_steps_of_the_optimizer_that_was_copied_along(kind, copied, steps):
    parts = started(kind, steps)
    twins = copied(parts)
    states = []
    for net, optimizer, scheduler in (parts, twins):
        torch.manual_seed(1)
        trained(net, optimizer, scheduler, 6)
        assert scheduler.completed == steps + 6
        states.append(net.state_dict())
    assert parts[2].completed == steps + 6
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_growing_by_a_criterion_with_a_step_on_the_sum_is_refused():
    net = nn.Sequential(nn.Linear(8, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    options = {"amount": 0.5, "update_every": 1, "stop_at": 8}
    with pytest.raises(
        ValueError, match=r"criterion: must score the weights of a batch, found 'damped\(gradient, 0.5\)'"
    ):
        DiSparseScheduler(net, optimizer, losses, criterion="damped(gradient, 0.5)", **options)
    DiSparseScheduler(net, optimizer, losses, criterion="layer_adaptive(gradient)", **options)


def test_a_schedule_of_counts_may_pass_through_small_ones():
    net = nn.Sequential(nn.Linear(100, 400), nn.Linear(400, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    pruning = GradualPruning(net, optimizer, losses, amount=lambda step: 20 * step, update_every=1, stop_at=2000)
    x = torch.randn(4, 100)
    sum(losses(net, x).values()).backward()
    optimizer.step()
    assert sum(pruning.step(x).pruned.values()) == 20
    with pytest.raises(ValueError, match="amount: 90 is a number of weights"):
        GradualPruning(net, optimizer, losses, amount=lambda step: 90, update_every=1, stop_at=2000)
