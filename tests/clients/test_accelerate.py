"""Hugging Face accelerate: our scheduler beside ``prepare``, in its checkpoints, and out of its wrappers."""

import pytest
import torch
from torch.nn.utils import prune
from torch.utils.data import DataLoader

from client_runs import client, masked, masks_by_name, outputs, same, zeros
from disparse_plugin.masks import fold, masks_of
from disparse_plugin.sparse_training import DiSparseScheduler
from networks import TwoHeads, WithStandardised, digit_batches, digit_losses, square_losses, vectors

pytestmark = pytest.mark.clients

STEPS = 8


@pytest.fixture
def another():
    """A function that starts over, as another process would."""
    accelerate = client("accelerate")
    yield lambda: accelerate.Accelerator(cpu=True)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def accelerator(another):
    return another()


class Run:
    """What a script with accelerate looks like, with one line of ours."""

    network, losses, batches = TwoHeads, staticmethod(digit_losses), staticmethod(digit_batches)

    def __init__(self, accelerator, seed=0, **options):
        torch.manual_seed(seed)
        self.accelerator = accelerator
        model = self.network().eval()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        loader = DataLoader(self.batches(STEPS), batch_size=None)
        self.model, self.optimizer, self.loader = accelerator.prepare(model, optimizer, loader)
        options = {"amount": 0.5, "update_every": 2, "stop_at": 7, "seed": seed, **options}
        self.scheduler = DiSparseScheduler(self.model, self.optimizer.optimizer, self.losses, **options)
        accelerator.register_for_checkpointing(self.scheduler)

    def train(self, first=0, last=STEPS):
        for batch in list(self.loader)[first:last]:
            self.optimizer.zero_grad()
            self.accelerator.backward(sum(self.losses(self.model, batch).values()))
            self.optimizer.step()
            self.scheduler.step(batch)
        return self


class LeavingOut(Run):
    """A run whose first step finds a layer that cannot be masked."""

    network, losses, batches = WithStandardised, staticmethod(square_losses), staticmethod(vectors)


def test_trains_as_without_it(accelerator):
    run = Run(accelerator).train()
    torch.manual_seed(0)
    plain = TwoHeads().eval()
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)
    scheduler = DiSparseScheduler(plain, optimizer, digit_losses, amount=0.5, update_every=2, stop_at=7)
    for batch in digit_batches(STEPS):
        optimizer.zero_grad()
        sum(digit_losses(plain, batch).values()).backward()
        optimizer.step()
        scheduler.step(batch)
    assert same(run.accelerator.unwrap_model(run.model).state_dict(), plain.state_dict())


def test_a_resumed_run_is_the_run_that_never_stopped(another, tmp_path):
    """The scheduler is registered like any object with a state; there is nothing of ours to write."""
    whole = Run(another()).train()
    Run(another()).train(last=5).accelerator.save_state(tmp_path)
    resumed = Run(another(), seed=1)
    resumed.accelerator.load_state(tmp_path)
    resumed.train(first=5)
    assert same(resumed.model.state_dict(), whole.model.state_dict())


def test_a_run_whose_first_step_left_something_out_is_resumed_without_it(another, tmp_path):
    """The model is loaded before the scheduler could take a mask off, so the scheduler is made without that layer."""
    with pytest.warns(UserWarning, match="1 of 4 cannot be masked"):
        whole = LeavingOut(another()).train(last=5)
    whole.accelerator.save_state(tmp_path)
    whole.train(first=5)
    with pytest.raises(RuntimeError, match=r"Missing key.*std\.weight_mask"):
        LeavingOut(another(), seed=1).accelerator.load_state(tmp_path)
    resumed = LeavingOut(another(), seed=1, exclude=[*whole.scheduler.skipped])
    resumed.accelerator.load_state(tmp_path)
    resumed.train(first=5)
    assert same(resumed.model.state_dict(), whole.model.state_dict())


def test_its_optimizer_is_to_be_unwrapped(accelerator):
    model, optimizer = accelerator.prepare(TwoHeads(), torch.optim.Adam(TwoHeads().parameters()))
    with pytest.raises(TypeError, match=r"found AcceleratedOptimizer around one; pass optimizer\.optimizer"):
        DiSparseScheduler(model, optimizer, digit_losses, amount=0.5, stop_at=4)


@pytest.mark.parametrize("accumulated", [1, 4])
def test_steps_that_only_accumulate_do_not_count(accelerator, accumulated):
    accelerator.gradient_accumulation_steps = accumulated
    run = Run(accelerator)
    for batch in run.loader:
        with accelerator.accumulate(run.model):
            accelerator.backward(sum(digit_losses(run.model, batch).values()))
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.scheduler.step(batch)
    assert run.scheduler.completed == STEPS / accumulated


def test_saved_models(accelerator, tmp_path):
    """``save_model`` writes masks as they are; folded first, it is a file for any plain model."""
    model = accelerator.prepare(masked())
    expected, masks = outputs(model), masks_by_name(model)
    accelerator.save_model(model, tmp_path / "masked")
    plain = TwoHeads().eval()
    load = client("safetensors.torch").load_file
    with pytest.raises(RuntimeError, match="Missing key"):
        plain.load_state_dict(load(tmp_path / "masked" / "model.safetensors"))
    accelerator.save_model(fold(accelerator.unwrap_model(model)), tmp_path / "folded")
    plain.load_state_dict(load(tmp_path / "folded" / "model.safetensors"))
    assert same(outputs(plain), expected)
    assert same(zeros(plain), masks)
    assert not prune.is_pruned(plain)


def test_masks_are_found_through_its_wrapper(accelerator):
    model = masked()
    assert same(masks_of(accelerator.prepare(model)), masks_of(model))
