"""Budgets of parts and floors of tensors: exact, as defined, and without effect unless asked for."""

from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from disparse_plugin import DiSparseStatic, TaskScores, at_least, disparse_pretrained, disparse_static, score_tasks
from disparse_plugin.agreement import band, cut
from disparse_plugin.agreement.percentiles import agreement
from disparse_plugin.masks.sparsity import sparsity_report
from layouts import build, kept_entries, layouts, oracle, prune_places
from networks import PartlyShared, Snapshot, TwoHeads, digit_batches, digit_losses, square_losses, vectors
from oracles.agreement import ARBITERS

BY_NAME = {"at_least(2)": at_least(2), "at_least(3)": at_least(3)}
RULES = st.sampled_from(sorted(ARBITERS))
AMOUNTS = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.8, 0.9, 0.98])
MIN_KEEPS = st.sampled_from([0, 1, 2, 5, 0.05, 0.25, 0.5, 0.9])


def floors(min_keep, sizes, alive=None):
    """The documented rule, in exact fractions: half to even, at least 1 for a fraction, at most what is alive."""
    wanted = [min_keep if isinstance(min_keep, int) else max(1, round(Fraction(min_keep) * size)) for size in sizes]
    return [min(count, there) for count, there in zip(wanted, alive or sizes, strict=True)]


def rule(arbiter):
    return BY_NAME.get(arbiter, arbiter)


def part_sizes(layout):
    small = oracle(*layout)
    sizes = {}
    for parameter, size in enumerate(layout[1]):
        sizes[small.part(parameter)] = sizes.get(small.part(parameter), 0) + size
    return sizes


@given(layouts(), AMOUNTS, RULES, MIN_KEEPS)
def test_the_highest_of_every_tensor_stay_and_the_count_is_exact(layout, amount, arbiter, min_keep):
    kept, (_, sizes) = floors(min_keep, layout[1]), layout
    count = round(amount * sum(sizes))
    assume(count <= sum(sizes) - sum(kept))
    _, scores = build(*layout)
    found = kept_entries(scores.masks(amount, rule(arbiter), min_keep=min_keep), scores.parameters)
    assert found == oracle(*layout).kept_in_budget({"everything": count}, kept, arbiter)
    assert all(sum(entry[0] == i for entry in found) >= floor for i, floor in enumerate(kept))


@given(layouts(), st.data(), RULES, MIN_KEEPS)
def test_each_part_is_cut_on_its_own(layout, data, arbiter, min_keep):
    sizes = part_sizes(layout)
    amounts = {part: data.draw(AMOUNTS) for part in sizes}
    counts = {part: round(amount * sizes[part]) for part, amount in amounts.items()}
    kept, small = floors(min_keep, layout[1]), oracle(*layout)
    room = dict.fromkeys(sizes, 0)
    for parameter, (size, floor) in enumerate(zip(layout[1], kept, strict=True)):
        room[small.part(parameter)] += size - floor
    assume(all(counts[part] <= room[part] for part in sizes))
    _, scores = build(*layout)
    found = kept_entries(scores.masks(amounts, rule(arbiter), min_keep=min_keep), scores.parameters)
    assert found == small.kept_in_budget(counts, kept, arbiter)
    lost = {part: n - sum(small.part(entry[0]) == part for entry in found) for part, n in sizes.items()}
    assert lost == counts


@given(layouts(), AMOUNTS, MIN_KEEPS, st.data())
def test_what_is_pruned_already_is_neither_protected_nor_counted(layout, amount, min_keep, data):
    tables, sizes = layout
    model, scores = build(tables, sizes)
    dead = {i: set(data.draw(st.lists(st.integers(0, n - 1), max_size=n))) for i, n in enumerate(sizes)}
    alive = {i: [place for place in range(n) if place not in dead[i]] for i, n in enumerate(sizes)}
    assume(all(any(alive[i] for i in table) for table in tables.values()))
    prune_places(model, dead)
    left = [len(alive[i]) for i in range(len(sizes))]
    kept = floors(min_keep, sizes, left)
    count = round(amount * sum(left))
    assume(count <= sum(left) - sum(kept))
    remaining = {task: {i: [row[j] for j in alive[i]] for i, row in table.items()} for task, table in tables.items()}
    expected = oracle(remaining, sizes, alive).kept_in_budget({"everything": count}, kept, "unanimous")
    found = kept_entries(scores.masks(amount, min_keep=min_keep), scores.parameters)
    assert found == {(i, alive[i][j]) for i, j in expected}


