"""Gradient conflict, collected while scoring, against gradients taken one by one."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from disparse_plugin import score_tasks
from disparse_plugin.analysis import GradientConflict
from networks import PartlyShared, Snapshot, TwoHeads, digit_batches, digit_losses, square_losses, vectors


def by_hand(model, losses, batches, module, tasks, alive=None):
    """Cosine and conflicting share per batch, from one backward per task on a graph of its own."""
    cosines, shares = [], []
    for batch in batches:
        grads = []
        for task in tasks:
            grad = torch.autograd.grad(losses(model, batch)[task], leaf(module))[0].double().flatten()
            grads.append(grad if alive is None else grad[alive.flatten()])
        cosines.append(float(torch.cosine_similarity(*grads, dim=0)))
        shares.append(float((grads[0] * grads[1] < 0).double().mean()))
    return cosines, shares


def leaf(module):
    return module.weight_orig if prune.is_pruned(module) else module.weight


@pytest.mark.filterwarnings("ignore:parameters")
def test_cosines_and_signs_follow_their_definition(device):
    model = PartlyShared().to(device)
    batches = [batch.to(device) for batch in vectors(4)]
    conflict = GradientConflict()
    score_tasks(model, square_losses, batches, observe=conflict)
    found = {(layer.name, layer.tasks): layer for layer in conflict.layers()}
    assert set(found) == {
        ("abc.weight", ("a", "b")),
        ("abc.weight", ("a", "c")),
        ("abc.weight", ("b", "c")),
        ("ab.weight", ("a", "b")),
    }
    for (name, tasks), layer in found.items():
        cosines, shares = by_hand(
            model, square_losses, batches, model.get_submodule(name.removesuffix(".weight")), tasks
        )
        assert layer.batches == 4
        assert layer.cosine == pytest.approx(torch.tensor(cosines).mean().item(), abs=1e-5)
        assert layer.cosine_std == pytest.approx(torch.tensor(cosines).std(correction=0).item(), abs=1e-5)
        assert layer.conflicting == pytest.approx(torch.tensor(shares).mean().item())


def test_pruned_entries_do_not_count():
    model, batches = TwoHeads().eval(), digit_batches(2)
    prune.random_unstructured(model.trunk[3], "weight", 0.5)
    conflict = GradientConflict()
    score_tasks(model, digit_losses, batches, observe=conflict)
    layer = conflict.layers()[1]
    assert layer.name == "trunk.3.weight"
    cosines, shares = by_hand(model, digit_losses, batches, model.trunk[3], "ab", model.trunk[3].weight_mask.bool())
    assert layer.cosine == pytest.approx(sum(cosines) / 2, abs=1e-5)
    assert layer.conflicting == pytest.approx(sum(shares) / 2)


@pytest.mark.parametrize("scale", [1e-30, 1e-21, 1e-6, 1e21, 1e25])
def test_the_scale_of_a_loss_does_not_matter(scale):
    model = TwoHeads().eval()

    def scaled(net, batch):
        losses = digit_losses(net, batch)
        return {"a": losses["a"] * scale, "b": losses["b"]}

    plain, other = GradientConflict(), GradientConflict()
    score_tasks(model, digit_losses, digit_batches(), observe=plain, criterion="magnitude")
    score_tasks(model, scaled, digit_batches(), observe=other, criterion="magnitude")
    for expected, found in zip(plain.layers(), other.layers(), strict=True):
        assert found.cosine == pytest.approx(expected.cosine, abs=1e-5)
        assert found.cosine_std == pytest.approx(expected.cosine_std, abs=1e-5)
        assert found.conflicting == pytest.approx(expected.conflicting, abs=1e-2)


def test_watching_changes_neither_scores_nor_model():
    model = TwoHeads().eval()
    before = Snapshot(model)
    plain = score_tasks(model, digit_losses, digit_batches())
    watched = score_tasks(model, digit_losses, digit_batches(), observe=GradientConflict())
    before.check()
    for task in plain:
        assert all(torch.equal(plain[task][key], watched[task][key]) for key in plain[task])


def test_no_gradient_is_held_longer_than_needed():
    """Private gradients are never held, and shared ones only until the last task that shares them."""
    model, held = TwoHeads(("a", "b", "c")).eval(), []

    class Watched(GradientConflict):
        def add(self, task, grads):
            super().add(task, grads)
            held.append({self._names[index]: len(found) for index, found in self._held.items()})

    score_tasks(model, digit_losses, digit_batches(1), observe=Watched())
    trunk = ("trunk.0.weight", "trunk.3.weight")
    assert held == [dict.fromkeys(trunk, 1), dict.fromkeys(trunk, 2), {}]


def test_a_task_without_gradient_in_a_batch_and_a_zero_gradient():
    layer = nn.Linear(3, 1, bias=False)

    def losses(model, batch):
        loss = model(batch[None]).sum()
        return {"a": loss, "zero": loss * 0, "b": loss if batch.sum() > 3 else torch.zeros(())}

    conflict = GradientConflict()
    with pytest.warns(UserWarning, match="3 of 3 alive weights of task 'zero' score exactly zero"):
        score_tasks(layer, losses, [torch.ones(3), 2 * torch.ones(3)], observe=conflict)
    found = {layer.tasks: layer for layer in conflict.layers()}
    assert math.isnan(found["a", "zero"].cosine)
    assert found["a", "zero"].conflicting == 0
    assert (found["a", "b"].cosine, found["a", "b"].batches) == (pytest.approx(1), 1)
    assert len(conflict.rows()) == 3
    assert "a & b" in str(conflict)


def test_a_second_model_needs_a_collector_of_its_own():
    conflict, model = GradientConflict(), TwoHeads().eval()
    for _ in range(2):  # the same one may be scored again
        score_tasks(model, digit_losses, digit_batches(1), observe=conflict)
    assert {layer.batches for layer in conflict.layers()} == {2}
    with pytest.raises(ValueError, match="observe: a GradientConflict must be of the same parameters of one model"):
        score_tasks(TwoHeads().eval(), digit_losses, digit_batches(1), observe=conflict)
