"""Layers that are not trained exchange no weights: what would grow there stays 0."""

import pytest
import torch

from disparse_plugin.masks import masks_of
from disparse_plugin.sparse_training import DiSparseScheduler
from networks import TwoHeads, square_losses
from runs import Run
from sharded_worker import joined_batches, sharded, shards_on_cpus, state_of, train

FROZEN = pytest.mark.filterwarnings("ignore:parameters. . of . are frozen")


def frozen(model):
    return {name: value.clone() for name, value in model.trunk.state_dict().items() if "weight_" in name}


@pytest.mark.parametrize("options", [{}, {"criterion": "random"}, {"regrow_dropped": True}])
def test_a_layer_that_is_frozen_later_keeps_its_weights_until_it_is_trained(options):
    run = Run(update_every=1, **options)
    run.train(3)
    run.model.trunk.requires_grad_(False)
    before = frozen(run.model)
    with pytest.warns(
        UserWarning, match=r"of . are frozen \(first: trunk.0.weight\): their masks stay as they"
    ) as seen:
        updates = run.train(6, first=3)
    assert len(seen) == 1
    assert all(torch.equal(value, before[name]) for name, value in frozen(run.model).items())
    assert len(updates) == 6
    assert not any(update.exchanged["trunk.0.weight"] for update in updates)
    run.model.trunk.requires_grad_(True)
    assert run.train(1, first=9)[0].exchanged["trunk.0.weight"] > 0


def test_the_other_layers_move_as_ever():
    runs = [Run(update_every=1), Run(update_every=1)]
    runs[0].model.trunk.requires_grad_(False)
    with pytest.warns(UserWarning, match="are frozen"):
        updates = [run.train(1)[0].exchanged for run in runs]
    assert all(updates[0][name] == updates[1][name] > 0 for name in ("heads.a.weight", "heads.b.weight"))


def test_of_what_is_frozen_from_the_start_it_is_said_then_and_never_again():
    model = TwoHeads()
    model.trunk.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"2 of 4 are frozen .* keep them whole, leave them out with exclude=\['trunk"):
        run = Run(model=model, update_every=1)
    before = frozen(model)
    run.train(4)
    assert all(torch.equal(value, before[name]) for name, value in frozen(model).items())


@FROZEN
@shards_on_cpus
@pytest.mark.usefixtures("one_rank")
def test_a_frozen_layer_of_a_sharded_model_keeps_its_weights():
    model = sharded(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"amount": 0.5, "update_every": 1, "stop_at": 100}
    scheduler = DiSparseScheduler(model, optimizer, square_losses, **options)
    batches = joined_batches(1, 6)
    train(model, optimizer, scheduler, batches[0], [])
    model.trunk.requires_grad_(False)
    optimizer.zero_grad()
    before = state_of(model)
    for batch in batches[1:]:
        train(model, optimizer, scheduler, batch, [])
    after = state_of(model)
    trunk = [name for name in after if name.startswith("trunk")]
    assert all(torch.equal(after[name], before[name]) for name in trunk)
    assert any(not torch.equal(after[f"{name}_mask"], before[f"{name}_mask"]) for name in masks_of(model))