@given(layouts(), AMOUNTS, RULES, MIN_KEEPS)
def test_torch_makes_the_same_mask_from_the_importance(layout, amount, arbiter, min_keep):
    kept = floors(min_keep, layout[1])
    assume(round(amount * sum(layout[1])) <= sum(layout[1]) - sum(kept))
    model, scores = build(*layout)
    masks = scores.masks(amount, rule(arbiter), min_keep=min_keep)
    importance = scores.importance(rule(arbiter), min_keep=min_keep)
    assert all(float(value.min()) >= 0 and float(value.max()) <= 1 for value in importance.values())
    prune.global_unstructured(scores.parameters, DiSparseStatic, importance_scores=importance, amount=amount)
    assert all(torch.equal(layer.weight_mask.bool(), masks[layer, "weight"]) for layer in model)


def test_a_floor_that_is_met_anyway_changes_nothing_and_costs_no_ranking(monkeypatch):
    _, scores = build({"a": {0: torch.rand(300).tolist(), 1: torch.rand(200).tolist()}}, [300, 200])
    plain = scores.masks(0.5)
    monkeypatch.setattr(cut, "agreement", None)
    floored = scores.masks(0.5, min_keep=20)
    assert all(torch.equal(plain[key], floored[key]) for key in plain)


@st.composite
def large_mixed_layouts(draw):
    """Private and shared tensors in turn, large enough that a sample is not all of them; ties or none."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    levels = draw(st.sampled_from([7, 10**6]))
    reach, sizes = ["a", "ab", "b", "abc", "c"], [150, 300, 200, 250, 100]
    tables = {
        task: {
            i: (torch.randint(levels, (sizes[i],), generator=generator) / levels).tolist()
            for i, tasks in enumerate(reach)
            if task in tasks
        }
        for task in "abc"
    }
    return tables, sizes


@settings(max_examples=100)
@given(
    large_mixed_layouts(),
    st.tuples(*[st.floats(0.1, 0.9)] * 4),
    st.sampled_from(["unanimous", "any", "at_least(2)"]),
    st.sampled_from([0.05, 0.3]),
)
def test_parts_of_a_large_model_are_cut_by_a_sample_as_by_a_full_sort(layout, amounts, arbiter, half_width):
    """The narrow band misleads as often as not; either way the masks are those of full ranks."""
    _, scores = build(*layout)
    budget = {"amount": dict(zip(["shared", "a", "b", "c"], amounts, strict=True)), "min_keep": 5}
    full = scores.masks(arbiter=rule(arbiter), **budget)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(band, "SAMPLE", 100)
        patch.setattr(band, "HALF_WIDTH", half_width)
        quick = scores.masks(arbiter=rule(arbiter), **budget)
    assert all(torch.equal(full[key], quick[key]) for key in full)


def test_parts_of_a_large_model_are_not_ranked_in_full(monkeypatch):
    """A sample tells where the cut of the shared part is; a task's own part is cut by its scores as they are."""
    sizes = [50_000, 40_000, 60_000, 30_000]
    reached = {"a": (0, 1, 3), "b": (1, 2, 3)}
    tables = {task: {i: torch.rand(sizes[i]).tolist() for i in indices} for task, indices in reached.items()}
    _, scores = build(tables, sizes)
    amounts = {"shared": 0.9, "a": 0.3, "b": 0.6}
    full = scores.masks(amounts, min_keep=100)
    monkeypatch.setattr(band, "SAMPLE", 10_000)
    monkeypatch.setattr(band, "HALF_WIDTH", 0.02)
    monkeypatch.setattr(cut, "agreement", None)
    monkeypatch.setattr(band, "agreement", _small_only)
    quick = scores.masks(amounts, min_keep=100)
    assert all(torch.equal(full[key], quick[key]) for key in full)
    counts = {
        part: int((~full[key]).sum())
        for part, key in zip("ab", (scores.parameters[0], scores.parameters[2]), strict=True)
    }
    assert counts == {"a": 15_000, "b": 36_000}


