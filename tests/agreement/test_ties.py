"""Of equal scores the smaller magnitude goes first, then the first in order: in every path, of every type."""

import copy
import functools
from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from disparse_plugin import (
    DiSparsePretrained,
    DiSparseSemiStructured,
    DiSparseStatic,
    DiSparseStructured,
    TaskScores,
    score_tasks,
    sorting,
)
from disparse_plugin.agreement import band, counting, ranking, ways
from disparse_plugin.agreement.percentiles import agreement
from disparse_plugin.agreement.ranking import ascending, distinct, in_single
from oracles.agreement import ARBITERS, ordered_positions
from tied_scores import Bare, kept_places, tied

RULES = st.sampled_from(sorted(ARBITERS))


def by_masks(model, scores, count, rule):
    return scores.masks(count, rule)


def by_masks_with(*changes):
    """As :func:`by_masks`, with other bounds, by module and name."""

    def way(model, scores, count, rule):
        with pytest.MonkeyPatch.context() as patch:
            for module, name, value in changes:
                patch.setattr(module, name, value)
            return scores.masks(count, rule)

    return way


by_a_sample = by_masks_with((band, "SAMPLE", 2), (band, "HALF_WIDTH", 0.2))
# As all but tiny models are cut on a CPU, here with few bins and pieces of three.
by_counting = by_masks_with(
    (ways, "COUNTED", 0), (counting, "DROPPED", 21), (counting, "PIECE", 3), (counting, "STEPS", 8)
)
# As float64 values of very many units are sorted: few of their bits fit beside the turn.
by_keys_that_lose_bits = by_masks_with((sorting, "KEY_BITS", 40), (sorting, "PIECE", 3))


def by_importance(model, scores, count, rule):
    importance = scores.importance(rule)
    prune.global_unstructured(scores.parameters, DiSparseStatic, importance_scores=importance, amount=count)


def by_bound_class(model, scores, count, rule):
    prune.global_unstructured(scores.parameters, DiSparsePretrained.bind(scores, rule), amount=count)


WAYS = [by_masks, by_a_sample, by_counting, by_keys_that_lose_bits, by_importance, by_bound_class]


@pytest.mark.parametrize("way", WAYS)
@given(case=tied(), share=st.floats(0, 1), rule=RULES)
def test_all_ways_break_ties_alike(way, case, share, rule):
    count = round(share * case.size)
    expected = case.there(case.oracle().kept(count, rule))
    model, scores = case.build()
    assert kept_places(model, way(model, scores, count, rule)) == expected


@given(case=tied(), share=st.floats(0, 1), rule=RULES, min_keep=st.integers(1, 3))
def test_what_is_protected_is_chosen_by_the_same_rule(case, share, rule, min_keep):
    small = case.oracle()
    floors = [min(min_keep, size) for size in small.sizes]
    count = round(share * (case.size - sum(floors)))
    expected = case.there(small.kept_in_budget({"everything": count}, floors, rule))
    model, scores = case.build()
    assert kept_places(model, scores.masks(count, rule, min_keep=min_keep)) == expected
    importance = scores.importance(rule, min_keep=min_keep)
    prune.global_unstructured(scores.parameters, DiSparseStatic, importance_scores=importance, amount=count)
    assert kept_places(model) == expected


@given(case=tied(), share=st.floats(0, 1), rule=RULES)
def test_each_part_breaks_ties_alike(case, share, rule):
    small = case.oracle()
    sizes = {}
    for parameter, size in enumerate(small.sizes):
        sizes[small.part(parameter)] = sizes.get(small.part(parameter), 0) + size
    counts = {part: round(share * size) for part, size in sizes.items()}
    model, scores = case.build()
    expected = case.there(small.kept_in_budget(counts, [0] * len(small.sizes), rule))
    assert kept_places(model, scores.masks(counts, rule)) == expected


