"""Budgets that cannot be met, or make no sense, are refused before anything changes."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from disparse_plugin import DiSparseStatic, TaskScores, disparse_static, score_tasks
from networks import Snapshot, square_losses, vectors

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
