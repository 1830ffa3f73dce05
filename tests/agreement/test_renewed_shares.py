"""Shares of a layer are those among its entries alive now, wherever the masks came from; by the definition of LAMP."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from disparse_plugin import TaskScores, score_tasks
from disparse_plugin.criteria import lamp_scores
from networks import PartlyShared, square_losses, vectors
from oracles.agreement import lamp

RULE = "layer_adaptive(damped(taylor, 0.25))"
SCORES = st.lists(
    st.sampled_from([0.0, 0.5, 1.0, 1.0, 3.0]) | st.floats(2**-10, 2**10, width=32), min_size=2, max_size=30
)


def shares_of(rows):
    """A layer whose tasks have shares of their scores, made while all was alive."""
    layer = nn.Linear(len(rows[0]), 1, bias=False)
    tables = {f"task {k}": {(layer, "weight"): lamp_scores(torch.tensor(row))[None]} for k, row in enumerate(rows)}
    return layer, TaskScores(layer, tables, shares=True)


def among(row, alive):
    values = np.zeros(len(row))
    values[alive] = lamp(np.asarray(row, dtype=np.float64)[alive])
    return values


@given(SCORES, st.data())
def test_shares_are_those_among_what_is_alive(row, data):
    alive = np.array(data.draw(st.lists(st.booleans(), min_size=len(row), max_size=len(row))))
    layer, scores = shares_of([row, row[::-1]])
    prune.custom_from_mask(layer, "weight", torch.tensor(alive)[None])
    wanted = (among(row, alive) + among(row[::-1], alive)) / 2
    np.testing.assert_allclose(scores.importance("sum")[layer, "weight"][0], wanted, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("size", [50, 20_000])
def test_a_round_of_ones_own_changes_no_share(size):
    layer, scores = shares_of([torch.rand(size, generator=torch.Generator().manual_seed(0)).tolist()])
    before, masks = scores.importance("sum")[layer, "weight"], scores.masks(0.6)
    prune.custom_from_mask(layer, "weight", masks[layer, "weight"])
    assert torch.equal(scores.importance("sum")[layer, "weight"], before * masks[layer, "weight"])


@pytest.mark.parametrize("arbiter", ["sum", "unanimous", "mean"])
@pytest.mark.parametrize("pattern", ["weights", "channels"])
@pytest.mark.parametrize("first", ["random", "magnitude", "nothing"])
def test_to_score_before_masks_from_elsewhere_is_to_score_after_them(arbiter, pattern, first):
    model, options = PartlyShared(), {"exclude": ["unused"]}
    layers = [module for module, _ in score_tasks(model, square_losses, vectors(), **options).parameters]
    if first == "magnitude":  # what has gone before scoring has no share
        prune.l1_unstructured(layers[0], "weight", 0.3)
    plain = score_tasks(model, square_losses, vectors(), criterion="damped(taylor, 0.25)", **options)
    early = score_tasks(model, square_losses, vectors(), criterion=RULE, **options)
    if first != "nothing":
        for layer, amount in zip(layers, itertools.cycle([0.5, 0.2]), strict=False):
            prune.random_unstructured(layer, "weight", amount)
    tables = {task: {key: now(plain[task][key], *key) for key in plain[task]} for task in plain}
    late = TaskScores(model, tables, shares=True)
    masks = early.masks(0.4, arbiter, pattern=pattern)
    assert all(torch.equal(mask, masks[key]) for key, mask in late.masks(0.4, arbiter, pattern=pattern).items())


def now(scores, module, name):
    alive = module.weight_mask.bool() if prune.is_pruned(module) else torch.ones_like(scores, dtype=torch.bool)
    result = torch.zeros_like(scores)
    result[alive] = lamp_scores(scores[alive])
    return result


def test_rounded_shares_are_made_anew_as_roughly():
    model, options = PartlyShared(), {"exclude": ["unused"], "criterion": RULE}
    exact = score_tasks(model, square_losses, vectors(), **options)
    rough = score_tasks(model, square_losses, vectors(), dtype=torch.bfloat16, **options)
    for module, name in exact.parameters:
        prune.random_unstructured(module, name, 0.5)
    for key, values in exact.importance("sum").items():
        torch.testing.assert_close(rough.importance("sum")[key], values, rtol=0.03, atol=1e-6)
