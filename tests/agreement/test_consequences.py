"""What a cut warns of: emptied tensors, ties at zero, a count that is a percentage; and when it says nothing."""

import re
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from disparse_plugin import DiSparseStatic, TaskScores, disparse_static
from disparse_plugin.agreement.amounts import percentage_meant
from disparse_plugin.agreement.budgets import Budget
from disparse_plugin.analysis import own_masks, task_overlap
from disparse_plugin.errors import EmptyTensorWarning, TiesWarning
from disparse_plugin.sparse_training import DiSparseScheduler, GradualPruning
from networks import TwoHeads, digit_batches, digit_losses
from tied_scores import kept_places, tied


def said(call, *args, **kwargs):
    """What a call returns, and the warnings that it gives: ``{category: message}``, each at the caller's line."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = call(*args, **kwargs)
    assert all(warning.filename == __file__ for warning in seen)
    assert len({warning.category for warning in seen}) == len(seen)
    return result, {warning.category: str(warning.message) for warning in seen}


def emptied(case, kept):
    """The tensors of which something was alive and nothing is; none where nothing is left of any."""
    left = {index for index, _ in kept}
    return {f"{i}.weight" for i, places in enumerate(case.places()) if places and i not in left} if left else set()


def zeros(case):
    """The entries alive that score zero for every task that reaches them."""
    return {
        (index, place)
        for index, places in enumerate(case.places())
        for place in places
        if all(table[index][place] == 0 for table in case.tables.values() if index in table)
    }


@given(case=tied(), share=st.floats(0, 1), min_keep=st.integers(0, 1))
def test_a_cut_warns_of_what_it_did_and_of_nothing_else(case, share, min_keep):
    floors = sum(min(min_keep, size) for size in case.oracle().sizes)
    model, scores = case.build()
    masks, messages = said(scores.masks, round(share * (case.size - floors)), min_keep=min_keep)
    kept = kept_places(model, masks)
    empty, zero = emptied(case, kept), zeros(case)
    assert (EmptyTensorWarning in messages) == bool(empty)
    for name in empty:
        assert name in messages[EmptyTensorWarning]
    assert (TiesWarning in messages) == bool(zero - kept and zero & kept)
    if TiesWarning in messages:
        assert f"among the {len(zero)} of {case.size} that score exactly zero" in messages[TiesWarning]


@given(case=tied(shapes=((2, 4), (4, 2), (3, 2, 2))), share=st.floats(0, 1))
def test_channels_that_go_are_warned_of_too(case, share):
    model, scores = case.build()
    masks, messages = said(scores.masks, share, pattern="channels")
    empty = emptied(case, kept_places(model, masks))
    assert (EmptyTensorWarning in messages) == bool(empty)
    assert not empty or "keep some channels in each with min_keep" in messages[EmptyTensorWarning]


@given(case=tied(shapes=((2, 4), (4,))))
def test_blocks_empty_nothing(case):
    _, scores = case.build()
    assert said(scores.masks, pattern="1:4")[1] == {}


def _spread():
    """Two tensors; no score is zero, and the first tensor is the less important."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    tables = {task: {(layer, "weight"): torch.rand(layer.weight.shape) + place for place, layer in enumerate(model)}
              for task in ("a", "b")}  # fmt: skip
    return model, TaskScores(model, tables)


def test_the_message_about_an_empty_tensor_names_it_its_tasks_and_both_cures():
    model, scores = _spread()
    assert said(scores.masks, 11)[1] == {}
    masks, messages = said(scores.masks, 12)
    assert not masks[model[0], "weight"].any()
    assert list(messages) == [EmptyTensorWarning]
    expected = (
        r"nothing stays of 1 of 2 tensors.*: 0\.weight \(of a, b\); keep some weights .*min_keep=\.\.\..*layer_ad"
    )
    assert re.search(expected, messages[EmptyTensorWarning])
    assert said(scores.masks, 12, min_keep=1)[1] == {}
    assert said(scores.masks, 1.0)[1] == {}, "nothing at all is what was asked for"


def test_only_what_a_cut_empties_is_news():
    model, scores = _spread()
    prune.custom_from_mask(model[0], "weight", torch.zeros(3, 4))
    assert said(scores.masks, 2)[1] == {}


def test_many_empty_tensors_are_counted_not_listed():
    model = nn.ModuleList([nn.Linear(2, 1, bias=False) for _ in range(12)])
    table = {(layer, "weight"): torch.rand(1, 2) + place for place, layer in enumerate(model)}
    _, messages = said(TaskScores(model, {"a": table}).masks, 22)
    assert "nothing stays of 11 of 12 tensors" in messages[EmptyTensorWarning]
    assert "7.weight (of a) and 3 more; keep" in messages[EmptyTensorWarning]


