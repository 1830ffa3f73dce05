"""A run goes on from a checkpoint of one that left something out at its first step, by the same script."""

import pytest
import torch
from torch.nn.utils import prune

from disparse_plugin import prunable_parameters
from disparse_plugin.sparse_training import DiSparseScheduler, GradualPruning, load_checkpoint, save_checkpoint
from networks import WithStandardised, square_losses, vectors
from runs import masks_of

SCHEDULERS = [DiSparseScheduler, GradualPruning]


class Run:
    def __init__(self, scheduler, seed=0, listed=False, **options):
        torch.manual_seed(seed)
        self.model = WithStandardised()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        options = {"amount": 0.5, "update_every": 2, "stop_at": 8, **options}
        if listed:
            options["parameters"] = prunable_parameters(self.model)
        self.scheduler = scheduler(self.model, self.optimizer, square_losses, **options)

    def parts(self):
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def train(self, batches):
        for batch in batches:
            self.optimizer.zero_grad()
            sum(square_losses(self.model, batch).values()).backward()
            self.optimizer.step()
            self.scheduler.step(batch)


@pytest.fixture(params=SCHEDULERS)
def scheduler(request):
    return request.param


def trained(scheduler, batches):
    run = Run(scheduler)
    with pytest.warns(UserWarning, match=r"1 of 4 cannot be masked .*std\.weight \(Standardised multiplies with some"):
        run.train(batches)
    return run


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_not_multiplied_with_is_left_out_at_the_first_step(scheduler):
    run = trained(scheduler, vectors(1))
    assert list(run.scheduler.skipped) == ["std.weight"]
    assert run.scheduler.masks.names == ("trunk.weight", "a.weight", "b.weight")
    run.train(vectors(8)[1:])
    assert list(masks_of(run.model)) == ["trunk.weight_mask", "a.weight_mask", "b.weight_mask"]
    assert sum(int((mask == 0).sum()) for mask in masks_of(run.model).values()) == 25


def test_listed_that_is_refused_at_the_first_step(scheduler):
    run = Run(scheduler, listed=True)
    with pytest.raises(ValueError, match=r"std\.weight must be what its layer multiplies .*exclude=\['std\.weight'\]"):
        run.train(vectors(1))


def test_the_same_script_goes_on(scheduler, tmp_path):
    batches = vectors(8)
    whole = trained(scheduler, batches[:3])
    save_checkpoint(tmp_path / "run.pt", **whole.parts())
    whole.train(batches[3:])
    again = Run(scheduler, seed=1)  # masked in all four layers, until the file says better
    load_checkpoint(tmp_path / "run.pt", **again.parts())
    assert list(again.scheduler.skipped) == ["std.weight"]
    again.train(batches[3:])
    assert same(whole.model.state_dict(), again.model.state_dict())


def test_or_with_what_it_left_out_excluded(scheduler, tmp_path):
    batches = vectors(8)
    whole = trained(scheduler, batches[:3])
    save_checkpoint(tmp_path / "run.pt", **whole.parts())
    again = Run(scheduler, exclude=["std"])
    load_checkpoint(tmp_path / "run.pt", **again.parts())
    assert same(whole.model.state_dict(), again.model.state_dict())


def test_listed_the_file_says_what_to_exclude(scheduler, tmp_path):
    whole = trained(scheduler, vectors(3))
    save_checkpoint(tmp_path / "run.pt", **whole.parts())
    listed = Run(scheduler, listed=True)
    with pytest.raises(ValueError, match=r"left out \['std\.weight'\], .*pass exclude=\['std\.weight'\]"):
        load_checkpoint(tmp_path / "run.pt", **listed.parts())


@pytest.mark.parametrize("spoilt", ["model", "settings"])
def test_a_file_that_does_not_fit_leaves_the_run_as_it_was(scheduler, tmp_path, spoilt):
    whole = trained(scheduler, vectors(3))
    save_checkpoint(tmp_path / "run.pt", **whole.parts())
    again = Run(scheduler, seed=1, **({"update_every": 3} if spoilt == "settings" else {}))
    if spoilt == "model":
        again.model.a.register_buffer("more", torch.ones(1))
    before = {name: value.clone() for name, value in again.model.state_dict().items()}
    with pytest.raises((ValueError, RuntimeError)):
        load_checkpoint(tmp_path / "run.pt", **again.parts())
    assert same(before, again.model.state_dict())
    with pytest.warns(UserWarning, match="1 of 4 cannot be masked"):
        again.train(vectors(4))
    assert again.scheduler.completed == 4


def after_pruning(scheduler, *layers):
    """A run on a model of which some layers came with masks of torch."""
    torch.manual_seed(0)
    run = object.__new__(Run)
    run.model = WithStandardised()
    for name in layers:
        prune.random_unstructured(getattr(run.model, name), "weight", 0.5)
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1, momentum=0.9)
    amount = {"distribution": "existing"} if scheduler is DiSparseScheduler else {"amount": 0.5}
    run.scheduler = scheduler(run.model, run.optimizer, square_losses, update_every=3, stop_at=9, **amount)
    return run


def test_masks_that_were_there_stay_when_something_else_is_left_out(scheduler):
    run = after_pruning(scheduler, "trunk")
    before = run.model.trunk.weight_mask.clone()
    with pytest.warns(UserWarning, match=r"1 of 4 cannot be masked"):
        run.train(vectors(1))
    assert torch.equal(run.model.trunk.weight_mask, before)
    assert [name for name, _ in run.model.std.named_parameters()] == ["weight", "bias"]


def test_a_mask_that_was_there_and_does_nothing_is_refused(scheduler):
    run = after_pruning(scheduler, "std", "trunk")
    with pytest.raises(ValueError, match=r"std\.weight must be what its layer multiplies .*exclude=\['std\.weight'\]"):
        run.train(vectors(1))
