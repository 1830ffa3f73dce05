"""What task_overlap counts, against sets, simulation and tables worked by hand."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from disparse_plugin import TaskScores
from disparse_plugin.analysis import own_masks, task_overlap
from disparse_plugin.analysis.measures import count_stratum
from layouts import build, kept_entries, layouts, oracle, prune_places
from oracles.overlap import average_ranks, iou, kappa, kept_by, kept_sets, spearman

AMOUNTS = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])


def two_masks(size, first, second):
    """An overlap of one layer in which the tasks keep exactly these places."""
    scores = {
        task: {0: [float(place in kept) for place in range(size)]} for task, kept in (("a", first), ("b", second))
    }
    assert len(first) == len(second)
    return task_overlap(build(scores, [size])[1], size - len(first))


def random_scores(size, tasks=("a", "b"), seed=0):
    layer = nn.Linear(size, 1, bias=False)
    generator = torch.Generator().manual_seed(seed)
    tables = {task: {(layer, "weight"): torch.rand(1, size, generator=generator)} for task in tasks}
    return TaskScores(layer, tables)


@given(layouts(), AMOUNTS)
def test_own_masks_are_the_tasks_top_sets(layout, amount):
    tables, sizes = layout
    _, scores = build(tables, sizes)
    slow = oracle(tables, sizes)
    for task, masks in own_masks(scores, amount).items():
        ordered = slow.ordered(task)
        expected = set(ordered[round(amount * len(ordered)) :])
        assert {entry for entry in kept_entries_of(masks, scores) if entry[0] in tables[task]} == expected


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64], ids=str)
def default_type(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


def test_a_rank_correlation_does_not_depend_on_the_default_type(default_type):
    rng = np.random.default_rng(0)
    a = rng.permutation(70_000)  # more ranks than either half precision can tell apart, and sum
    b = a + rng.integers(20_000, size=a.size)
    layer = nn.Linear(a.size, 1, bias=False)
    tables = {
        task: {(layer, "weight"): torch.tensor(values[None], dtype=torch.float32)}
        for task, values in (("a", a), ("b", b))
    }
    positions = [np.searchsorted(np.sort(v), v) + np.searchsorted(np.sort(v), v, side="right") for v in (a, b)]
    expected = np.corrcoef(*positions)[0, 1]
    assert task_overlap(TaskScores(layer, tables), 0.5).trunk.rank_correlation == pytest.approx(expected, abs=1e-9)


def kept_entries_of(masks, scores):
    return kept_entries({key: masks.get(key, torch.zeros(1)) for key in scores.parameters}, scores.parameters)


@given(layouts(), AMOUNTS)
def test_with_cut_union_the_masks_are_the_parts_of_the_unanimous_mask(layout, amount):
    tables, sizes = layout
    _, scores = build(tables, sizes)
    masks, slow = own_masks(scores, amount, cut="union"), oracle(tables, sizes)
    union = set().union(*(kept_entries_of(table, scores) for table in masks.values()))
    assert union == kept_entries(scores.masks(amount), scores.parameters)
    for task, table in masks.items():
        kept, ordered = kept_entries_of(table, scores), slow.ordered(task)
        assert kept == set(ordered[len(ordered) - len(kept) :]), "a task's own mask must be a top set"


@given(layouts(), AMOUNTS, st.sampled_from(["per_task", "union"]))
def test_every_count_agrees_with_sets(layout, amount, cut):
    tables, sizes = layout
    _, scores = build(tables, sizes)
    shared = [index for index in range(len(sizes)) if sum(index in table for table in tables.values()) > 1]
    if not shared:
        with pytest.raises(ValueError, match="nothing shared"):
            task_overlap(scores, amount, cut=cut)
        return
    overlap = task_overlap(scores, amount, cut=cut)
    kept = kept_sets(own_masks(scores, amount, cut=cut), scores.parameters)
    assert overlap.names == tuple(f"{index}.weight" for index in shared)
    for index, layer in zip(shared, overlap, strict=True):
        sets = {task: places[index] for task, places in kept.items() if index in places}
        check_layer(layer, sets, sizes[index])
        for (a, b), pair in layer.pairs.items():
            check_layer(pair, {a: sets[a], b: sets[b]}, sizes[index])
            same(pair.rank_correlation, spearman(tables[a][index], tables[b][index]))


def check_layer(layer, sets, size):
    places = list(sets.values())
    assert (layer.tasks, layer.size) == (tuple(sets), size)
    assert layer.density == {task: len(kept) / size for task, kept in sets.items()}
    assert layer.kept_by == kept_by(places, size)
    same(layer.iou, iou(places))
    same(layer.kappa, kappa(places, size))


def same(found, expected):
    assert math.isnan(found) if expected is None else found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("kept", [(30, 60), (5, 5), (100, 3), (40, 50, 20)])
def test_iou_by_chance_agrees_with_simulation(kept):
    size, generator = 120, np.random.default_rng(0)
    both = either = 0
    for _ in range(3000):
        times = sum(generator.permutation(size) < count for count in kept)
        both += int((times == len(kept)).sum())
        either += int((times > 0).sum())
    masks = {str(task): torch.arange(size) < count for task, count in enumerate(kept)}
    stratum = count_stratum(masks)
    assert stratum.all_by_chance / stratum.any_by_chance == pytest.approx(both / either, rel=0.05)


def test_kappa_of_a_table_worked_by_hand():
    # 20 weights, both keep 6, one of them alone 4 and 4, neither 6. Alike on 12 of 20 = 0.6; each keeps half, so by
    # chance on half of them: (0.6 - 0.5) / (1 - 0.5) = 0.2.
    layer = two_masks(20, set(range(10)), set(range(4, 14)))["0.weight"]
    assert layer.kept_by == (6, 8, 6)
    assert layer.kappa == pytest.approx(0.2)
    assert layer.iou == pytest.approx(6 / 14)
    assert layer.chance_iou == pytest.approx(0.25 / 0.75)


def test_masks_that_avoid_each_other_have_negative_kappa():
    assert two_masks(20, set(range(10)), set(range(10, 20))).trunk.kappa == pytest.approx(-1)


@given(st.floats(0.01, 0.99), st.integers(0, 9))
def test_independent_scores_agree_by_chance_only_at_any_density(amount, seed):
    size = 4000
    trunk = task_overlap(random_scores(size, "abc", seed), amount).trunk
    # The scatter of kappa is 1 / sqrt(size) for one pair; six of them, and room for very few kept weights.
    kept = trunk.size * min(1 - amount, amount)
    assert abs(trunk.kappa) < 6 / math.sqrt(size) + 4 / kept
    assert abs(trunk.rank_correlation) < 6 / math.sqrt(size)


@given(layouts(max_tasks=1), AMOUNTS)
def test_identical_tasks_agree_completely(layout, amount):
    tables, sizes = layout
    _, scores = build({"a": tables["task0"], "b": tables["task0"], "c": tables["task0"]}, sizes)
    trunk = task_overlap(scores, amount).trunk
    same(trunk.iou, None if trunk.kept_by[0] == trunk.size else 1)
    assert math.isnan(trunk.kappa) or trunk.kappa == pytest.approx(1)


def test_layers_of_different_density_do_not_count_as_agreement():
    """Two layers, one nearly full and one nearly empty, chosen independently inside: nothing beyond chance."""
    generator = torch.Generator().manual_seed(1)
    model = nn.ModuleList([nn.Linear(3000, 1, bias=False) for _ in range(2)])
    tables = {
        task: {
            (model[0], "weight"): 0.5 + torch.rand(1, 3000, generator=generator),
            (model[1], "weight"): torch.rand(1, 3000, generator=generator),
        }
        for task in "ab"
    }
    trunk = task_overlap(TaskScores(model, tables), 0.5).trunk
    masks = own_masks(TaskScores(model, tables), 0.5)
    thrown_together = count_stratum(
        {task: torch.cat([mask.flatten() for mask in table.values()]) for task, table in masks.items()}
    )
    observed, chance = thrown_together.alike
    assert (observed - chance) / (6000 - chance) > 0.2
    assert abs(trunk.kappa) < 0.08
    assert trunk.iou == pytest.approx(trunk.chance_iou, abs=0.03)


def test_tied_scores_are_no_correlation():
    _, scores = build({"a": {0: [0, 0, 0, 1]}, "b": {0: [0, 0, 0, 0]}}, [4])
    assert math.isnan(task_overlap(scores, 0.5).trunk.rank_correlation)
    assert average_ranks([0, 0, 1]) == [0.5, 0.5, 2]


@pytest.mark.parametrize("cut", ["per_task", "union"])
def test_dead_entries_do_not_count(cut):
    tables = {"a": {0: [5, 4, 3, 2, 1, 0]}, "b": {0: [0, 1, 2, 3, 4, 5]}}
    model, scores = build(tables, [6])
    prune_places(model, {0: {0, 5}})
    alive = task_overlap(scores, 0.5, cut=cut, as_scored=False).trunk
    fresh = task_overlap(build({"a": {0: [4, 3, 2, 1]}, "b": {0: [1, 2, 3, 4]}}, [4])[1], 0.5, cut=cut).trunk
    assert alive.to_dict() == fresh.to_dict()
    for table in own_masks(scores, 0.5, cut=cut, as_scored=False).values():
        assert not table[model[0], "weight"][0, [0, 5]].any()


def test_a_layer_without_alive_entries_is_left_out():
    model, scores = build({"a": {0: [1, 2], 1: [3, 4]}, "b": {0: [1, 2], 1: [3, 4]}}, [2, 2])
    prune_places(model, {0: {0, 1}})
    assert task_overlap(scores, 0.5, as_scored=False).names == ("1.weight",)


@pytest.mark.parametrize("cut", ["per_task", "union"])
def test_after_pruning_one_is_told_and_can_have_all_entries(cut):
    model, scores = build({"a": {0: [5, 4, 3, 2, 1, 0]}, "b": {0: [0, 1, 2, 3, 4, 5]}}, [6])
    before, masks = task_overlap(scores, 0.5, cut=cut), own_masks(scores, 0.5, cut=cut)
    prune_places(model, {0: {0, 5}})
    assert task_overlap(scores, 0.5, cut=cut, as_scored=True) == before
    again = own_masks(scores, 0.5, cut=cut, as_scored=True)
    assert all(torch.equal(again[task][key], mask) for task, table in masks.items() for key, mask in table.items())
    for function in (task_overlap, own_masks):
        with pytest.warns(UserWarning, match="scores: 1 of 1 parameters carry masks.*as_scored=True") as caught:
            function(scores, 0.5, cut=cut)
        assert caught[0].filename == __file__


def test_private_layers_are_kept_apart():
    _, scores = build({"a": {0: [1, 2, 3, 4], 1: [9, 9]}, "b": {0: [4, 3, 2, 1]}}, [4, 2])
    overlap = task_overlap(scores, 0.5)
    assert overlap.names == ("0.weight",)
    assert [(layer.name, layer.tasks, layer.kept_by) for layer in overlap.private] == [("1.weight", ("a",), (0, 2))]


def test_the_trunk_adds_up_the_layers_and_pairs_only_what_both_reach():
    tables = {"a": {0: [1, 2, 3, 4], 1: [5, 6, 1]}, "b": {0: [4, 3, 2, 1], 1: [5, 1, 6]}, "c": {0: [1, 3, 4, 2]}}
    overlap = task_overlap(build(tables, [4, 3])[1], 0.5)
    assert overlap.trunk.size == 7
    assert overlap.trunk.pair("a", "c").size == 4
    assert overlap.trunk.pair("c", "a").kept_by == overlap.trunk.pair("a", "c").kept_by
    assert sum(overlap.trunk.kept_by) == 7
    with pytest.raises(KeyError, match="two tasks that reach"):
        overlap["1.weight"].pair("a", "c")


def test_tables_and_dicts_hold_the_same_numbers():
    tables = {"a": {0: [1, 2, 3, 4]}, "b": {0: [4, 1, 3, 2]}, "c": {0: [1, 2, 4, 3]}}
    overlap = task_overlap(build(tables, [4])[1], 0.5)
    found = json.loads(json.dumps(overlap.to_dict()))
    assert found["trunk"]["kappa"] == overlap.trunk.kappa
    rows = overlap.rows()
    assert [row["tasks"] for row in rows] == ["a & b & c", "a & b", "a & c", "b & c"] * 2
    assert rows[1]["iou"] == overlap["0.weight"].pair("a", "b").iou
    text = str(overlap)
    assert f"{overlap.trunk.kappa:.3f}" in text
    assert len({len(line) for line in text.splitlines()[1:]}) == 1, "columns must line up"


def test_undefined_measures_are_none_in_dicts():
    _, scores = build({"a": {0: [1, 2]}, "b": {0: [2, 1]}}, [2])
    found = task_overlap(scores, 1.0, rank_correlation=False).to_dict()
    assert (found["trunk"]["iou"], found["trunk"]["kappa"], found["trunk"]["rank_correlation"]) == (None, None, None)
    json.dumps(found, allow_nan=False)


def test_select_takes_some_layers():
    tables = {task: {index: [1.0, 2.0] for index in range(3)} for task in "ab"}
    overlap = task_overlap(build(tables, [2, 2, 2])[1], 0.5)
    assert overlap.select(lambda name: name != "1.weight").names == ("0.weight", "2.weight")
    with pytest.raises(ValueError, match="at least one layer"):
        overlap.select(lambda name: False)
    with pytest.raises(KeyError, match=r"0\.weight, 1\.weight, 2\.weight"):
        overlap["head"]


@pytest.mark.parametrize(
    ("amount", "options", "error"),
    [(1.5, {}, ValueError), ("half", {}, TypeError), (99, {}, ValueError), (0.5, {"cut": "both"}, ValueError)],
)
def test_bad_arguments(amount, options, error):
    with pytest.raises(error, match=r"amount|cut"):
        task_overlap(random_scores(10), amount, **options)


def test_on_every_device(device):
    def found(where):
        generator = torch.Generator().manual_seed(0)
        tables = {task: {i: torch.rand(20, generator=generator).tolist() for i in range(2)} for task in "ab"}
        return task_overlap(build(tables, [20, 20], where)[1], 0.6, cut="union").trunk

    here, reference = found(device), found("cpu")
    assert here.kept_by == reference.kept_by
    assert here.rank_correlation == pytest.approx(reference.rank_correlation)


def test_pairwise_does_not_fall_with_the_number_of_tasks():
    trunk = task_overlap(random_scores(5000, "abcde"), 0.8).trunk
    pairs = [trunk.pair(*pair) for pair in itertools.combinations("abcde", 2)]
    assert trunk.pairwise().iou == pytest.approx(np.mean([pair.iou for pair in pairs]), abs=0.01)
    assert trunk.pairwise().kappa == pytest.approx(trunk.kappa)
    assert trunk.iou < 0.01 < trunk.pairwise().iou


def test_one_task_alone_has_no_agreement_to_measure():
    trunk, head = nn.Linear(4, 4), nn.Linear(4, 1)
    tables = {"a": {(trunk, "weight"): torch.rand(4, 4), (head, "weight"): torch.rand(1, 4)}}
    tables["b"] = {(trunk, "weight"): torch.rand(4, 4)}
    overlap = task_overlap(TaskScores(nn.ModuleList([trunk, head]), tables), 0.5)
    private = overlap.private[0]
    assert math.isnan(private.kappa)
    assert private.to_dict()["kappa"] is None
    assert [row["kappa"] for row in private.rows()] == [None]
