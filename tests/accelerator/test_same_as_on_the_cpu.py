"""Masks and importance on an accelerator: those of the CPU, entry by entry, and in the same place as the weights."""

import math

import pytest
import torch

from disparse_plugin import TaskScores, arbiters, at_least, disparse_static, score_tasks
from disparse_plugin.agreement import band, by_sums, counting, joined, ranking, sample, ways
from disparse_plugin.sparse_training import at_once
from disparse_plugin.sparse_training.exchange import Exchange
from networks import TwoHeads, digit_batches, digit_losses
from tied_scores import SCORES, WEIGHTS, Tied

ARBITERS = ("unanimous", "majority", "mean", "any", at_least(2))
SHAPES = ((8, 4), (4, 4, 3, 3), (5, 8), (3, 12))


def drawn(seed, tied, masked):
    """Three tasks on four tensors; every score ties with many others, or none does."""
    generator = torch.Generator().manual_seed(seed)

    def some(values, size):
        return [values[place] for place in torch.randint(len(values), (size,), generator=generator).tolist()]

    sizes = [math.prod(shape) for shape in SHAPES]
    reach = {"a": (0, 1, 2), "b": (0, 1, 3), "c": (0, 3)}
    tables = {
        task: {
            index: some(SCORES, sizes[index]) if tied else torch.randn(sizes[index], generator=generator).tolist()
            for index in reached
        }
        for task, reached in reach.items()
    }
    weights = [some(WEIGHTS, size) for size in sizes]
    alive = [some([True, True, False], size) if masked else [True] * size for size in sizes]
    return Tied(list(SHAPES), tables, weights, alive)


