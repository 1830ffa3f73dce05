"""In one process: the order of all values is that of a sort, and what is found goes back to where it came from."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from disparse_plugin import arbiters
from disparse_plugin.agreement import cut, percentiles, ranking, shared_out
from disparse_plugin.agreement.budgets import Quota
from disparse_plugin.agreement.candidates import Candidates
from disparse_plugin.agreement.shared_out import SharedOut
from disparse_plugin.agreement.sorted_shares import ranks_among_all
from disparse_plugin.criteria import lamp_scores

SCORES = st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0, 7.0]), min_size=1, max_size=20)


@given(SCORES, st.randoms())
def test_ranks_are_those_of_one_sort(scores, random):
    values = torch.tensor(scores)
    magnitudes = torch.tensor([float(random.randint(-2, 2)) for _ in scores])
    everything = torch.ones(len(scores), dtype=torch.bool)
    turns = ranks_among_all(magnitudes.abs(), torch.arange(len(scores)), everything)
    assert torch.equal(ranks_among_all(values, turns, everything), ranking.ranks(values, magnitudes).to(torch.int64))


@given(st.lists(SCORES, min_size=1, max_size=3), st.sampled_from(["unanimous", "any", "mean", "sum"]), st.booleans())
def test_a_cut_is_that_of_whole_candidates(layers, name, shared):
    """The first layer is reached by two tasks, the others by one."""
    rows = [{"a": torch.tensor(layer)} for layer in layers]
    rows[0]["b"] = rows[0]["a"].flip(0)
    magnitudes = [torch.tensor(layer).flip(0) - 0.2 for layer in layers]
    sizes = [len(layer) for layer in layers]
    places = torch.arange(sum(sizes)).split(sizes)
    plain, spread = Candidates(rows, magnitudes), SharedOut(rows, magnitudes, False, places, [True] * len(rows))
    arbiter, floors = arbiters.resolve(name), [min(1, size) if shared else 0 for size in sizes]
    quotas = [Quota(tuple(range(len(rows))), (sum(sizes) - sum(floors)) // 2)]
    expected = cut.lowest_in_budget(plain, ["a", "b"], arbiter, quotas, floors)
    found = shared_out.lowest_in_budget(spread, ["a", "b"], arbiter, quotas, floors)
    assert [mark.tolist() for mark in found] == [mark.tolist() for mark in expected]
    values = percentiles.agreement(plain, ["a", "b"], arbiter)
    lifted = cut.lift(values, floors, magnitudes)
    parted = ranking.distinct(torch.cat(lifted), torch.cat(magnitudes)).split(sizes)
    again = shared_out.distinct(
        spread, shared_out.lift(spread, shared_out.agreement(spread, ["a", "b"], arbiter), floors)
    )
    assert [part.tolist() for part in again] == [part.tolist() for part in parted]


@given(SCORES)
def test_shares_are_those_of_lamp(scores):
    values = torch.tensor(scores, dtype=torch.float64)
    found = shared_out.lamp_among_all(values, torch.ones(len(scores), dtype=torch.bool))
    torch.testing.assert_close(found, lamp_scores(values), rtol=1e-12, atol=0)
