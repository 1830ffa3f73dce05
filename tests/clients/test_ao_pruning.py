"""torch.ao.pruning: our scores in ``update_mask`` under CubicSL, our masks in its parametrization, and what fails."""

import copy

import pytest
import torch

from client_runs import AMOUNT, client, masked, masks_by_name, outputs, same, scored, zeros
from disparse_plugin import score_tasks
from disparse_plugin.masks import clone_pruned, fold, masks_of
from networks import TwoHeads, digit_batches, digit_losses

pytestmark = pytest.mark.clients
pruning = client("torch.ao.pruning")  # part of torch, but for how long is not known


class ByAgreement(pruning.BaseSparsifier):
    """What a user writes: the masks of our scores, at the level that the schedule has reached.

    The scores are those of a copy, because scores ask their model what is alive, which ``prepare`` hides.
    """

    def __init__(self, model):
        super().__init__({"sparsity_level": AMOUNT})
        _, scores = scored(copy.deepcopy(model))
        self.scores, self.keys = scores, dict(zip(scores.names, scores.parameters, strict=True))
        self.prepare(model, [{"tensor_fqn": name} for name in scores.names])

    def update_mask(self, module, tensor_name, tensor_fqn, sparsity_level, **_):
        mask = self.scores.masks(float(sparsity_level))[self.keys[tensor_fqn]]
        module.parametrizations[tensor_name][0].mask.copy_(mask)


class Given(pruning.BaseSparsifier):
    """Masks made elsewhere."""

    def __init__(self, model, masks):
        super().__init__()
        self.prepare(model, [{"tensor_fqn": name, "mask": mask.float()} for name, mask in masks.items()])

    def update_mask(self, *_, **__):
        pass


def share_of_zeros(model):
    found = zeros(model).values()
    return sum(int(zero.sum()) for zero in found) / sum(zero.numel() for zero in found)


def test_scores_drive_the_masks_as_the_cubic_schedule_asks():
    model = TwoHeads().eval()
    sparsifier = ByAgreement(model)
    schedule = pruning.CubicSL(sparsifier, init_sl=0.0, init_t=0, delta_t=1, total_t=4)
    levels = []
    for _ in range(5):
        sparsifier.step()
        levels.append(share_of_zeros(model))
        schedule.step()
    # s_t = s_f (1 - (1 - t / n)^3) of Zhu and Gupta, 2017
    assert levels == pytest.approx([AMOUNT * (1 - (1 - t / 4) ** 3) for t in range(5)], abs=0.002)
    expected = {name: ~sparsifier.scores.masks(AMOUNT)[key] for name, key in sparsifier.keys.items()}
    assert same(zeros(model), expected)


def test_given_masks_hold_through_training_and_are_squashed():
    pruned = masked()
    model = TwoHeads().eval()
    model.load_state_dict(fold(clone_pruned(pruned)).state_dict())
    sparsifier = Given(model, masks_of(pruned))
    assert same(outputs(model), outputs(pruned))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for batch in digit_batches(3):
        optimizer.zero_grad()
        sum(digit_losses(model, batch).values()).backward()
        optimizer.step()
        sparsifier.step()
    trained = outputs(model)
    sparsifier.squash_mask()
    assert same(outputs(model), trained)
    assert not same(trained, outputs(pruned))
    assert all(bool(zeros(model)[name][mask].all()) for name, mask in masks_by_name(pruned).items())


def test_masks_survive_its_state_dict():
    """Loading writes into a prepared model, and takes the masks out of the state that it is given."""
    model = TwoHeads().eval()
    sparsifier = ByAgreement(model)
    sparsifier.step()
    saved = copy.deepcopy(sparsifier.state_dict())
    fresh = TwoHeads().eval()
    other = Given(fresh, {name: torch.ones_like(mask) for name, mask in zeros(model).items()})
    other.load_state_dict(saved)
    assert same(zeros(fresh), zeros(model))


class TestWhatFails:
    def test_a_model_pruned_by_torch_cannot_be_prepared(self):
        with pytest.raises(ValueError, match="does not have a parameter, a buffer, or a parametrized element with nam"):
            Given(masked(), masks_of(masked()))

    def test_a_prepared_model_cannot_be_scored(self):
        model = TwoHeads().eval()
        ByAgreement(model)
        with pytest.raises(ValueError, match=r"found none that can be masked: .*computed by a parametrization"):
            score_tasks(model, digit_losses, digit_batches())

    def test_its_masks_are_not_those_of_torch_nn_utils_prune(self):
        model = TwoHeads().eval()
        ByAgreement(model).step()
        assert masks_of(model) == {}
