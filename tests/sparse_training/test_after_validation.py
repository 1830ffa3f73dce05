"""A forward without a backward leaves the outermost layers of a sharded model whole; nothing here minds that."""

import pytest
import torch

from disparse_plugin._support.shards import is_sharded, whole
from disparse_plugin.masks import fold
from disparse_plugin.masks.attach import masks_of
from disparse_plugin.sparse_training import DiSparseScheduler, GradualPruning, RewindPoint
from networks import square_losses
from sharded_worker import joined_batches, sharded, shards_on_cpus, state_of

pytestmark = [pytest.mark.usefixtures("one_rank"), shards_on_cpus]
BATCHES = joined_batches(1, 8)
KINDS = pytest.mark.parametrize("kind", ["dynamic", "gradual"])


def validate(model):
    with torch.no_grad():
        model(BATCHES[0])
    assert not all(is_sharded(parameter) for parameter in model.parameters())


def scheduler_of(kind, model, optimizer):
    options = {"amount": 0.6, "update_every": 2, "stop_at": 8}
    return (GradualPruning if kind == "gradual" else DiSparseScheduler)(model, optimizer, square_losses, **options)


def run(kind, between):
    """A training with something between its steps, and between that of the optimizer and the scheduler's."""
    model = sharded(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    between(model)
    scheduler, reports = scheduler_of(kind, model, optimizer), []
    for batch in BATCHES:
        between(model)
        optimizer.zero_grad()
        sum(square_losses(model, batch).values()).backward()
        optimizer.step()
        between(model)
        reports.append(scheduler.step(batch))
    return model, scheduler, reports


@KINDS
def test_a_run_is_that_without_validation(kind):
    seen, plain = run(kind, validate), run(kind, lambda _: None)
    assert seen[2] == plain[2]
    expected = state_of(plain[0])
    assert all(torch.equal(value, expected[name]) for name, value in state_of(seen[0]).items())


@KINDS
def test_a_state_right_after_it(kind):
    model, scheduler, _ = run(kind, lambda _: None)
    validate(model)
    state = scheduler.state_dict()
    assert all(is_sharded(mask) for mask in state["masks"].values())
    validate(model)
    scheduler.load_state_dict(state)
    validate(model)
    assert scheduler.unfinished() is None
    if kind == "gradual":
        assert scheduler.prune_to(0.7, BATCHES[0]).sparsity == pytest.approx(0.7, abs=0.01)


def test_a_rewind_goes_back():
    model = sharded(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = state_of(model)
    validate(model)
    point = RewindPoint(model, optimizer)
    for batch in BATCHES[:3]:
        optimizer.zero_grad()
        sum(square_losses(model, batch).values()).backward()
        optimizer.step()
    assert not torch.equal(whole(model.own.weight.detach()), before["own.weight"])
    validate(model)
    point.rewind()
    assert all(torch.equal(value, before[name]) for name, value in state_of(model).items())


@KINDS
def test_gradients_that_no_backward_has_written_move_no_masked_weight(kind):
    model = sharded(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = scheduler_of(kind, model, optimizer)
    for batch in BATCHES:
        optimizer.zero_grad()
        sum(square_losses(model, batch).values()).backward()
        for parameter in model.parameters():
            parameter.grad.add_(1)  # as methods do that combine the tasks' own gradients
        optimizer.step()
        validate(model)
        scheduler.step(batch)
        for name, mask in masks_of(model).items():
            assert not whole(model.get_parameter(name).detach())[~whole(mask)].any(), name
    fold(model)
    optimizer.step()
    assert scheduler.step(BATCHES[0]) is None
