"""Arbiters on their own, against plain definitions, and by the names that reports print."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disparse_plugin import arbiters, at_least, score_tasks
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
