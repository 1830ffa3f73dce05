"""What torch promises for several methods on one tensor, and for one method on several tensors."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from disparse_plugin import DiSparsePretrained, DiSparseSemiStructured, DiSparseStatic, DiSparseStructured, TaskScores
from disparse_plugin.sparse_training import DiSparseDynamic
from networks import TwoHeads, digit_batches
from pruning_cases import CLASSES, METHODS, each_method, pruning_hooks


def torch_random(module, name):
    return prune.RandomUnstructured.apply(module, name, 0.5)


def torch_l1(module, name):
    return prune.L1Unstructured.apply(module, name, 0.5)


def torch_ln(module, name):
    return prune.LnStructured.apply(module, name, 0.25, 2, 0)


def torch_custom(module, name):
    return prune.CustomFromMask.apply(module, name, torch.rand_like(getattr(module, name)).round())


TORCH = {"random": torch_random, "L1": torch_l1, "Ln": torch_ln, "from a mask": torch_custom}
ALL = {**METHODS, **TORCH}
PAIRS = [pair for pair in itertools.product(ALL, ALL) if not set(pair) <= set(TORCH)]


@pytest.mark.parametrize(("first", "second"), [pair for pair in PAIRS if pair[1] != "dynamic"])
def test_a_second_method_makes_a_container_in_order(first, second):
    layer = nn.Linear(8, 8)
    weight, one = layer.weight, ALL[first](layer, "weight")
    before = layer.weight_mask.clone()
    container = ALL[second](layer, "weight")
    assert isinstance(container, prune.PruningContainer)
    assert pruning_hooks(layer) == [container]
    assert len(container) == 2
    assert container[0] is one
    assert isinstance(container[1], CLASSES.get(second, prune.BasePruningMethod))
    assert layer.weight_orig is weight
    assert not bool((layer.weight_mask > before).any())
    assert layer.weight_mask.dtype == weight.dtype  # and not that of the scores
    x = torch.randn(2, 8)
    assert torch.equal(layer(x), nn.functional.linear(x, weight * layer.weight_mask, layer.bias))
    third = ALL["static"](layer, "weight")
    assert third is container
    assert len(container) == 3
    prune.remove(layer, "weight")
    assert not prune.is_pruned(layer)


@pytest.mark.parametrize("first", ALL)
def test_the_dynamic_method_replaces_what_is_there_by_one_hook_and_keeps_its_mask(first):
    """A container could only grow; this method has one mask, in one buffer, for good."""
    layer, mask = nn.Linear(8, 8), torch.rand(8, 8) > 0.5
    ALL[first](layer, "weight")
    buffer, before = layer.weight_mask, layer.weight_mask.clone()
    hook = DiSparseDynamic.apply(layer, "weight", mask)
    assert pruning_hooks(layer) == [hook]
    assert layer.weight_mask is buffer
    assert torch.equal(buffer, before * mask)


@pytest.mark.parametrize("method", [DiSparseStatic, DiSparsePretrained])
def test_of_a_tensor_pruned_before_the_lowest_alive_entries_go(method):
    """Torch's rule for unstructured methods: amount counts what is alive, and scores of dead entries say nothing."""
    layer = nn.Linear(4, 2, bias=False)
    prune.custom_from_mask(layer, "weight", torch.tensor([[0.0, 1, 1, 0], [1, 1, 1, 1]]))
    scores = torch.tensor([[9.0, 3, 1, 9], [2, 5, 4, 6]])
    method.apply(layer, "weight", 0.5, importance_scores=scores)
    assert layer.weight_mask.tolist() == [[0, 0, 0, 0], [0, 1, 1, 1]]


def test_of_a_tensor_pruned_before_the_lowest_alive_channels_go():
    layer = nn.Linear(2, 4, bias=False)
    prune.custom_from_mask(layer, "weight", torch.tensor([[0.0, 0], [1, 0], [1, 1], [1, 1]]))
    scores = torch.tensor([[0.0, 0], [5, 5], [1, 1], [7, 7]])
    DiSparseStructured.apply(layer, "weight", 1, importance_scores=scores)
    assert layer.weight_mask.tolist() == [[0, 0], [1, 0], [0, 0], [1, 1]]


BLOCK = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
LOOSE = {
    "static": (DiSparseStatic(2), [1, 1, 0, 0], [0, 1, 0, 0]),
    "pretrained": (DiSparsePretrained(0.5), [1, 1, 0, 0], [0, 1, 0, 0]),
    "structured": (DiSparseStructured(2, dim=1), [1, 1, 0, 0], [0, 1, 0, 0]),
    "two of four": (DiSparseSemiStructured(), [1, 1, 0, 0], [0, 1, 1, 0]),
    "dynamic": (DiSparseDynamic(torch.tensor([[True, True, False, False]])), [1, 1, 0, 0], [0, 1, 0, 0]),
}