def _small_only(candidates, *rest):
    assert sum(candidates.sizes) < 25_000, "everything was ranked"
    return agreement(candidates, *rest)


@given(layouts(max_tasks=4), AMOUNTS, MIN_KEEPS, st.data())
def test_the_order_and_scale_of_tasks_change_nothing(layout, amount, min_keep, data):
    tables, sizes = layout
    kept = floors(min_keep, sizes)
    assume(round(amount * sum(sizes)) <= sum(sizes) - sum(kept))
    order = data.draw(st.permutations(list(tables)))
    scale = {task: data.draw(st.sampled_from([2.0**-14, 1.0, 2.0**14])) for task in tables}
    moved = {task: {i: [scale[task] * x for x in row] for i, row in tables[task].items()} for task in order}
    _, scores = build(tables, sizes)
    _, other = build(moved, sizes)
    parts = dict.fromkeys(part_sizes(layout), 0.4)
    for budget in ({"amount": amount, "min_keep": min_keep}, {"amount": parts}):
        assert kept_entries(scores.masks(**budget), scores.parameters) == kept_entries(
            other.masks(**budget), other.parameters
        )


def test_a_fraction_keeps_at_least_one_and_does_not_shrink_with_what_is_alive():
    model, scores = build({"a": {0: [1.0, 2.0, 3.0, 4.0], 1: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}}, [4, 6])
    assert kept_entries(scores.masks(6, min_keep=0.05), scores.parameters) == {(0, 1), (0, 2), (0, 3), (1, 5)}
    prune_places(model, {0: {3}, 1: {3, 4, 5}})  # half of 4 are 2, also where 3 are alive; half of 6 are 3
    assert kept_entries(scores.masks(1, min_keep=0.5), scores.parameters) == {(0, 1), (0, 2), (1, 0), (1, 1), (1, 2)}


def test_an_arbiter_of_ones_own_may_have_any_order_and_any_ties():
    """Also that of a task's own weights, and scores of 0 and 1 only."""
    _, scores = build({"a": {0: [1.0, 2.0, 3.0], 1: [4.0, 5.0, 6.0]}, "b": {0: [1.0, 2.0, 3.0]}}, [3, 3])

    def backwards(percentiles):
        return 1 - percentiles.nan_to_num(0.0).amax(0)

    kept = kept_entries(scores.masks({"shared": 1, "a": 1}, backwards), scores.parameters)
    assert kept == {(0, 0), (0, 1), (1, 0), (1, 1)}

    def all_or_none(percentiles):
        return (percentiles[0] > 0.5).double()  # 0 for the whole first tensor, 1 for the second

    for values in (scores.masks(4, all_or_none, min_keep=1), scores.importance(all_or_none, min_keep=1)):
        lowest = torch.cat([values[key].flatten().double() for key in scores.parameters]).argsort(stable=True)[:4]
        assert sorted(lowest.tolist()) == [0, 1, 3, 5]  # of the second tensor the smallest weights, 0.5 and 0


def test_a_layer_that_would_be_emptied_keeps_its_best(device):
    """The definition on one example small enough to see."""
    _, scores = build({"a": {0: [0.1, 0.2, 0.2], 1: [5.0, 6.0, 7.0, 8.0, 9.0]}}, [3, 5], device)
    assert kept_entries(scores.masks(4), scores.parameters) == {(1, 1), (1, 2), (1, 3), (1, 4)}
    # Of the two equal ones the earlier goes.
    assert kept_entries(scores.masks(4, min_keep=1), scores.parameters) == {(0, 2), (1, 2), (1, 3), (1, 4)}
    assert kept_entries(scores.masks(4, min_keep=0.5), scores.parameters) == {(0, 1), (0, 2), (1, 3), (1, 4)}