def _mostly_zero(zeros_of_a, zeros_of_b):
    layer = nn.Linear(10, 1, bias=False)
    a, b = torch.arange(1.0, 11).view(1, 10), torch.arange(1.0, 11).view(1, 10)
    a[0, :zeros_of_a], b[0, :zeros_of_b] = 0, 0
    return TaskScores(layer, {"a": {(layer, "weight"): a}, "b": {(layer, "weight"): b}})


@pytest.mark.parametrize(
    ("zero", "count", "warns"),
    [((6, 6), 3, True), ((6, 6), 6, False), ((6, 6), 7, False), ((6, 6), 0, False), ((6, 4), 3, True),
     ((6, 0), 3, False)],
)  # fmt: skip
def test_ties_at_zero_are_news_where_the_cut_falls_among_them(zero, count, warns):
    _, messages = said(_mostly_zero(*zero).masks, count)
    assert list(messages) == [TiesWarning] * warns
    if warns:
        for cause in ("saturated or dead units", "zero-initialised branches", "a loss at its minimum"):
            assert cause in messages[TiesWarning]


@pytest.mark.parametrize(
    ("size", "amount", "warns"),
    [(501, 50, True), (500, 50, False), (832, 49, False), (832, 100, True), (832, 101, False), (832, {"a": 90}, True),
     (9_000, 8, True), (801, 8, True), (800, 8, False), (832, 0.9, False), (832, 90 / 832, False), (832, 0, False),
     (832, Budget(90), False)],
)  # fmt: skip
def test_a_count_that_looks_like_a_percentage(size, amount, warns):
    layer = nn.Linear(size, 1, bias=False)
    masks, messages = said(TaskScores(layer, {"a": {(layer, "weight"): torch.rand(1, size)}}).masks, amount)
    assert list(messages) == [UserWarning] * warns
    count = amount["a"] if isinstance(amount, dict) else amount
    if warns:
        told = rf"amount.*: {count} is a number of weights, .* for {count} weights {count} / {size}"
        assert re.match(told, messages[UserWarning])
        assert int((~masks[layer, "weight"]).sum()) == count, "a warning, not another meaning"


def test_warnings_of_the_other_ways_to_prune_point_at_the_user_too():
    _, scores = _spread()
    _, messages = said(prune.global_unstructured, scores.parameters, DiSparseStatic.bind(scores), amount=12)
    assert list(messages) == [EmptyTensorWarning]
    net = TwoHeads(width=40).eval()
    _, messages = said(disparse_static, net, digit_losses, digit_batches(), 90)
    assert list(messages) == [UserWarning]
    assert "amount: 90 is a number of weights" in messages[UserWarning]


def _training(scores):
    layer = scores.parameters[0][0]
    return layer, torch.optim.SGD(layer.parameters(), lr=0.1), digit_losses


@pytest.mark.parametrize(
    "prune_to",
    [
        lambda scores: task_overlap(scores, 90),
        lambda scores: own_masks(scores, 90),
        lambda scores: DiSparseScheduler(*_training(scores), amount=90, stop_at=9),
        lambda scores: GradualPruning(*_training(scores), amount=90, stop_at=9),
    ],
    ids=["overlap", "own masks", "dynamic", "gradual"],
)
def test_a_count_that_looks_like_a_percentage_wherever_there_is_an_amount(prune_to):
    layer = nn.Linear(832, 1, bias=False)
    tables = {task: {(layer, "weight"): torch.rand(1, 832)} for task in ("a", "b")}
    _, messages = said(prune_to, TaskScores(layer, tables))
    assert messages == {UserWarning: percentage_meant(90, 832)}


def test_a_count_of_a_part_is_held_against_the_part():
    trunk, head = nn.Linear(400, 1, bias=False), nn.Linear(400, 1, bias=False)
    both, one = {(trunk, "weight"): torch.rand(1, 400)}, {(head, "weight"): torch.rand(1, 400)}
    scores = TaskScores(nn.ModuleList([trunk, head]), {"a": both | one, "b": dict(both)})
    assert said(scores.masks, {"shared": 90, "a": 90})[1] == {}


def test_who_calls_torch_counts_as_torch_does():
    layer = nn.Linear(832, 1, bias=False)
    scores = TaskScores(layer, {"a": {(layer, "weight"): torch.rand(1, 832)}})
    _, messages = said(prune.global_unstructured, scores.parameters, DiSparseStatic.bind(scores), amount=90)
    assert messages == {}
