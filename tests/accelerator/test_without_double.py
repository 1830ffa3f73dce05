"""On an accelerator that knows no float64, as Apple's ``mps``: masks are those of the CPU, entry by entry."""

import copy
import functools

import pytest
import torch
from torch.nn.utils import prune

from disparse_plugin import (
    DiSparsePretrained,
    DiSparseSemiStructured,
    DiSparseStatic,
    DiSparseStructured,
    channel_importance,
    disparse_pretrained,
    disparse_static,
    score_tasks,
    sparsity_report,
)
from disparse_plugin._support import double
from disparse_plugin.analysis import GradientConflict, overlap_with_controls
from disparse_plugin.sparse_training import DiSparseScheduler, GradualPruning
from networks import TwoHeads, digit_batches, digit_losses


@pytest.fixture(autouse=True)
def without_double(device, waits):  # which is there on the simulated device alone
    import simulated_accelerator

    double.double_device.cache_clear()
    with simulated_accelerator.without_double():
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(1, dtype=torch.float64, device=device)
        yield
    double.double_device.cache_clear()


def both(device):
    """A model and batches there, and the same on the CPU."""
    torch.manual_seed(0)
    model, batches = TwoHeads(), digit_batches(2)
    yield copy.deepcopy(model).to(device), [(images.to(device), labels.to(device)) for images, labels in batches]
    yield model, batches


def masks_after(device, prune_it):
    found = []
    for model, batches in both(device):
        prune_it(model, batches)
        found.append({name: mask.cpu() for name, mask in model.named_buffers() if name.endswith("_mask")})
    return found


def check_same(device, prune_it):
    there, here = masks_after(device, prune_it)
    assert there.keys() == here.keys()
    assert all(torch.equal(mask, here[name]) for name, mask in there.items())
    assert 0 < sum(int(mask.sum()) for mask in here.values()) < sum(mask.numel() for mask in here.values())


def heads_of(model):
    return [(head, "weight") for head in model.heads.values()]


ONE_CALL = {
    "static": (disparse_static, {"amount": 0.8}),
    "static, adaptive": (disparse_static, {"amount": 0.8, "criterion": "layer_adaptive(snip)"}),
    "pretrained": (disparse_pretrained, {"amount": 0.8}),
    "by the mean": (disparse_pretrained, {"amount": 0.8, "arbiter": "mean", "min_keep": 2}),
    "channels": (disparse_static, {"amount": 0.3, "pattern": "channels"}),
}


@pytest.mark.parametrize("call", ONE_CALL)
def test_one_call(device, call):
    function, options = ONE_CALL[call]
    check_same(device, lambda model, batches: function(model, digit_losses, batches, **options))


def test_blocks(device):
    def in_blocks(model, batches):
        disparse_static(model, digit_losses, batches, pattern="2:4", parameters=heads_of(model))

    check_same(device, in_blocks)


def test_a_second_call_prunes_what_is_left(device):
    def twice(model, batches):
        disparse_pretrained(model, digit_losses, batches, 0.5)
        disparse_pretrained(model, digit_losses, batches, 0.5)

    check_same(device, twice)


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("min_keep", [0, 3])
def test_torch_prunes_by_agreement_scores(device, bound, min_keep, recwarn):
    def by_torch(model, batches):
        scores = score_tasks(model, digit_losses, batches)
        if bound:
            prune.global_unstructured(scores.parameters, DiSparsePretrained.bind(scores, min_keep=min_keep), amount=0.7)
        else:
            q = scores.importance(min_keep=min_keep)
            assert {values.device for values in q.values()} == {next(model.parameters()).device}
            prune.global_unstructured(scores.parameters, DiSparseStatic, importance_scores=q, amount=0.7)

    check_same(device, by_torch)
    assert not [str(warning.message) for warning in recwarn]


ONE_TENSOR = {
    "weights": functools.partial(DiSparseStatic.apply, amount=0.6),
    "blocks": functools.partial(DiSparseSemiStructured.apply, n=2, m=4),
    "channels": functools.partial(DiSparseStructured.apply, amount=1),
}


@pytest.mark.parametrize("form", ONE_TENSOR)
@pytest.mark.parametrize("times", [1, 2])
def test_torch_prunes_one_tensor(device, form, times):
    def by_torch(model, batches):
        scores = score_tasks(model, digit_losses, batches)
        q = channel_importance(scores) if form == "channels" else scores.importance()
        for pair in heads_of(model):
            for _ in range(times):
                ONE_TENSOR[form](*pair, importance_scores=q[pair])

    check_same(device, by_torch)


def _trained(scheduler, model, optimizer, batches):
    for _ in range(6):
        optimizer.zero_grad()
        sum(digit_losses(model, batches[0]).values()).backward()
        optimizer.step()
        scheduler.step(batches[0])


@pytest.mark.parametrize("arbiter", ["unanimous", "mean"])
@pytest.mark.parametrize("pattern", ["weights", "2:4"])
def test_weights_move(device, arbiter, pattern):
    def moving(model, batches):
        model.eval()  # dropout draws other numbers there
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        amount = {} if pattern == "2:4" else {"amount": 0.5}
        scheduler = DiSparseScheduler(
            model, optimizer, digit_losses, update_every=2, stop_at=6, arbiter=arbiter, pattern=pattern,
            parameters=heads_of(model), **amount,
        )  # fmt: skip
        _trained(scheduler, model, optimizer, batches)

    check_same(device, moving)


@pytest.mark.parametrize("pattern", ["weights", "channels"])
def test_pruned_in_stages(device, pattern):
    def in_stages(model, batches):
        model.eval()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        options = {"parameters": heads_of(model)} if pattern == "channels" else {}
        pruning = GradualPruning(
            model, optimizer, digit_losses, amount=0.6, update_every=2, stop_at=6, pattern=pattern, **options
        )
        _trained(pruning, model, optimizer, batches)

    check_same(device, in_stages)


def test_what_is_said_of_tasks(device):
    """Conflicts of gradients, overlap with its controls, and what is pruned."""
    said = []
    for model, batches in both(device):
        model.eval()
        conflict = GradientConflict()
        scores = score_tasks(model, digit_losses, batches, observe=conflict)
        overlap = overlap_with_controls(model, digit_losses, batches, 0.8, resamples=2)
        disparse_static(model, digit_losses, batches, 0.5)
        said.append((str(conflict), str(overlap), str(scores), str(sparsity_report(model))))
    assert said[0] == said[1]


def test_random_numbers_of_the_device_go_on_as_if_nothing_had_been_scored(device, monkeypatch):
    """Of any device that says where they are, as ``torch.mps`` and ``torch.xpu`` do."""
    states = {torch.device(device.type, 0): torch.zeros(1)}
    monkeypatch.setattr(torch.simulated, "get_rng_state", lambda which: states[which], raising=False)
    monkeypatch.setattr(torch.simulated, "set_rng_state", lambda s, which: states.update({which: s}), raising=False)

    def losses(model, batch):
        states[model.trunk[0].weight.device] = torch.ones(1)  # as dropout does
        return digit_losses(model, batch)

    model, batches = next(both(device))
    score_tasks(model, losses, batches)
    assert [float(state) for state in states.values()] == [0.0]
