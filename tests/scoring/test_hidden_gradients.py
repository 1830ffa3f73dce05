"""What autograd does not show: checkpointed, compiled and wrapped models are seen as they are, or refused."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from disparse_plugin import disparse_pretrained, score_tasks
from disparse_plugin.sparse_training import DiSparseScheduler, GradualPruning
from networks import Around, Snapshot, square_losses, vectors


class Checkpointed(nn.Module):
    """A block that is computed again in the backward, as memory is short."""

    def __init__(self, reentrant):
        super().__init__()
        self.stem, self.block, self.reentrant = nn.Linear(5, 5), nn.Sequential(nn.Linear(5, 5), nn.Tanh()), reentrant

    def forward(self, x):
        return checkpoint(self.block, self.stem(x).tanh(), use_reentrant=self.reentrant)


HIDDEN = r"model: every layer must run where autograd sees it, found 1 parameters \(first: first\.block\.0\.weight\)"


def test_reentrant_checkpointing_is_refused_with_the_cure():
    model = Around(Checkpointed(True))
    before = Snapshot(model)
    for call in (score_tasks, lambda *arguments: disparse_pretrained(*arguments, 0.9)):
        with pytest.raises(ValueError, match=rf"{HIDDEN} inside CheckpointFunction.*pass use_reentrant=False"):
            call(model, square_losses, vectors())
        before.check()


@pytest.mark.parametrize("scheduler", [DiSparseScheduler, GradualPruning])
def test_schedulers_refuse_it_at_the_first_step(scheduler):
    model = Around(Checkpointed(True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruning = scheduler(model, optimizer, square_losses, amount=0.5, update_every=50, stop_at=100)
    batch = vectors(1)[0].requires_grad_()
    sum(square_losses(model, batch).values()).backward()
    optimizer.step()
    with pytest.raises(ValueError, match=HIDDEN):
        pruning.step(batch)


@pytest.mark.parametrize("pruned", [False, True])
def test_the_other_checkpointing_scores_as_none(pruned):
    plain, model = Around(Checkpointed(False)), Around(Checkpointed(False))
    model.load_state_dict(plain.state_dict())
    plain.first.forward = lambda x: plain.first.block(plain.first.stem(x).tanh())
    for network in (plain, model) if pruned else ():
        disparse_pretrained(network, square_losses, vectors(), 0.2)
    expected = score_tasks(plain, square_losses, vectors())
    scores = score_tasks(model, square_losses, vectors())
    assert scores.names == expected.names
    for task in scores:
        for one, other in zip(scores[task].values(), expected[task].values(), strict=True):
            torch.testing.assert_close(one, other)


def test_a_frozen_teacher_without_gradients_is_no_hidden_layer():
    model = Around(nn.Linear(5, 5))

    def losses(model, batch):
        with torch.no_grad():
            goal = model(batch)["a"]
        return {task: (output - goal + 0.1).square().mean() for task, output in model(batch).items()}

    assert len(score_tasks(model, losses, vectors()).names) == 3


def test_losses_that_close_over_a_compiled_copy_are_seen():
    model = Around(nn.Linear(5, 5))
    compiled = torch.compile(model, backend="eager")
    expected = score_tasks(model, square_losses, vectors())
    compiled(vectors(1)[0])  # compiled before there were any hooks
    scores = score_tasks(model, lambda _, batch: square_losses(compiled, batch), vectors())
    assert scores.names == expected.names
    for task in scores:
        assert all(torch.equal(scores[task][key], score) for key, score in expected[task].items())


@pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")
def test_losses_that_close_over_a_distributed_wrapper_are_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = Around(nn.Linear(5, 5))
        wrapped = nn.parallel.DistributedDataParallel(model)
        before = Snapshot(model)
        with pytest.raises(ValueError, match=r"losses: must run the model .* found that they run a DistributedDataPar"):
            score_tasks(wrapped, lambda _, batch: square_losses(wrapped, batch), vectors())
        before.check()
        assert len(score_tasks(wrapped, square_losses, vectors()).names) == 3
    finally:
        dist.destroy_process_group()
