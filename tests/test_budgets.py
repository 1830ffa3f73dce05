"""Budgets of parts and floors of tensors: exact, as defined, and without effect unless asked for."""

from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from disparse_plugin import (
    DiSparseStatic,
    TaskScores,
    at_least,
    budgets,
    disparse_pretrained,
    disparse_static,
    score_tasks,
)
from disparse_plugin.sparsity import sparsity_report

from layouts import build, kept_entries, layouts, oracle, prune_places
from networks import PartlyShared, Snapshot, TwoHeads, digit_batches, digit_losses, square_losses, vectors
from oracle import ARBITERS

BY_NAME = {"at_least(2)": at_least(2), "at_least(3)": at_least(3)}
RULES = st.sampled_from(sorted(ARBITERS))
AMOUNTS = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.8, 0.9, 0.98])
MIN_KEEPS = st.one_of(st.integers(0, 6), st.sampled_from([0.05, 0.25, 0.5, 0.9]))


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
    expected = oracle(remaining, left).kept_in_budget({"everything": count}, kept, "unanimous")
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
    monkeypatch.setattr(budgets, "agreement", None)
    floored = scores.masks(0.5, min_keep=20)
    assert all(torch.equal(plain[key], floored[key]) for key in plain)


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


WRONG = {
    "min_keep: must be an int .* found bool: True": {"min_keep": True},
    "min_keep: must be an int .* found str: '3'": {"min_keep": "3"},
    "min_keep: an int must be a count of at least 0, found -1": {"min_keep": -1},
    "min_keep: a float must be a fraction above 0 and below 1, found 1.0": {"min_keep": 1.0},
    "min_keep: a float must be a fraction above 0 and below 1, found 0.0": {"min_keep": 0.0},
    "min_keep: a float must be a fraction above 0 and below 1, found nan": {"min_keep": float("nan")},
    "min_keep: must leave enough to prune, found 180 of 200 to prune and 40 protected": {"min_keep": 0.2},
    "amount: at least one part is needed, found none": {"amount": {}},
    "amount: a part must be a string, found int: 3": {"amount": {3: 0.5}},
    r"amount\['a'\]: a float must be a fraction in \[0, 1\], found 1.5": {"amount": {"a": 1.5}},
    r"amount\['a'\]: must be a float \(fraction\) or an int": {"amount": {"a": "0.5"}},
    "amount: a part must be one of shared, a, b, found 'trunk'": {"amount": {"trunk": 0.5, "a": 0.5, "b": 0.5}},
    r"every part that has weights must be named, found none for shared \(100 weights\), b \(50 weights\)": {
        "amount": {"a": 0.5}
    },
    r"amount\['b'\]: a count must be at most the number of entries still alive, found 51 with 50 alive": {
        "amount": {"shared": 0.5, "a": 0.5, "b": 51}
    },
    r"found 45 of 50 \(part 'b'\) to prune and 10 protected": {
        "amount": {"shared": 0.5, "a": 0.5, "b": 0.9}, "min_keep": 10
    },
}  # fmt: skip


class _Three(nn.Module):
    """100 shared weights, 50 of each task."""

    def __init__(self):
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(10, 10), nn.Linear(10, 5), nn.Linear(10, 5)

    def forward(self, x):
        x = self.trunk(x).tanh()
        return {"a": self.a(x), "b": self.b(x)}


def _masks(model, scores, amount, min_keep):
    scores.masks(amount, min_keep=min_keep)


def _one_call(model, scores, amount, min_keep):
    disparse_static(model, square_losses, vectors(width=10), amount, min_keep=min_keep)


def _bound(model, scores, amount, min_keep):
    prune.global_unstructured(scores.parameters, DiSparseStatic.bind(scores, min_keep=min_keep), amount=amount)


@pytest.mark.parametrize("message", sorted(WRONG))
@pytest.mark.parametrize("use", [_masks, _one_call, _bound])
def test_a_wrong_budget_is_refused_and_nothing_changes(message, use):
    model = _Three()
    scores = score_tasks(model, square_losses, vectors(width=10))
    before = Snapshot(model)
    with pytest.raises((TypeError, ValueError), match=message):
        use(model, scores, **{"amount": 0.9, "min_keep": 0, **WRONG[message]})
    before.check()


def test_a_task_called_shared_is_ambiguous():
    layer = nn.Linear(4, 1)
    key = (layer, "weight")
    scores = TaskScores(layer, {"shared": {key: torch.rand(1, 4)}})
    assert int(scores.masks(0.5)[key].sum()) == 2
    with pytest.raises(ValueError, match="no task may be called 'shared'"):
        scores.masks({"shared": 0.5})


def test_a_part_without_weights_may_be_named():
    layer = nn.Linear(4, 1)
    key = (layer, "weight")
    scores = TaskScores(layer, {"a": {key: torch.rand(1, 4)}, "b": {key: torch.rand(1, 4)}})
    assert int(scores.masks({"shared": 0.5, "a": 0.9, "b": 0})[key].sum()) == 2
    with pytest.raises(ValueError, match=r"amount\['b'\]: .* found 1 with 0 alive"):
        scores.masks({"shared": 0.5, "b": 1})