@pytest.mark.parametrize("score_type", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_type", [torch.float32, torch.float64, torch.bfloat16])
def test_a_sample_is_enough_among_ties_too(weight_type, score_type, monkeypatch):
    """Most scores tie, and the cut falls among them; yet only what lies near it is ranked."""
    model = nn.ModuleList([Bare(torch.randn(size).to(weight_type)) for size in (30_000, 50_000, 40_000)])
    tables = {
        task: {(model[i], "weight"): _tied_at_the_cut(len(model[i].weight)).to(score_type) for i in reached}
        for task, reached in {"a": (0, 1), "b": (1, 2)}.items()
    }
    scores = TaskScores(model, tables)
    full = scores.masks(0.5)
    monkeypatch.setattr(band, "SAMPLE", 10_000)
    monkeypatch.setattr(band, "HALF_WIDTH", 0.05)
    monkeypatch.setattr(band, "agreement", _of_a_sample)
    quick = scores.masks(0.5)
    assert all(torch.equal(full[key], quick[key]) for key in full)


def test_a_cut_by_a_sample_parts_equal_agreement_scores_by_magnitude(monkeypatch):
    """Two tasks on a tensor each: every percentile comes twice, and every other cut falls between equal ones."""
    model = nn.ModuleList([Bare(torch.randn(2000)) for _ in "ab"])
    tables = {task: {(layer, "weight"): torch.randn(2000)} for task, layer in zip("ab", model, strict=True)}
    scores, counts = TaskScores(model, tables), range(1980, 2020)
    full = [kept_places(model, scores.masks(count)) for count in counts]
    monkeypatch.setattr(band, "SAMPLE", 500)
    monkeypatch.setattr(band, "HALF_WIDTH", 0.1)
    monkeypatch.setattr(band, "agreement", functools.partial(_of_a_sample, most=1500))
    assert [kept_places(model, scores.masks(count)) for count in counts] == full


@given(st.sampled_from(sorted(ARBITERS)), st.floats(0.05, 0.95), st.integers(0, 99))
def test_only_order_statistics_are_cut_by_a_sample(rule, share, seed):
    """The mean of clipped percentiles is not the clipped mean."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.ModuleList([Bare(torch.randn(size, generator=generator)) for size in (150, 90, 200)])
    reached = {"a": (0, 1, 2), "b": (0, 2), "c": (1, 2)}
    tables = {
        task: {(model[i], "weight"): torch.randn(len(model[i].weight), generator=generator) for i in places}
        for task, places in reached.items()
    }
    scores = TaskScores(model, tables)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(band, "SAMPLE", 50)
        patch.setattr(band, "HALF_WIDTH", 0.2)
        quick = kept_places(model, scores.masks(share, rule))
    assert quick == kept_places(model, scores.masks(share, rule))


def test_scores_that_hardly_differ_are_sorted_all_the_same():
    assert sorting.stable_order(torch.tensor([1e-323, 0.0, 5e-324], dtype=torch.float64)).tolist() == [1, 2, 0]


def _tied_at_the_cut(size):
    """Scores on a fine grid, so that some fifty entries share each value."""
    return torch.randint(-500, 500, (size,)).float() / 8


def _of_a_sample(candidates, *rest, most=60_000):
    assert sum(candidates.sizes) < most, "everything was ranked"
    return agreement(candidates, *rest)


@st.composite
def one_tensor(draw, shapes):
    """A module of any type, perhaps masked, and any finite scores for it."""
    case = draw(tied(shapes=shapes, max_tensors=1, max_tasks=1))
    (module,), _ = case.build()
    rows = case.weights[0], case.alive[0], case.tables["task0"][0]
    return module, torch.tensor(rows[2], dtype=case.score_type).view(case.shapes[0]), case.shapes[0], rows


@given(case=one_tensor(((7,), (2, 4), (3, 2, 2))), share=st.floats(0, 1))
def test_one_tensor_of_its_own(case, share):
    module, scores, _, (weights, alive, values) = case
    places = [place for place, there in enumerate(alive) if there]
    order = ordered_positions([values[p] for p in places], [weights[p] for p in places])
    count = round(share * len(places))
    kept = {places[position] for position in order[count:]}
    DiSparseStatic.apply(module, "weight", count, importance_scores=scores)
    assert {place for _, place in kept_places([module])} == kept


@given(case=one_tensor(((2, 4), (3, 8), (1, 12))), n=st.integers(0, 4))
def test_blocks_of_one_tensor(case, n):
    module, scores, _, (weights, alive, values) = case
    kept = set()
    for start in range(0, len(weights), 4):
        places = [place for place in range(start, start + 4) if alive[place]]
        order = ordered_positions([values[p] for p in places], [weights[p] for p in places])
        kept |= {places[position] for position in order[max(0, len(places) - n) :]}
    DiSparseSemiStructured.apply(module, "weight", n, 4, importance_scores=scores)
    assert {place for _, place in kept_places([module])} == kept


@given(case=one_tensor(((4, 2), (6, 3), (5, 1, 2))), share=st.floats(0, 1))
def test_channels_of_one_tensor(case, share):
    module, scores, (channels, *_), (weights, alive, values) = case
    width = len(weights) // channels
    rows = [range(channel * width, (channel + 1) * width) for channel in range(channels)]
    living = [channel for channel, row in enumerate(rows) if any(alive[place] for place in row)]
    order = ordered_positions(
        [sum(values[place] for place in rows[channel]) for channel in living],
        [sum(abs(weights[place]) for place in rows[channel] if alive[place]) for channel in living],
    )
    count = round(share * len(living))
    kept = {place for position in order[count:] for place in rows[living[position]] if alive[place]}
    DiSparseStructured.apply(module, "weight", count, importance_scores=scores)
    assert {place for _, place in kept_places([module])} == kept


NEAR = st.sampled_from([0.0, -0.0, 1.0, 1.0 + 2**-52, 1.0 + 2**-40, 2.0, -3.0, 5e-324, 1e300]) | st.floats(-1, 1)


@given(st.lists(NEAR, max_size=60))
def test_float64_is_sorted_by_few_bits_as_by_all(values):
    expected = sorted(range(len(values)), key=lambda place: (values[place], place))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sorting, "KEY_BITS", 20)
        patch.setattr(sorting, "PIECE", 7)
        found = sorting.stable_order(torch.tensor(values, dtype=torch.float64))
    assert found.tolist() == expected


MAGNITUDES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0 + 2**-52, 5e-324, 1e300])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(NEAR, MAGNITUDES), max_size=60), st.sampled_from([torch.float64, torch.float32]))
def test_only_equal_values_are_ordered_by_magnitude(device, pairs, dtype):
    """Runs of two and of many, of zeros of both signs, at the begin, in the middle and at the end."""
    values = torch.tensor([value for value, _ in pairs], dtype=torch.float64).to(dtype)
    magnitudes = torch.tensor([magnitude for _, magnitude in pairs], dtype=torch.float64)
    found = [ascending(values.to(device), magnitudes.to(device))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "SORTED_AT_ONCE", 0)
        found.append(ascending(values.to(device), magnitudes.to(device)))
    expected = ordered_positions(values.tolist(), magnitudes.tolist())
    assert all(order.tolist() == expected for order in found)


UNIT = st.sampled_from([0.0, -0.0, 0.25, 0.25 + 2**-54, 0.5, 1.0, 1.0 - 2**-53]) | st.floats(0, 1)


@given(st.lists(st.tuples(UNIT, st.sampled_from([-1.0, 0.0, 1.0, 2.0])), min_size=1, max_size=40), st.booleans())
def test_parting_equal_values_keeps_every_order(pairs, by_magnitude):
    values = torch.tensor([value for value, _ in pairs], dtype=torch.float64)
    magnitudes = torch.tensor([magnitude for _, magnitude in pairs]) if by_magnitude else None
    before = values.clone()
    parted = distinct(values, magnitudes)
    assert torch.equal(values, before)
    order = ordered_positions(values.tolist(), magnitudes.tolist() if by_magnitude else None)
    assert parted.argsort().tolist() == order
    assert len(set(parted.tolist())) == len(pairs)
    assert float(parted.min()) >= 0
    assert float(parted.max()) <= 1
    assert torch.allclose(parted, values, rtol=0, atol=len(pairs) * 2**-52)


@given(st.lists(UNIT, max_size=40), st.floats(0, 1))
@example([1.0 - 2**-53, 1.0], 0.5)
@example([-0.0], 2**-151)
def test_single_precision_keeps_every_order(values, middle):
    near = [min(1.0, middle + k * 2**-45) for k in range(9)]
    double = torch.tensor([*values, *near], dtype=torch.float64)
    single = in_single(double)
    assert single.dtype == torch.float32
    assert torch.equal(single.unique(return_inverse=True)[1], double.unique(return_inverse=True)[1])
    assert float(single.min()) >= 0
    assert float(single.max()) <= 1
    assert torch.allclose(single.double(), double, rtol=0, atol=double.numel() * 2**-23)


class _Saturated(nn.Module):
    """Two heads behind ReLU6: half of its units are saturated, and most weights of the others are zero."""

    def __init__(self):
        super().__init__()
        self.first, self.act = nn.Linear(64, 128), nn.ReLU6()
        self.heads = nn.ModuleDict({"a": nn.Linear(128, 4), "b": nn.Linear(128, 4)})
        with torch.no_grad():
            self.first.weight[64:] *= torch.rand(64, 64) > 0.7
            self.first.weight[:64] = self.first.weight[:64].abs() * 4  # no gradient, but an output

    def forward(self, x):
        x = self.act(self.first(x))
        return {task: head(x) for task, head in self.heads.items()}


def _errors(model, batch):
    x, targets = batch
    return {task: (output - targets[task]).square().mean() for task, output in model(x).items()}


def test_saturated_units_outlive_weights_that_are_zero():
    model = _Saturated()
    data = [(torch.rand(64, 64) + 0.5, {task: torch.randn(64, 4) for task in "ab"}) for _ in range(4)]
    scores = score_tasks(model, _errors, data, criterion="taylor")
    masks = scores.masks(0.3)
    untied = TaskScores(model, {task: _untied(scores[task]) for task in scores}, parameters=scores.parameters)
    assert all(torch.equal(mask, masks[key]) for key, mask in untied.masks(0.3).items())
    before = model(data[0][0])["a"]
    for (module, name), mask in masks.items():
        prune.custom_from_mask(module, name, mask)
    error = (model(data[0][0])["a"] - before).norm() / (before - before.mean(0)).norm()
    assert error < 2  # 40 where the place in the tensor decides
    assert int((~masks[model.first, "weight"]).all(1).sum()) == 0


def _untied(table):
    """The same scores, with less than the smallest of them added where they are zero, in the order of magnitudes."""
    smallest = min(float(score[score > 0].min()) for score in table.values())
    largest = max(float(key[0].weight.detach().abs().max()) for key in table)
    return {
        key: torch.where(score > 0, score.double(), key[0].weight.detach().abs().double() * smallest / largest / 2)
        for key, score in table.items()
    }


FEW = MappingProxyType({"first": [0.5, -0.5], "second": [-0.25, 0.25]})


def test_the_smaller_magnitude_goes_first_on_every_device(device):
    """The rule on one example small enough to see: all scores are equal."""
    model = nn.ModuleDict({name: nn.Linear(2, 1, bias=False) for name in FEW}).to(device)
    for name, row in FEW.items():
        model[name].weight.data.copy_(torch.tensor([row]))
    scores = TaskScores(model, {"a": {(layer, "weight"): torch.zeros(1, 2, device=device) for layer in model.values()}})
    kept = [[keep for mask in scores.masks(count).values() for keep in mask.flatten().tolist()] for count in range(5)]
    assert [row.count(True) for row in kept] == [4, 3, 2, 1, 0]
    assert kept[1:4] == [[True, True, False, True], [True, True, False, False], [False, True, False, False]]


def test_channels_of_equal_scores_go_by_the_sum_of_their_magnitudes():
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data.copy_(torch.tensor([[1.0, -1.0], [0.5, 0.25]]))
    DiSparseStructured.apply(layer, "weight", 1, importance_scores=torch.ones(2, 2))
    assert layer.weight_mask.tolist() == [[1, 1], [0, 0]]


def test_channels_that_are_gone_are_not_chosen_again():
    scores = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    mask = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    assert DiSparseStructured(1).compute_mask(scores, mask).tolist() == [[0, 0], [0, 0], [1, 0]]


def test_a_bound_class_remembers_its_floor_and_its_arbiter():
    model = nn.ModuleList([nn.Linear(4, 1, bias=False) for _ in range(2)])
    first, second = ((layer, "weight") for layer in model)
    a = {first: torch.tensor([[1.0, 4.0, 2.0, 3.0]]), second: torch.tensor([[9.0, 8.0, 7.0, 6.0]])}
    scores = TaskScores(model, {"a": a, "b": {first: torch.tensor([[4.0, 3.0, 2.0, 1.0]]), second: a[second]}})
    twin = copy.deepcopy(model)
    places = {first: (twin[0], "weight"), second: (twin[1], "weight")}
    same = {task: {places[key]: row for key, row in scores[task].items()} for task in scores}
    prune.global_unstructured(scores.parameters, DiSparseStatic.bind(scores, min_keep=1), amount=4)
    assert [int(layer.weight_mask.sum()) for layer in model] == [1, 3]
    DiSparseStatic.bind(TaskScores(twin, same), "any").apply(twin[0], "weight", 1)
    assert twin[0].weight_mask[0, 2] == 1  # the first to go by "unanimous"


@pytest.mark.parametrize("levels", [5, 2000], ids=["all at the top tie", "some tie"])
def test_the_few_highest_of_many_are_those_of_a_full_sort(levels):
    """Large enough that only what is near the top is looked at, where there is enough of it."""
    generator = torch.Generator().manual_seed(0)
    values = (torch.rand(2**14 + 5, generator=generator) * levels).floor() / levels
    weights = torch.randn(values.shape, generator=generator)
    for count in (1, 50, 700):
        order = np.lexsort((np.arange(values.numel()), weights.abs().numpy(), values.numpy()))
        assert ranking.highest(values, count, weights).tolist() == sorted(order[values.numel() - count :].tolist())
