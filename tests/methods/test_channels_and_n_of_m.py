"""Whole channels and n of m, as masks of torch.nn.utils.prune, against plain numpy loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from disparse_plugin import DiSparseSemiStructured, DiSparseStructured, TaskScores, channel_importance, score_tasks


def channel_mask(scores: np.ndarray, dim: int, count: int) -> np.ndarray:
    """Zero the ``count`` channels of the lowest mean score, by one loop per step."""
    channels = np.moveaxis(scores, dim, 0)
    means = [float(channel.astype(np.float64).mean()) for channel in channels]
    gone = sorted(range(len(means)), key=lambda c: (means[c], c))[:count]
    mask = np.ones_like(channels)
    for channel in gone:
        mask[channel] = 0
    return np.moveaxis(mask, 0, dim)


def block_mask(scores: np.ndarray, n: int, m: int) -> np.ndarray:
    """Keep the n best of every m along dimension 1; of equal scores the later ones."""
    mask = np.zeros_like(scores)
    for row in np.ndindex(scores.shape[0], *scores.shape[2:]):
        for start in range(0, scores.shape[1], m):
            places = range(start, start + m)
            value = [(scores[(row[0], p, *row[1:])], p) for p in places]
            for _, place in sorted(value, reverse=True)[:n]:
                mask[(row[0], place, *row[1:])] = 1
    return mask


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(6, 4), (8, 4, 3, 3), (3, 5, 2)]),
    dim=st.integers(-2, 1),
    amount=st.floats(0, 1),
    seed=st.integers(0, 99),
    ties=st.booleans(),
)
def test_structured_masks_exactly_the_lowest_channels(
    shape: tuple[int, ...], dim: int, amount: float, seed: int, ties: bool
) -> None:
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.ones(shape))
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    scores = scores.mul(2).floor() if ties else scores
    DiSparseStructured.apply(layer, "weight", amount, dim=dim, importance_scores=scores)
    expected = channel_mask(scores.numpy(), dim % len(shape), round(amount * shape[dim]))
    np.testing.assert_array_equal(layer.weight_mask.numpy(), expected)


@settings(max_examples=40, deadline=None)
@given(
    pattern=st.sampled_from([(2, 4), (1, 4), (1, 2), (4, 4), (0, 4), (2, 8)]),
    shape=st.sampled_from([(3, 8), (2, 16, 3), (2, 8, 2, 2)]),
    seed=st.integers(0, 99),
    ties=st.booleans(),
)
def test_semi_structured_keeps_the_n_best_of_m(
    pattern: tuple[int, int], shape: tuple[int, ...], seed: int, ties: bool
) -> None:
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.ones(shape))
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    scores = scores.mul(3).floor() if ties else scores
    DiSparseSemiStructured.apply(layer, "weight", *pattern, importance_scores=scores)
    np.testing.assert_array_equal(layer.weight_mask.numpy(), block_mask(scores.numpy(), *pattern))


def test_pruning_again_counts_the_channels_that_are_left() -> None:
    layer, scores = nn.Linear(3, 8), torch.arange(24.0).reshape(8, 3)
    DiSparseStructured.apply(layer, "weight", 0.5, importance_scores=scores)
    DiSparseStructured.apply(layer, "weight", 0.5, importance_scores=scores)
    assert layer.weight_mask[:, 0].tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert isinstance(next(iter(layer._forward_pre_hooks.values())), prune.PruningContainer)


def test_semi_structured_counts_weights_that_are_already_gone() -> None:
    layer = nn.Linear(8, 2)
    existing = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1, 1, 1]])
    prune.custom_from_mask(layer, "weight", existing)
    scores = torch.arange(16.0).reshape(2, 8)
    DiSparseSemiStructured.apply(layer, "weight", importance_scores=scores)
    assert layer.weight_mask.tolist() == [[0, 1, 1, 0, 0, 0, 0, 1], [0, 0, 1, 1, 0, 0, 1, 1]]


def test_masks_survive_forward_and_become_permanent() -> None:
    layer = nn.Conv2d(4, 8, 3)
    DiSparseStructured.apply(layer, "weight", 3, importance_scores=torch.rand(8, 4, 3, 3))
    layer(torch.randn(1, 4, 5, 5)).sum().backward()
    assert prune.is_pruned(layer)
    prune.remove(layer, "weight")
    assert int((layer.weight.flatten(1) == 0).all(1).sum()) == 3


def test_channel_importance_is_the_unanimous_rule_on_channels() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))

    def losses(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
        out = model(x)
        return {"a": out[:, 0].square().mean(), "b": 100 * out[:, 1:].square().mean()}

    scores = score_tasks(net, losses, [torch.randn(16, 5)])
    importance = channel_importance(scores)
    raw = {t: torch.cat([scores[t][key].double().sum(1) for key in scores.parameters]).numpy() for t in scores}
    percentiles = [np.argsort(np.argsort(values, kind="stable"), kind="stable") + 1 for values in raw.values()]
    expected = np.max(percentiles, axis=0) / 10
    found = torch.cat([importance[key][:, 0] for key in scores.parameters]).numpy()
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("seed", range(4))
def test_channel_importance_is_about_the_entries_alive_now(dim: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    net = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4))
    keys = [(layer, "weight") for layer in net]
    tables = {t: {key: torch.tensor(rng.random(key[0].weight.shape)).float() for key in keys} for t in "ab"}
    scores = TaskScores(net, tables)
    alive = [rng.random(layer.weight.shape) < 0.4 for layer in net]
    np.moveaxis(alive[0], dim, 0)[1] = False  # one channel has gone
    for layer, mask in zip(net, alive, strict=True):
        prune.custom_from_mask(layer, "weight", torch.tensor(mask))
    channels = [(i, c) for i, mask in enumerate(alive) for c, row in enumerate(np.moveaxis(mask, dim, 0)) if row.any()]
    expected = {}
    for table in tables.values():
        sums = {(i, c): np.moveaxis(table[keys[i]].double().numpy() * alive[i], dim, 0)[c].sum() for i, c in channels}
        for place, channel in enumerate(sorted(channels, key=sums.__getitem__), start=1):
            expected[channel] = max(expected.get(channel, 0), place / len(channels))
    found = channel_importance(scores, dim)
    for i, key in enumerate(keys):
        for c, values in enumerate(np.moveaxis(found[key].numpy(), dim, 0)):
            np.testing.assert_allclose(values, expected.get((i, c), 0.0))


def test_structured_prunes_again_what_the_pattern_of_channels_does() -> None:
    layer = nn.Linear(4, 3, bias=False)
    table = torch.tensor([[9.0, 9.0, 9.0, 0.1], [1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    scores = TaskScores(nn.Sequential(layer), {"a": {(layer, "weight"): table}})
    prune.custom_from_mask(layer, "weight", torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1]]))
    expected = scores.masks(1, pattern="channels")[layer, "weight"]
    DiSparseStructured.apply(layer, "weight", 1, importance_scores=channel_importance(scores)[layer, "weight"])
    assert layer.weight_mask.any(1).tolist() == expected.any(1).tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: DiSparseStructured.apply(m, "weight", 0.5), ValueError, "needs scores, found None"),
        (lambda m: DiSparseSemiStructured.apply(m, "weight"), ValueError, "needs scores, found None"),
        (lambda m: DiSparseStructured.apply(m, "weight", 9, importance_scores=torch.ones(8, 6)), ValueError, "amount"),
        (
            lambda m: DiSparseStructured.apply(m, "weight", 1.5, importance_scores=torch.ones(8, 6)),
            ValueError,
            "amount",
        ),
        (lambda m: DiSparseStructured.apply(m, "weight", 1, 2, importance_scores=torch.ones(8, 6)), IndexError, "dim"),
        (lambda m: DiSparseSemiStructured.apply(m, "weight", importance_scores=torch.ones(8, 6)), ValueError, "divide"),
        (
            lambda m: DiSparseSemiStructured.apply(m, "weight", 3, 2, importance_scores=torch.ones(8, 6)),
            ValueError,
            "n:",
        ),
        (
            lambda m: DiSparseSemiStructured.apply(m, "weight", 1, 2, importance_scores=torch.ones(8)),
            ValueError,
            "shape",
        ),
        (
            lambda m: DiSparseStructured.apply(m, "weight", 1, importance_scores=torch.full((8, 6), torch.nan)),
            ValueError,
            "finite",
        ),
        (
            lambda m: DiSparseStructured.apply(m, "weight", 1, importance_scores=torch.ones(8, 6).int()),
            TypeError,
            "float",
        ),
    ],
)
def test_bad_input_leaves_the_layer_alone(call, error, words) -> None:  # type: ignore[no-untyped-def]
    layer = nn.Linear(6, 8)
    with pytest.raises(error, match=words):
        call(layer)
    assert not prune.is_pruned(layer)
    assert "weight" in layer._parameters
