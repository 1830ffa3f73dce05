"""Schedulers leave out what their first step shows not to be maskable, and are then as if built without it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from disparse_plugin import prunable_parameters
from disparse_plugin.sparse_training import (
    DiSparseScheduler,
    GradualPruning,
    RewindPoint,
    load_checkpoint,
    save_checkpoint,
)
from networks import square_losses, vectors

SCHEDULERS = [DiSparseScheduler, GradualPruning]


class Misread(nn.Module):
    """Of ``never`` only the weight is read; that of ``early`` before it runs, besides."""

    def __init__(self):
        super().__init__()
        self.never, self.early, self.trunk = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.a, self.b = nn.Linear(5, 2), nn.Linear(5, 3)

    def forward(self, x):
        x = F.linear(x, self.never.weight)
        beside = F.linear(x, F.normalize(self.early.weight))
        x = self.early(x) + beside
        x = self.trunk(x).tanh()
        return {"a": self.a(x), "b": self.b(x)}


def begun(scheduler, model, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"amount": 0.5, "update_every": 2, "stop_at": 6, **options}
    return optimizer, scheduler(model, optimizer, square_losses, **options)


def step(model, optimizer, pruning, batch):
    optimizer.zero_grad()
    sum(square_losses(model, batch).values()).backward()
    optimizer.step()
    pruning.step(batch)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_what_a_parent_reads_is_left_out_at_the_first_step(scheduler):
    model = Misread()
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer, pruning = begun(scheduler, model)
    batches = vectors(7)
    with pytest.warns(
        UserWarning,
        match=r"2 of 5 cannot be masked .*never\.weight \(a parent reads it directly .*; early\.weight \(.*earlier",
    ) as seen:
        step(model, optimizer, pruning, batches[0])
    assert len(seen) == 1
    assert pruning.masks.names == ("trunk.weight", "a.weight", "b.weight")
    assert torch.equal(model.never.weight, dense["never.weight"])  # dense, and from now on trained
    assert not prune.is_pruned(model.never)
    for batch in batches[1:]:
        step(model, optimizer, pruning, batch)
    assert pruning.completed == 7
    assert not torch.equal(model.never.weight, dense["never.weight"])
    masks = [module.weight_mask for module in (model.trunk, model.a, model.b)]
    assert sum(int((mask == 0).sum()) for mask in masks) == 25


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_it_is_then_as_if_it_had_been_excluded(scheduler):
    model, other = Misread(), Misread()
    other.load_state_dict(model.state_dict())
    pairs = [(model, *begun(scheduler, model)), (other, *begun(scheduler, other, exclude=["never", "early"]))]
    with pytest.warns(UserWarning, match="2 of 5"):
        step(*pairs[0], vectors(1)[0])
    step(*pairs[1], vectors(1)[0])
    assert pairs[0][2].masks.names == pairs[1][2].masks.names
    assert repr(pairs[0][2]) == repr(pairs[1][2])
    for one, same in zip(pairs[0][2].masks.current(), pairs[1][2].masks.current(), strict=True):
        assert torch.equal(one, same)
    pairs[1][2].load_state_dict(pairs[0][2].state_dict())


@pytest.mark.parametrize(("scheduler", "options"), [(DiSparseScheduler, {"criterion": "random"}), (GradualPruning, {})])
def test_a_checkpoint_of_before_the_first_step_does_not_hide_it(scheduler, options, tmp_path):
    model, other = Misread(), Misread()
    other.load_state_dict(model.state_dict())
    straight, loaded = ((net, *begun(scheduler, net, **options)) for net in (model, other))
    for function in (save_checkpoint, load_checkpoint):
        function(tmp_path / "run.pt", **dict(zip(("model", "optimizer", "scheduler"), loaded, strict=True)))
    for run in (straight, loaded):
        with pytest.warns(UserWarning, match="2 of 5 cannot be masked"):
            step(*run, vectors(1)[0])
    for batch in vectors(7)[1:]:
        step(*straight, batch)
        step(*loaded, batch)
    expected = model.state_dict()
    assert other.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_rewind_before_the_first_step_does_not_hide_it(scheduler):
    model = Misread()
    optimizer, pruning = begun(scheduler, model)
    RewindPoint(model, optimizer).rewind()
    with pytest.warns(UserWarning, match=r"2 of 5 cannot be masked .*never\.weight .*early\.weight"):
        step(model, optimizer, pruning, vectors(1)[0])
    assert pruning.masks.names == ("trunk.weight", "a.weight", "b.weight")


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_listed_it_is_refused(scheduler):
    model = Misread()
    optimizer, pruning = begun(scheduler, model, parameters=prunable_parameters(model))
    with pytest.raises(ValueError, match=r"never\.weight must be used by its own .*exclude=\['never\.weight', 'early"):
        step(model, optimizer, pruning, vectors(1)[0])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_attention_and_tied_weights_are_left_out_from_the_start(scheduler):
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.embedding, self.encoder = nn.Embedding(7, 8), nn.TransformerEncoder(layer, 1)
            self.next, self.label = nn.Linear(8, 7, bias=False), nn.Linear(8, 2)
            self.next.weight = self.embedding.weight

        def forward(self, x):
            x = self.encoder(self.embedding(x))
            return {"next": self.next(x), "label": self.label(x.mean(1))}

    model = Text()
    with pytest.warns(
        UserWarning, match=r"2 of 5 .*out_proj\.weight \(a parent .*; next\.weight \(embedding\.weight and"
    ):
        optimizer, pruning = begun(scheduler, model)
    for _ in range(6):
        step(model, optimizer, pruning, torch.arange(14).reshape(2, 7) % 7)
    total = sum(mask.numel() for mask in pruning.masks.current())
    assert sum(int(mask.sum()) for mask in pruning.masks.current()) == total - round(0.5 * total)


def test_a_density_of_its_own_does_not_keep_a_layer_in():
    model = Misread()
    optimizer, pruning = begun(
        DiSparseScheduler, model, distribution={"never.weight": 0.2, (model.early, "weight"): 0.3}
    )
    with pytest.warns(UserWarning, match="2 of 5 cannot be masked"):
        step(model, optimizer, pruning, vectors(1)[0])
    assert pruning.masks.names == ("trunk.weight", "a.weight", "b.weight")


@pytest.mark.parametrize("make", [torch.optim.Adam, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)])
def test_the_optimizer_remembers_what_is_not_masked_after_the_first_step(make):
    """Of a layer that is left out all, and of the others what the second masks keep, also if the first did not."""
    model = Misread()
    optimizer = make(model.parameters())
    for batch in vectors(3):
        optimizer.zero_grad()
        sum(square_losses(model, batch).values()).backward()
        optimizer.step()
    before = moments(model, optimizer)
    scheduler = DiSparseScheduler(model, optimizer, square_losses, amount=0.8, update_every=5, stop_at=10)
    masked = {name: mask == 0 for name, mask in scheduler_masks(scheduler)}
    with pytest.warns(UserWarning, match="2 of 5"):
        step(model, optimizer, scheduler, vectors(4)[3])
    after, masks = moments(model, optimizer), dict(scheduler_masks(scheduler))
    assert set(masked) - set(masks) == {"never.weight", "early.weight"}
    for name, gone in masked.items():
        alive = masks.get(name, torch.ones_like(gone)) != 0
        assert bool((gone & alive).any())
        for one, other in zip(after[name], before[name], strict=True):
            assert bool((one[alive & ~gone] != 0).all())
            steady = other[gone & alive]  # its gradient in the first step was that of a masked weight: none
            torch.testing.assert_close(one[gone & alive], steady)
            assert not one[~alive].any()


def scheduler_masks(scheduler):
    return zip(scheduler.masks.names, scheduler.masks.current(), strict=True)


def moments(model, optimizer):
    """What the optimizer remembers of each weight, by name."""
    found = {}
    for module, name in prunable_parameters(model):
        weight = module._parameters.get("weight_orig", module._parameters.get(name))
        states = optimizer.state[weight].values()
        path = next(path for path, inner in model.named_modules() if inner is module)
        found[f"{path}.weight"] = [state.clone() for state in states if state.shape == weight.shape]
    return found