@pytest.mark.parametrize("one_shot", [disparse_static, disparse_pretrained])
def test_in_one_call(one_shot):
    model = PartlyShared()
    amounts = {"shared": 0.5, "a": 3, "b": 0.0, "c": 0.25, "d": 0.8}
    with pytest.warns(UserWarning, match="unused"):
        scores = one_shot(model, square_losses, vectors(), amounts, min_keep=2)
    masks = {name: module.weight_mask for (module, _), name in zip(scores.parameters, scores.names, strict=True)}
    lost = {name: int((mask == 0).sum()) for name, mask in masks.items()}
    assert lost["abc.weight"] + lost["ab.weight"] == round(0.5 * (30 + 24))
    assert (lost["heads.a.weight"], lost["heads.b.weight"]) == (3, 0)
    assert (lost["heads.c.weight"], lost["d.weight"]) == (round(0.25 * 12), round(0.8 * 15))
    assert all(int(mask.sum()) >= 2 for mask in masks.values())
    assert sparsity_report(model, scores)


def test_a_bound_class_keeps_as_much():
    amounts = {"shared": 0.96, "a": 0.5, "b": 0.1}
    for budget in (0.96, amounts):
        model = TwoHeads().eval()
        scores = score_tasks(model, digit_losses, digit_batches())
        masks = scores.masks(budget, min_keep=5)
        prune.global_unstructured(scores.parameters, DiSparseStatic.bind(scores, min_keep=5), amount=budget)
        assert all(torch.equal(module.weight_mask.bool(), masks[module, name]) for module, name in scores.parameters)


def test_a_bound_class_on_one_tensor():
    model = TwoHeads().eval()
    scores = score_tasks(model, digit_losses, digit_batches())
    conv, bound = model.trunk[0], DiSparseStatic.bind(scores, min_keep=5)
    before = Snapshot(model)
    with pytest.raises(ValueError, match="min_keep: must leave enough to prune, found 50 of 54 to prune and 5 protect"):
        bound.apply(conv, "weight", 50)
    before.check()
    bound.apply(conv, "weight", 49)
    highest = scores.importance()[conv, "weight"].flatten().argsort(stable=True)[-5:]
    assert conv.weight_mask.flatten().nonzero().flatten().tolist() == sorted(highest.tolist())


@pytest.mark.parametrize("arbiter", ["unanimous", "any", "mean", "majority", "sum"])
@pytest.mark.parametrize("size", [20, 200])
def test_a_task_of_which_nothing_is_alive_has_no_say(arbiter, size):
    big, small = nn.Linear(size, size), nn.Linear(10, 10)
    torch.manual_seed(0)
    own = {(big, "weight"): torch.rand(size, size)}
    scores = TaskScores(nn.ModuleList([big, small]), {"a": own, "b": {(small, "weight"): torch.rand(10, 10)}})
    prune.random_unstructured(small, "weight", 1.0)
    masks = scores.masks(0.5, arbiter)
    lowest = own[big, "weight"].flatten().argsort()[: size * size // 2]
    assert torch.equal((~masks[big, "weight"]).flatten().nonzero().flatten(), lowest.sort().values)
    assert masks[small, "weight"].numel() == 100


@pytest.mark.parametrize("arbiter", [*sorted(ARBITERS), "sum", lambda percentiles: percentiles.nan_to_num(0.0).amax(0)])
@pytest.mark.parametrize("min_keep", [0, 1])
def test_a_part_of_which_nothing_is_alive_takes_nothing_from_the_others(arbiter, min_keep):
    trunk, head = nn.Linear(5, 4, bias=False), nn.Linear(4, 2, bias=False)
    generator = torch.Generator().manual_seed(0)
    shared = {task: {(trunk, "weight"): torch.rand(4, 5, generator=generator)} for task in "ab"}
    both = {**shared, "a": {**shared["a"], (head, "weight"): torch.rand(2, 4, generator=generator)}}
    net = nn.Sequential(trunk, head)
    prune.custom_from_mask(head, "weight", torch.zeros(2, 4))
    found = TaskScores(net, both).masks({"shared": 0.35, "a": 0.5}, rule(arbiter), min_keep=min_keep)
    expected = TaskScores(net, shared).masks(0.35, rule(arbiter), min_keep=min_keep)
    assert torch.equal(found[trunk, "weight"], expected[trunk, "weight"])
    assert int(found[trunk, "weight"].sum()) == 13
    assert not found[head, "weight"].any()
