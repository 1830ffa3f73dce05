"""Arbiters on their own, against plain definitions, and by the names that reports print."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from disparse_plugin import TaskScores, arbiters, at_least, score_tasks
from networks import PartlyShared, square_losses, vectors
from oracles.agreement import ARBITERS


@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, None]), min_size=4, max_size=4), min_size=1, max_size=6),
    st.sampled_from(sorted(ARBITERS)),
)
def test_arbiters_ignore_absent_tasks(rows, name):
    table = torch.tensor([[torch.nan if value is None else value for value in row] for row in rows])
    found = arbiters.resolve(name)(table)
    for column, value in enumerate(found.tolist()):
        present = [row[column] for row in rows if row[column] is not None]
        if present:
            assert value == pytest.approx(float(ARBITERS[name](present)), abs=1e-6)


def test_at_least_one_is_unanimous():
    table = torch.rand(4, 50)
    assert torch.equal(at_least(1)(table), arbiters.unanimous(table))


@pytest.mark.parametrize("name", ["unanimous", "majority", "mean", "any", "at_least(2)", "at_least(3)"])
def test_a_name_means_the_arbiter_everywhere(name):
    model = PartlyShared()
    scores = score_tasks(model, square_losses, vectors(), exclude=["unused"])
    itself = scores.masks(0.5, arbiters.resolve(name))
    assert all(torch.equal(mask, itself[key]) for key, mask in scores.masks(0.5, name).items())
    given_itself = scores.importance(arbiters.resolve(name))
    assert all(torch.equal(values, given_itself[key]) for key, values in scores.importance(name).items())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: arbiters.resolve("all"), ValueError, r"arbiter: must be one of .*unanimous.*found 'all'"),
        (lambda: arbiters.resolve("unanimus"), ValueError, "found 'unanimus'; did you mean 'unanimous'"),
        (lambda: arbiters.resolve("at_least"), ValueError, r"found 'at_least'; write how many .* 'at_least\(2\)'"),
        (lambda: arbiters.resolve("at_least(0)"), ValueError, "k: must be at least 1, found 0"),
        (lambda: arbiters.resolve("at_least(x)"), ValueError, r"found 'at_least\(x\)'; write how many"),
        (lambda: arbiters.resolve(None), TypeError, "arbiter: must be a name or a callable.*found NoneType"),
        (lambda: at_least(0), ValueError, "k: must be at least 1, found 0"),
        (lambda: at_least(1.5), TypeError, "k: must be an int, found float"),
        (lambda: arbiters.register("mean"), ValueError, "name: must not be one of this package's, found 'mean'"),
    ],
)
def test_unknown_choices(call, error, message):
    with pytest.raises(error, match=message):
        call()


@given(st.integers(2, 6), st.integers(0, 99), st.data())
def test_the_order_of_the_tasks_does_not_change_a_single_bit(tasks, seed, data):
    """Sums depend on their order in the last bit, which is enough to turn a tie into an order."""
    table = torch.rand(tasks, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    table[:-1, ::7] = torch.nan
    order = data.draw(st.permutations(range(tasks)))
    for name in sorted(ARBITERS):
        rule = arbiters.resolve(name)
        assert torch.equal(rule(table), rule(table[list(order)])), name


def test_percentiles_that_differ_beyond_float32_are_in_order():
    """4999 / 5000 is below 5000 / 5001, by less than float32 tells apart; the magnitudes say the opposite."""
    sizes = (5000, 5001)
    model = nn.ModuleList([nn.Linear(size, 1, bias=False) for size in sizes])
    nn.init.constant_(model[0].weight, 1.0)
    nn.init.constant_(model[1].weight, 0.5)
    tables = {
        task: {(layer, "weight"): torch.arange(float(size)).view(1, size)}
        for task, layer, size in zip("ab", model, sizes, strict=True)
    }
    masks = TaskScores(model, tables).masks(sum(sizes) - 3)
    assert [mask.flatten().nonzero().flatten().tolist() for mask in masks.values()] == [[4999], [4999, 5000]]


SHAPES = {
    "too many dimensions": lambda percentiles: percentiles.amax(0).unsqueeze(0),
    "a column": lambda percentiles: percentiles.amax(0).unsqueeze(1),
    "not reduced": lambda percentiles: percentiles,
    "reduced twice": lambda percentiles: percentiles.amax(),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "ask", [lambda scores, rule: scores.masks(0.5, rule), lambda scores, rule: scores.importance(rule)]
)
def test_an_arbiter_reduces_the_tasks_and_nothing_else(shape, ask):
    layer = nn.Linear(4, 3)
    scores = TaskScores(layer, {task: {(layer, "weight"): torch.rand(3, 4)} for task in "ab"})
    with pytest.raises(ValueError, match=r"arbiter: must reduce the task axis only, to shape \(12,\), found .*dim 0"):
        ask(scores, SHAPES[shape])


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf")])
def test_an_arbiter_stays_within_the_percentiles(value):
    layer = nn.Linear(4, 3)
    scores = TaskScores(layer, {"a": {(layer, "weight"): torch.rand(3, 4)}})
    with pytest.raises(ValueError, match=r"arbiter: must return values in \[0, 1\], found"):
        scores.masks(0.5, lambda percentiles: torch.full_like(percentiles[0], value))
