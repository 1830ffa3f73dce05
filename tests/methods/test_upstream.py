"""Facts about PyTorch that this package relies on; if one of these fails, PyTorch has changed."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune


@pytest.fixture
def pair():
    first, second = nn.Linear(3, 2), nn.Linear(2, 2)
    return [(first, "weight"), (second, "weight")]


class _Recording(prune.L1Unstructured):
    seen: list

    def compute_mask(self, t, default_mask):
        type(self).seen.append((t, default_mask))
        return super().compute_mask(t, default_mask)


def test_a_global_method_gets_one_vector_of_the_entries_alive(pair):
    _Recording.seen = []
    prune.custom_from_mask(*pair[0], torch.tensor([[1.0, 0, 1], [1, 1, 1]]))
    scores = {key: torch.arange(key[0].weight.numel()).reshape(key[0].weight.shape).double() for key in pair}
    prune.global_unstructured(pair, _Recording, importance_scores=scores, amount=1)
    (vector, default_mask) = _Recording.seen[0]
    assert vector.tolist() == [0, 2, 3, 4, 5, 0, 1, 2, 3]
    assert default_mask.tolist() == [1.0] * 9


def test_missing_scores_become_weights_that_require_a_gradient(pair):
    _Recording.seen = []
    prune.global_unstructured(pair, _Recording, importance_scores={pair[0]: torch.ones(2, 3)}, amount=1)
    assert _Recording.seen[0][0].requires_grad


def test_a_failing_method_changes_nothing(pair):
    class Failing(prune.L1Unstructured):
        def compute_mask(self, t, default_mask):
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        prune.global_unstructured(pair, Failing, amount=1)
    assert not any(prune.is_pruned(module) for module, _ in pair)


def test_the_hook_left_behind_is_custom_from_mask_and_grows(pair):
    for _ in range(2):
        prune.global_unstructured(pair, prune.L1Unstructured, amount=1)
    (hook,) = pair[0][0]._forward_pre_hooks.values()
    assert [type(method) for method in hook] == [prune.CustomFromMask] * 2


def test_the_effective_weight_is_an_attribute_made_anew_at_every_call(pair):
    layer = pair[0][0]
    prune.random_unstructured(layer, "weight", 1)
    layer(torch.ones(3))
    first = vars(layer)["weight"]
    layer(torch.ones(3))
    assert vars(layer)["weight"] is not first


def test_deepcopy_of_a_pruned_module_fails_until_a_forward_without_gradients(pair):
    layer = pair[0][0]
    prune.random_unstructured(layer, "weight", 1)
    with pytest.raises(RuntimeError, match="Only Tensors created explicitly by the user"):
        copy.deepcopy(layer)
    with torch.no_grad():
        layer(torch.ones(3))
    copy.deepcopy(layer)


def test_a_count_and_a_fraction_are_rounded_as_python_rounds():
    assert prune._compute_nparams_toprune(0.5, 5) == round(2.5) == 2
    assert prune._compute_nparams_toprune(3, 5) == 3