CUTS = {
    "a share": {"amount": 0.6},
    "nothing": {"amount": 0},
    "all": {"amount": 1.0},
    "floors": {"amount": 0.8, "min_keep": 5},
    "parts": {"amount": {"shared": 0.7, "a": 0.2, "b": 0, "c": 0}, "min_keep": 0.05},
    "blocks": {"pattern": "2:4"},
    "channels": {"amount": 0.5, "pattern": "channels"},
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_masks(accelerator, tied, masked, cut):
    case = drawn(0, tied, masked)
    _, there = case.build(accelerator)
    _, here = case.build()
    for arbiter in ARBITERS:
        found, expected = there.masks(arbiter=arbiter, **CUTS[cut]), here.masks(arbiter=arbiter, **CUTS[cut])
        for one, other in zip(found.values(), expected.values(), strict=True):
            assert one.device.type == accelerator.type
            assert torch.equal(one.cpu(), other)


@pytest.fixture(params=[8, 10**6], ids=["by a sample", "by counting"])
def small_counts_as_large(monkeypatch, request):
    """Cut as large models are, two tensors together and in pieces, with nothing small enough to be sorted at once."""
    monkeypatch.setattr(band, "SAMPLE", request.param)
    monkeypatch.setattr(band, "HALF_WIDTH", 0.2)
    monkeypatch.setattr(ways, "COUNTED_THERE", 0)
    monkeypatch.setattr(joined, "TOGETHER", 200)
    monkeypatch.setattr(counting, "LONG_PIECE", 50)
    monkeypatch.setattr(ranking, "SORTED_AT_ONCE", 8)
    monkeypatch.setattr(ranking, "STRIDE", 3)
    monkeypatch.setattr(ranking, "ROW", 4)


@pytest.mark.usefixtures("small_counts_as_large")
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("tied", [False, True])
def test_masks_of_large_models(accelerator, tied, cut):
    test_masks(accelerator, tied, False, cut)


@pytest.mark.usefixtures("small_counts_as_large")
@pytest.mark.parametrize("amount", [0.3, 0.6, {"shared": 0.5, "a": 0.2, "b": 0, "c": 0}])
def test_masks_by_sums_of_shares_of_large_models(accelerator, monkeypatch, amount):
    monkeypatch.setattr(sample, "EVERY", 3)
    monkeypatch.setattr(by_sums, "MOST_BETWEEN", 1)
    masks = []
    for device in (accelerator, torch.device("cpu")):
        model, scores = drawn(2, False, False).build(device)
        shares = {task: {key: row.abs().clamp_max(1) for key, row in scores[task].items()} for task in scores}
        masks.append(TaskScores(model, shares, parameters=scores.parameters, shares=True).masks(amount, "sum"))
    for one, other in zip(*(found.values() for found in masks), strict=True):
        assert torch.equal(one.cpu(), other)


@pytest.mark.usefixtures("small_counts_as_large")
def test_importance_of_large_models(accelerator):
    test_importance(accelerator, False, 3)


@pytest.mark.parametrize("min_keep", [0, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_importance(accelerator, masked, min_keep):
    case = drawn(1, True, masked)
    _, there = case.build(accelerator)
    _, here = case.build()
    for arbiter in ARBITERS:
        found, expected = (scores.importance(arbiter, min_keep=min_keep) for scores in (there, here))
        for one, other in zip(found.values(), expected.values(), strict=True):
            assert one.device.type == accelerator.type
            assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize("rule", ["unanimous", "mean"])
@pytest.mark.parametrize("regrow", [False, True])
def test_an_exchange(accelerator, rule, regrow, monkeypatch):
    """All layers together there, one after the other here; some tie, one is not asked for and one is full."""
    monkeypatch.setattr(at_once, "TOGETHER", 300)
    generator = torch.Generator().manual_seed(0)
    shapes = (*SHAPES, (40, 2))
    weights = [torch.randn(shape, generator=generator).mul(2).round() for shape in shapes]
    alive = [
        torch.rand(shape, generator=generator) < share
        for shape, share in zip(shapes, [0.5, 0.2, 1, 0.4, 0.3], strict=True)
    ]
    rows = [{task: torch.randn(shape, generator=generator).abs() for task in "ab"} for shape in shapes]
    rows[1] = {"a": rows[1]["a"], "b": torch.zeros(shapes[1])}
    rows[3] = {"b": torch.zeros(shapes[3])}
    exchange = Exchange(0.3, arbiters.resolve(rule), ["a", "b"], regrow)
    here = exchange.new_masks(weights, alive, rows)
    there = exchange.new_masks(
        [weight.to(accelerator) for weight in weights],
        [mask.to(accelerator) for mask in alive],
        [{task: row.to(accelerator) for task, row in each.items()} for each in rows],
    )
    assert all(torch.equal(one.cpu(), other) for one, other in zip(there, here, strict=True))
    changed = [bool((mask != before).any()) for mask, before in zip(here, alive, strict=True)]
    assert changed == [True, True, False, False, True]


def moved(batches, accelerator):
    return [tuple(part.to(accelerator) for part in batch) for batch in batches]


@pytest.mark.parametrize("criterion", ["snip", "fisher", "layer_adaptive(taylor)", "magnitude"])
def test_scores_and_files(accelerator, criterion, tmp_path):
    model = TwoHeads().eval()
    here = score_tasks(model, digit_losses, digit_batches(), criterion=criterion)
    model.to(accelerator)
    there = score_tasks(model, digit_losses, moved(digit_batches(), accelerator), criterion=criterion)
    there.save(tmp_path / "scores.safetensors")
    again = type(there).load(tmp_path / "scores.safetensors", model)
    for task in here:
        for key, one, other in zip(there[task], there[task].values(), here[task].values(), strict=True):
            assert torch.allclose(one.cpu(), other, rtol=1e-4)
            assert torch.equal(again[task][key], one)
            assert again[task][key].device == key[0].weight.device


@pytest.mark.parametrize("pattern", ["weights", "2:4", "channels"])
def test_the_default_device_may_be_the_accelerator_or_the_cpu(accelerator, pattern):
    """Where the model is not on the default device, nothing of ours may land there."""
    options = {"pattern": pattern, "amount": None if pattern == "2:4" else 0.5, "exclude": ["trunk.0"]}
    masks = []
    for where in (accelerator, torch.device("cpu")):
        model = TwoHeads(width=4).eval()
        with torch.no_grad():
            for index, parameter in enumerate(model.parameters()):
                parameter.copy_(torch.sin(torch.arange(float(parameter.numel())) * (index + 1)).view_as(parameter))
        model, batches = model.to(where), moved(digit_batches(), where)
        torch.set_default_device(accelerator if where.type == "cpu" else "cpu")
        try:
            scores = disparse_static(model, digit_losses, batches, **options)
            assert all(module.weight_mask.device == module.weight_orig.device for module, _ in scores.parameters)
            importance = scores.importance()
        finally:
            torch.set_default_device(None)
        assert all(importance[key].device == key[0].weight_orig.device for key in scores.parameters)
        masks.append([module.weight_mask.cpu() for module, _ in scores.parameters])
    assert [mask.shape for mask in masks[0]] == [mask.shape for mask in masks[1]]
    assert sum(int((one != other).sum()) for one, other in zip(*masks, strict=True)) <= 4, "rounding of scores only"
