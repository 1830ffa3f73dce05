"""catalyst's prune_model calls ``fn(module, name, amount)``, which is how our bound classes are applied."""

import pytest
from torch.nn.utils import prune

from client_runs import AMOUNT, client, masked, outputs, same, scored, zeros
from disparse_plugin import DiSparseStatic, DiSparseStructured

pytestmark = pytest.mark.clients


@pytest.fixture
def catalyst():
    return client("catalyst.utils.pruning")


def layers_of(scores):
    return [name.removesuffix(".weight") for name in scores.names]


def test_a_bound_class_prunes_each_layer_by_its_agreement(catalyst):
    model, scores = scored()
    importance = scores.importance()
    catalyst.prune_model(model, DiSparseStatic.bind(scores).apply, AMOUNT, layers_to_prune=layers_of(scores))
    for module, name in scores.parameters:
        kept = module.weight_mask != 0
        assert int((~kept).sum()) == round(AMOUNT * kept.numel())
        assert importance[module, name][~kept].max() <= importance[module, name][kept].min()


def test_masks_that_were_cut_over_all_layers(catalyst):
    """prune_model knows no global pruning, but the function may bring masks that were cut before."""
    model, scores = scored()
    masks = scores.masks(AMOUNT)

    def apply(module, name, amount):
        prune.custom_from_mask(module, name, masks[module, name])

    catalyst.prune_model(model, apply, AMOUNT, layers_to_prune=layers_of(scores))
    expected = {name: ~masks[key] for name, key in zip(scores.names, scores.parameters, strict=True)}
    assert same(zeros(model), expected)


def test_whole_channels(catalyst):
    model, scores = scored()
    importance = scores.importance()

    def apply(module, name, amount):
        DiSparseStructured.apply(module, name, amount, importance_scores=importance[module, name])

    catalyst.prune_model(model, apply, 0.5, layers_to_prune=["trunk.3"])
    assert int((model.trunk[3].weight_mask.flatten(1) == 0).all(1).sum()) == 3


def test_its_removal_makes_masks_permanent(catalyst):
    model = masked()
    expected = outputs(model)
    catalyst.remove_reparametrization(model, ["weight"])
    assert not prune.is_pruned(model)
    assert same(outputs(model), expected)


def test_without_a_list_of_layers_nothing_is_pruned(catalyst):
    """prune_model then tries every module, the model itself first, and passes over AttributeError only."""
    model, scores = scored()
    with pytest.raises(ValueError, match="'weight' of TwoHeads must be among the parameters that the scores were made"):
        catalyst.prune_model(model, DiSparseStatic.bind(scores).apply, AMOUNT)
    assert not prune.is_pruned(model)
