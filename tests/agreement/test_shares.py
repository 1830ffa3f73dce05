"""Agreement on shares: the sum over the tasks of LAMP's share, by its definition."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disparse_plugin import TaskScores, arbiters, disparse_pretrained, score_tasks
from disparse_plugin.agreement import by_sums, counting, sample, ways
from disparse_plugin.agreement.percentiles import agreement
from layouts import build, kept_entries, large_layouts, layouts, weights_of
from networks import PartlyShared, square_losses, vectors
from oracles.agreement import lamp, ordered_positions


def expected(tables, sizes):
    """For each entry, what the tasks that reach it have of their tensors in it, over the number of all tasks."""
    found = [np.zeros(size) for size in sizes]
    for table in tables.values():
        for index, row in table.items():
            found[index] += lamp(row)
    return [row / len(tables) for row in found]


@given(layouts(), st.integers(0, 20))
def test_the_lowest_sums_go(layout, count):
    tables, sizes = layout
    _, scores = build(tables, sizes)
    wanted = expected(tables, sizes)
    for key, values in zip(scores.parameters, wanted, strict=True):
        np.testing.assert_allclose(scores.importance("sum")[key].flatten(), values, rtol=1e-5, atol=1e-12)
    # Summing in another order can part what is equal by definition, so the order is taken from the importance.
    flat = [float(x) for key in scores.parameters for x in scores.importance("sum")[key].flatten()]
    sizes_of_weights = [abs(weight) for row in weights_of(sizes) for weight in row]
    gone = set(ordered_positions(flat, sizes_of_weights)[: min(count, len(flat))])
    masks = scores.masks(min(count, len(flat)), "sum")
    kept = np.concatenate([masks[key].flatten() for key in scores.parameters])
    assert set(np.flatnonzero(~kept).tolist()) == gone


@given(layouts(max_tasks=4), st.data())
def test_the_order_and_scale_of_tasks_change_nothing(layout, data):
    tables, sizes = layout
    order = data.draw(st.permutations(list(tables)))
    scale = {task: data.draw(st.sampled_from([2.0**-14, 1.0, 2.0**14])) for task in tables}
    moved = {task: {i: [scale[task] * x for x in row] for i, row in tables[task].items()} for task in order}
    (_, one), (_, other) = build(tables, sizes), build(moved, sizes)
    for first, second in zip(one.importance("sum").values(), other.importance("sum").values(), strict=True):
        assert torch.equal(first, second)


def test_a_layer_adaptive_criterion_is_not_shared_out_twice(tmp_path):
    model = PartlyShared()
    plain = score_tasks(model, square_losses, vectors(), exclude=["unused"])
    shares = score_tasks(model, square_losses, vectors(), criterion="layer_adaptive(snip)", exclude=["unused"])
    assert (plain.shares, shares.shares) == (False, True)
    shares.save(tmp_path / "shares.safetensors")
    for scores in (shares, TaskScores.load(tmp_path / "shares.safetensors", model)):
        assert scores.shares
        for key, values in scores.importance("sum").items():
            torch.testing.assert_close(values, plain.importance("sum")[key], rtol=1e-5, atol=1e-9)


def test_lamp_with_reach_is_lamp_times_the_tasks_that_reach():
    model = PartlyShared()
    scores = score_tasks(model, square_losses, vectors(count=1), criterion="lamp", exclude=["unused"])
    for key, values in scores.importance("sum").items():
        reaching = len(scores.tasks_reaching(*key))
        share = lamp(key[0].weight.detach().flatten().double().numpy()) * reaching / 4
        np.testing.assert_allclose(values.flatten(), share, rtol=1e-5)


@pytest.mark.parametrize("pattern", ["2:4", "channels"])
def test_with_every_pattern(pattern):
    torch.manual_seed(1)
    tables = {task: {0: torch.rand(8).tolist(), 1: torch.rand(12).tolist()} for task in "ab"}
    model, _ = build(tables, [8, 12])
    for layer in model:  # square ones, so that both patterns have something to choose
        layer.weight = torch.nn.Parameter(layer.weight.detach().reshape(4, -1).repeat(1, 4))
    table = {task: {(layer, "weight"): torch.rand(layer.weight.shape) for layer in model} for task in "ab"}
    scores = TaskScores(model, table)
    masks = scores.masks(None if pattern == "2:4" else 3, "sum", pattern=pattern)
    if pattern == "2:4":
        assert all(bool((mask.reshape(-1, 4).sum(1) == 2).all()) for mask in masks.values())
    else:
        assert sum(int((~mask).all(1).sum()) for mask in masks.values()) == 3
        assert all(bool((mask.all(1) | ~mask.any(1)).all()) for mask in masks.values())


def test_in_one_call_with_a_damped_criterion():
    model = PartlyShared()
    scores = disparse_pretrained(
        model,
        square_losses,
        vectors(),
        0.5,
        criterion="layer_adaptive(damped(taylor, 0.25))",
        arbiter="sum",
        exclude=["unused"],
    )
    alive = sum(int(module.weight_mask.sum()) for module, _ in scores.parameters)
    total = sum(module.weight_mask.numel() for module, _ in scores.parameters)
    assert alive == total - round(0.5 * total)
    assert scores.criterion == "layer_adaptive(damped(taylor, 0.25))"


def test_an_arbiter_of_ones_own_on_shares(monkeypatch):
    monkeypatch.setattr(arbiters, "_ARBITERS", dict(arbiters._ARBITERS))
    monkeypatch.setattr(arbiters, "_ON_SHARES", list(arbiters._ON_SHARES))

    @arbiters.register("largest share", scale="share")
    def largest(shares):
        return shares.nan_to_num(0.0).amax(0)

    _, scores = build({"a": {0: [3.0, 4.0]}, "b": {0: [1.0, 0.0], 1: [2.0]}}, [2, 1])
    found = torch.cat([values.flatten() for values in scores.importance("largest share").values()])
    torch.testing.assert_close(found, torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64))


def kept_by_sums(tables, sizes, count):
    """The entries with the highest sums, by the definition: from the smallest share to the largest, in float64."""
    flat = []
    for index, size in enumerate(sizes):
        rows = [np.float64(np.float32(table.get(index, [0] * size))) for table in tables.values()]
        flat += (np.cumsum(np.sort(rows, axis=0), axis=0)[-1] / len(tables)).tolist()
    magnitudes = [abs(weight) for row in weights_of(sizes) for weight in row]
    places = [(index, place) for index, size in enumerate(sizes) for place in range(size)]
    gone = set(ordered_positions(flat, magnitudes)[:count])
    return {place for number, place in enumerate(places) if number not in gone}


@pytest.fixture
def cut_near_the_sums(monkeypatch):
    """Cut small models as large ones: a sample of every third, and in pieces."""
    monkeypatch.setattr(ways, "COUNTED", 0)
    monkeypatch.setattr(sample, "EVERY", 3)
    monkeypatch.setattr(by_sums, "MOST_BETWEEN", 1)
    monkeypatch.setattr(sample, "ERRORS", sample.ERRORS)
    monkeypatch.setattr(counting, "PIECE", 50)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(large_layouts(), st.floats(0, 1), st.sampled_from([0.2, 2, 7]), st.sampled_from([torch.float32, torch.float64]))
def test_the_cut_near_the_sums_is_the_cut_of_all(cut_near_the_sums, layout, amount, errors, dtype):
    """The narrower what is looked at closely, the more often the sample misleads; the masks are the same."""
    tables, sizes = layout
    model, scores = build(tables, sizes)
    rows = {task: {key: row.to(dtype) for key, row in scores[task].items()} for task in scores}
    shares = TaskScores(model, rows, parameters=scores.parameters, shares=True)
    sample.ERRORS = errors
    found = kept_entries(shares.masks(amount, "sum"), shares.parameters)
    assert found == kept_by_sums(tables, sizes, round(amount * sum(sizes)))


def test_few_sums_are_made_exactly(cut_near_the_sums, monkeypatch):
    sizes = [40_000, 50_000, 60_000]
    model = build({"a": {i: [0.0] * size for i, size in enumerate(sizes)}}, sizes)[0]
    tables = {
        task: {(model[i], "weight"): torch.rand(1, sizes[i]).square() for i in reached}
        for task, reached in {"a": (0, 1), "b": (0, 2), "c": (0, 1, 2)}.items()
    }
    scores = TaskScores(model, tables, shares=True)
    full = {part: scores.masks(amount, "sum") for part, amount in WANTED.items()}
    monkeypatch.setattr(by_sums, "agreement", made := Counted())
    monkeypatch.setattr(ways, "agreement", None)
    monkeypatch.setattr(sample, "EVERY", 20)
    for part, amount in WANTED.items():
        quick = scores.masks(amount, "sum")
        assert all(torch.equal(full[part][key], quick[key]) for key in full[part])
    assert max(made) < 30_000


WANTED = {"a share": 0.9, "a count": 1000, "a part": {"shared": 0.5}}


class Counted(list):
    """Agreement scores, and of how many units each time."""

    def __call__(self, candidates, *rest):
        self.append(sum(candidates.sizes))
        return agreement(candidates, *rest)


def test_what_are_no_shares_is_said_of_large_models_too(cut_near_the_sums):
    model, scores = build({"a": {0: [0.5] * 99 + [1.5]}}, [100])
    wrong = TaskScores(model, {"a": dict(scores["a"])}, shares=True)
    with pytest.raises(ValueError, match=r"values in \[0, 1\], found 1\.5"):
        wrong.masks(0.5, "sum")
