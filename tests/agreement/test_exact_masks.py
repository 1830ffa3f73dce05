"""The masks equal the paper's definition, exactly: same entries, same count, ties and all."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn.utils import prune

from disparse_plugin import DiSparseStatic, TaskScores, at_least, prunable_parameters, score_tasks
from disparse_plugin.agreement import band, counting, sample, ways
from disparse_plugin.agreement.percentiles import agreement
from disparse_plugin.agreement.ranking import ranks
from layouts import build, kept_entries, large_layouts, layouts, oracle, prune_places
from networks import TwoHeads, digit_batches, digit_losses
from oracles.agreement import ARBITERS

BY_NAME = {"at_least(2)": at_least(2), "at_least(3)": at_least(3)}
FRACTIONS = st.sampled_from([0.0, 0.05, 0.1, 0.3, 0.5, 0.9, 0.98, 1.0])


@given(layouts(), st.fractions(0, 1, max_denominator=40))
def test_the_mask_is_the_union_of_the_tasks_own_masks(layout, rho):
    """The rule of the paper at keep ratio rho, and our cut at the sparsity that it happens to reach."""
    _, scores = build(*layout)
    expected = oracle(*layout).union_of_tops(rho)
    masks = scores.masks(sum(layout[1]) - len(expected))
    assert kept_entries(masks, scores.parameters) == expected


@given(layouts(), FRACTIONS, st.sampled_from(sorted(ARBITERS)))
def test_every_arbiter_at_any_exact_amount(layout, amount, arbiter):
    _, scores = build(*layout)
    count = round(amount * sum(layout[1]))
    masks = scores.masks(amount, BY_NAME.get(arbiter, arbiter))
    assert kept_entries(masks, scores.parameters) == oracle(*layout).kept(count, arbiter)


@given(layouts(), st.integers(0, 45))
def test_a_count_is_exact(layout, count):
    assume(count <= sum(layout[1]))
    _, scores = build(*layout)
    assert sum(int((~mask).sum()) for mask in scores.masks(count).values()) == count


@given(layouts(), FRACTIONS, st.data())
def test_pruned_entries_are_out_of_the_ranking(layout, amount, data):
    tables, sizes = layout
    model, scores = build(tables, sizes)
    dead = {i: set(data.draw(st.lists(st.integers(0, n - 1), max_size=n))) for i, n in enumerate(sizes)}
    alive = {i: [place for place in range(n) if place not in dead[i]] for i, n in enumerate(sizes)}
    assume(all(any(alive[i] for i in table) for table in tables.values()))
    prune_places(model, dead)
    remaining = {task: {i: [row[j] for j in alive[i]] for i, row in table.items()} for task, table in tables.items()}
    small = oracle(remaining, sizes, alive)
    expected = small.kept(round(amount * len(small.entries)), "unanimous")
    found = kept_entries(scores.masks(amount), scores.parameters)
    assert found == {(i, alive[i][j]) for i, j in expected}


@given(layouts(), FRACTIONS)
def test_torch_makes_the_same_mask_from_the_importance(layout, amount):
    model, scores = build(*layout)
    masks = scores.masks(amount)
    importance = scores.importance()
    assert all(float(value.min()) >= 0 and float(value.max()) <= 1 for value in importance.values())
    prune.global_unstructured(scores.parameters, DiSparseStatic, importance_scores=importance, amount=amount)
    for layer in model:
        assert torch.equal(layer.weight_mask.bool(), masks[layer, "weight"])


@given(layouts(max_tasks=4), FRACTIONS, st.data())
def test_the_order_and_scale_of_tasks_change_nothing(layout, amount, data):
    tables, sizes = layout
    order = data.draw(st.permutations(list(tables)))
    scale = {task: data.draw(st.sampled_from([2.0**-14, 1.0, 2.0**14])) for task in tables}
    moved = {task: {i: [scale[task] * x for x in row] for i, row in tables[task].items()} for task in order}
    for arbiter in ("unanimous", "mean", "majority", "any"):
        _, scores = build(tables, sizes)
        _, other = build(moved, sizes)
        assert kept_entries(scores.masks(amount, arbiter), scores.parameters) == kept_entries(
            other.masks(amount, arbiter), other.parameters
        )


@given(layouts(max_tasks=4), st.fractions(0, 1, max_denominator=20), st.data())
def test_adding_a_task_protects_only_what_it_ranks_high(layout, rho, data):
    """At one keep ratio the new task adds its own top set to what stays, and takes nothing away."""
    tables, sizes = layout
    new = {0: data.draw(st.lists(st.floats(0, 1, width=32), min_size=sizes[0], max_size=sizes[0]))}
    before = oracle(tables, sizes).union_of_tops(rho)
    together = oracle({**tables, "new": new}, sizes)
    _, scores = build({**tables, "new": new}, sizes)
    kept = kept_entries(scores.masks(sum(sizes) - len(together.union_of_tops(rho))), scores.parameters)
    assert kept - before <= together.top("new", rho)
    assert before <= kept


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_scaling_a_loss_changes_no_mask(scale):
    model, batches = TwoHeads().double().eval(), [(images.double(), labels) for images, labels in digit_batches()]

    def scaled(model, batch):
        losses = digit_losses(model, batch)
        return {"a": losses["a"] * scale, "b": losses["b"]}

    plain, other = score_tasks(model, digit_losses, batches), score_tasks(model, scaled, batches)
    for amount in (0.5, 0.9, 0.99):
        first, second = plain.masks(amount), other.masks(amount)
        assert all(torch.equal(first[key], second[key]) for key in plain.parameters)


def test_repeated_pruning_composes(device):
    model = TwoHeads().to(device).eval()
    scores = score_tasks(model, digit_losses, [(x.to(device), y.to(device)) for x, y in digit_batches()])
    total = sum(module.weight.numel() for module, _ in scores.parameters)
    alive, previous = total, None
    for amount in (0.5, 0.5, 17):
        importance = scores.importance()
        prune.global_unstructured(scores.parameters, DiSparseStatic, importance_scores=importance, amount=amount)
        alive -= amount if isinstance(amount, int) else round(amount * alive)
        masks = {module: module.weight_mask.bool() for module, _ in scores.parameters}
        assert sum(int(mask.sum()) for mask in masks.values()) == alive
        if previous:
            assert not any((masks[module] & ~previous[module]).any() for module in masks)
        previous = masks


def test_a_custom_arbiter_sees_every_task_and_nan_where_it_does_not_reach():
    seen = []

    def priority(percentiles):
        seen.append(percentiles.clone())
        return (percentiles.nan_to_num(0.0) * torch.tensor([1.0, 0.5], dtype=percentiles.dtype)[:, None]).amax(0)

    _, scores = build({"a": {0: [1.0, 2.0]}, "b": {0: [2.0, 1.0], 1: [3.0]}}, [2, 1])
    kept = kept_entries(scores.masks(1, priority), scores.parameters)
    assert torch.equal(seen[0], torch.tensor([[0.5, 1.0], [2 / 3, 1 / 3]], dtype=torch.float64))
    assert seen[1][0].isnan().all()
    assert seen[1][1].tolist() == [1.0]
    assert kept == {(0, 0), (0, 1)}  # 0.5, 1.0 and 0.5: of the two equal ones the smaller weight goes, 0.5 and not -1
    assert torch.equal(scores.importance(priority)[scores.parameters[1]], torch.tensor([[0.5]], dtype=torch.float64))


@settings(max_examples=150)
@given(large_layouts(), st.floats(0, 1), st.sampled_from(["unanimous", "any", "at_least(2)"]), st.sampled_from([8, 64]))
def test_the_cut_by_a_sample_is_the_cut_by_a_full_sort(layout, amount, arbiter, entries):
    """Large models are cut without sorting everything; tiny samples here make it guess badly as often as well."""
    _, scores = build(*layout)
    rule = BY_NAME.get(arbiter, arbiter)
    full = scores.masks(amount, rule)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(band, "SAMPLE", entries)
        patch.setattr(band, "HALF_WIDTH", 0.1)
        quick = scores.masks(amount, rule)
    assert all(torch.equal(full[key], quick[key]) for key in full)


@settings(max_examples=150)
@given(
    large_layouts(),
    st.floats(0, 1),
    st.sampled_from(["unanimous", "any", "mean", "majority", "at_least(2)"]),
    st.sampled_from([12, 18, 23]),
    st.sampled_from([0, 1, 7]),
)
def test_the_cut_by_counting_is_the_cut_by_a_full_sort(layout, amount, arbiter, dropped, errors):
    """Few bins and steps leave much in question here, and a guess that is off by little often misleads."""
    _, scores = build(*layout)
    rule = BY_NAME.get(arbiter, arbiter)
    full = scores.masks(amount, rule)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ways, "COUNTED", 0)
        patch.setattr(sample, "ERRORS", errors)
        patch.setattr(counting, "DROPPED", dropped)
        patch.setattr(counting, "PIECE", 50)
        patch.setattr(counting, "STEPS", 64)
        quick = scores.masks(amount, rule)
    assert all(torch.equal(full[key], quick[key]) for key in full)


@pytest.mark.parametrize("arbiter", ["majority", "at_least(3)"])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 17, 40])
def test_the_middle_of_any_number_of_tasks_is_counted(monkeypatch, arbiter, count):
    tables = {f"task {number}": {0: torch.randn(600).tolist()} for number in range(count)}
    _, scores = build(tables, [600])
    full = scores.masks(0.5, arbiter)
    monkeypatch.setattr(ways, "COUNTED", 0)
    monkeypatch.setattr(sample, "ERRORS", 1)
    monkeypatch.setattr(ways, "agreement", None)
    quick = scores.masks(0.5, arbiter)
    assert all(torch.equal(full[key], quick[key]) for key in full)


@settings(max_examples=150)
@given(large_layouts(), st.floats(0, 1), st.floats(-0.1, 1.1), st.sampled_from([0.0, 0.1, 0.5]))
def test_no_guess_of_where_the_cut_lies_changes_it(layout, amount, low, width):
    _, scores = build(*layout)
    full = scores.masks(amount, "mean")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ways, "COUNTED", 0)
        patch.setattr(counting, "DROPPED", 23)
        patch.setattr(counting, "guessed", lambda *_: (low, low + width))
        quick = scores.masks(amount, "mean")
    assert all(torch.equal(full[key], quick[key]) for key in full)


@pytest.mark.parametrize("arbiter", ["mean", "majority", "unanimous"])
def test_little_is_ranked_where_scores_are_counted(monkeypatch, arbiter):
    sizes = [40_000, 50_000, 60_000]
    reached = {"a": (0, 1), "b": (0, 2), "c": (0, 1, 2)}
    tables = {task: {i: torch.randn(sizes[i]).tolist() for i in indices} for task, indices in reached.items()}
    _, scores = build(tables, sizes)
    monkeypatch.setattr(ways, "COUNTED", 10**6)
    full = scores.masks(0.9, arbiter)
    monkeypatch.setattr(ways, "COUNTED", 0)
    ranked = []
    monkeypatch.setattr(counting, "ranks", lambda values, turns: ranked.append(len(values)) or ranks(values, turns))
    monkeypatch.setattr(ways, "agreement", None)
    quick = scores.masks(0.9, arbiter)
    assert all(torch.equal(full[key], quick[key]) for key in full)
    assert max(ranked) < sum(sizes) // 50


def test_the_cut_by_a_sample_is_used_on_a_large_model(monkeypatch):
    sizes = [40_000, 50_000, 60_000]
    reached = {"a": (0, 1), "b": (0, 2)}
    tables = {task: {i: torch.rand(sizes[i]).tolist() for i in indices} for task, indices in reached.items()}
    _, scores = build(tables, sizes)
    full = scores.masks(0.9)
    monkeypatch.setattr(band, "SAMPLE", 20_000)
    monkeypatch.setattr(band, "HALF_WIDTH", 0.02)
    monkeypatch.setattr(band, "agreement", _small_only)
    quick = scores.masks(0.9)
    assert all(torch.equal(full[key], quick[key]) for key in full)


def _small_only(candidates, *rest):
    assert sum(candidates.sizes) < 30_000, "everything was ranked"
    return agreement(candidates, *rest)


def test_float64_scores_are_ranked_in_full_precision():
    """Two scores that differ only beyond float32, on a float64 model."""
    model, _ = build({"a": {0: [0.0, 0.0]}}, [2])
    model = model.double()
    scores = TaskScores(model, {"a": {(model[0], "weight"): torch.tensor([[1.0 + 1e-12, 1.0]], dtype=torch.float64)}})
    assert scores.masks(1)[model[0], "weight"].tolist() == [[True, False]]


def test_parameters_that_no_task_reaches_stay_whole():
    model = TwoHeads().eval()

    def only_a(model, batch):
        return {"a": digit_losses(model, batch)["a"]}

    with pytest.warns(UserWarning, match=r"heads\.b\.weight"):
        scores = score_tasks(model, only_a, digit_batches())
    prune.global_unstructured(scores.parameters, DiSparseStatic, importance_scores=scores.importance(), amount=0.99)
    assert not prune.is_pruned(model.heads["b"])
    assert len(prunable_parameters(model)) == len(scores.parameters) + 1