@pytest.mark.parametrize(("method", "fresh", "after"), LOOSE.values(), ids=LOOSE)
def test_a_default_mask_is_kept_and_not_written_to(method, fresh, after):
    """``compute_mask`` and ``prune`` on a loose tensor: what the default mask leaves out stays out."""
    before = torch.ones(1, 4)
    default = torch.tensor([[0.0, 1, 1, 1]])
    assert method.compute_mask(BLOCK, before).tolist() == [fresh]
    assert before.tolist() == [[1, 1, 1, 1]]
    # Of the three alive: two go (count), round(0.5 * 3) = 2 go (fraction), two of the block stay (2:4).
    assert method.compute_mask(BLOCK, default).tolist() == [after]
    assert default.tolist() == [[0, 1, 1, 1]]
    weight = torch.tensor([[5.0, 6.0, 7.0, 8.0]])
    assert method.prune(weight, importance_scores=BLOCK).tolist() == [
        [w * m for w, m in zip([5, 6, 7, 8], fresh, strict=True)]
    ]
    assert weight.tolist() == [[5, 6, 7, 8]]


@each_method
@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.float32, torch.float64])
def test_a_mask_has_the_type_of_its_default(method, dtype):
    layer = nn.Linear(8, 4).to(dtype)
    METHODS[method](layer, "weight")
    assert layer.weight_mask.dtype == layer.weight.dtype == dtype


@pytest.fixture
def keys():
    model = TwoHeads().eval()
    return [(model.trunk[0], "weight"), (model.trunk[3], "weight"), *((h, "weight") for h in model.heads.values())]


def scores_by_tensor(keys):
    """The first tensor has the lowest scores of all, the last the highest."""
    return {key: (torch.rand(getattr(*key).shape).double() + place) / len(keys) for place, key in enumerate(keys)}


@pytest.mark.parametrize("method", [DiSparseStatic, DiSparsePretrained])
def test_global_counts_over_all_tensors_and_local_in_each(keys, method):
    scores, sizes = scores_by_tensor(keys), [getattr(*key).numel() for key in keys]
    prune.global_unstructured(keys, method, importance_scores=scores, amount=0.5)
    lost = [int((module.weight_mask == 0).sum()) for module, _ in keys]
    assert sum(lost) == round(0.5 * sum(sizes))
    assert lost[0] == sizes[0]  # the low tensor goes first, as a whole
    assert lost[-1] == 0
    for module, name in keys:
        prune.remove(module, name)
        method.apply(module, name, 0.5, importance_scores=scores[module, name])
    assert [int((module.weight_mask == 0).sum()) for module, _ in keys] == [round(0.5 * size) for size in sizes]


@pytest.mark.parametrize("method", [DiSparseStatic, DiSparsePretrained])
def test_a_global_method_leaves_one_custom_mask_per_tensor(keys, method):
    weights = [module.weight for module, _ in keys]
    model_output = [module.weight.detach().clone() for module, _ in keys]
    prune.global_unstructured(keys, method, importance_scores=scores_by_tensor(keys), amount=20)
    for (module, _), weight, values in zip(keys, weights, model_output, strict=True):
        (hook,) = pruning_hooks(module)
        assert isinstance(hook, prune.CustomFromMask)
        assert module.weight_orig is weight
        assert torch.equal(module.weight, values * module.weight_mask)


@pytest.mark.parametrize(("method", "options"), [(DiSparseStructured, {"amount": 1}), (DiSparseSemiStructured, {})])
def test_a_pattern_cannot_be_pruned_globally(keys, method, options):
    with pytest.raises(TypeError, match='Only "unstructured" PRUNING_TYPE supported'):
        prune.global_unstructured(keys, method, importance_scores=scores_by_tensor(keys), **options)
    assert not any(prune.is_pruned(module) for module, _ in keys)


def test_a_whole_pruned_model_survives_torch_save(keys, tmp_path):
    """A bound class is made on the fly, which pickle could not find again; so it must not stay behind on the model."""
    model = TwoHeads().eval()
    keys = [(model.trunk[3], "weight"), (model.heads["a"], "weight")]
    tables = {"a": {key: torch.rand(getattr(*key).shape) for key in keys}}
    bound = DiSparseStatic.bind(TaskScores(model, tables), min_keep=3)
    prune.global_unstructured(keys, bound, amount=0.5)
    bound.apply(*keys[0], 0.5)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    images = digit_batches(1)[0][0]
    assert torch.equal(loaded(images)["a"], model(images)["a"])
