"""Patterns as the docstrings define them: n of every m, and whole channels, for every arbiter, ties and masks."""

import functools
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from disparse_plugin import DiSparseStatic, TaskScores, disparse_pretrained, disparse_static, score_tasks
from disparse_plugin.agreement.budgets import Budget
from disparse_plugin.agreement.patterns import resolve
from layouts import build, weights_of
from networks import PartlyShared, Snapshot, TwoHeads, digit_batches, digit_losses, square_losses, vectors
from oracles.agreement import ARBITERS, Layout
from tied_scores import kept_places, tied

RULES = st.sampled_from(sorted(ARBITERS))
BLOCKS = st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 4)])
DIVISIBLE = ((4,), (2, 4), (1, 8), (2, 4, 3))
WITH_CHANNELS = ((3, 1), (2, 3), (4, 2), (3, 2, 2))


def blocks_of(shape, m):
    """Row-major places of each block: m that follow each other along dimension 1, or along a vector."""
    places = np.arange(math.prod(shape)).reshape(shape)
    return np.moveaxis(places, min(1, len(shape) - 1), -1).reshape(-1, m).tolist()


def kept_of_blocks(case, n, m, rule):
    """Of each block, the n alive with the highest agreement scores."""
    lowest_first = [*case.oracle().by_agreement(rule)]
    ordered = [next(iter(case.there([entry]))) for entry in lowest_first]
    kept = set()
    for index, shape in enumerate(case.shapes):
        for block in blocks_of(shape, m):
            own = [entry for entry in ordered if entry[0] == index and entry[1] in block]
            kept |= set(own[max(0, len(own) - n) :])
    return kept


class Channels:
    """The channels of a :class:`Tied` that have an entry alive, as a layout of units of their own."""

    def __init__(self, case):
        self.case = case
        self.rows = []
        for shape, alive in zip(case.shapes, case.alive, strict=True):
            width = math.prod(shape[1:])
            rows = [range(start, start + width) for start in range(0, len(alive), width)]
            living = [[place for place in row if alive[place]] for row in rows]
            self.rows.append([row for row in living if row])
        tables = {
            task: {index: self._sums(index, table[index]) for index in table} for task, table in case.tables.items()
        }
        weights = [self._sums(index, [abs(weight) for weight in row]) for index, row in enumerate(case.weights)]
        self.layout = Layout(tables, [len(rows) for rows in self.rows], weights)

    def _sums(self, index, values):
        return [sum(values[place] for place in row) for row in self.rows[index]]

    @property
    def count(self):
        return sum(self.layout.sizes)

    def places(self, units):
        return {(index, place) for index, channel in units for place in self.rows[index][channel]}


@given(case=tied(shapes=DIVISIBLE), block=BLOCKS, rule=RULES)
def test_n_of_every_m_stay(case, block, rule):
    n, m = block
    model, scores = case.build()
    masks = scores.masks(arbiter=rule, pattern=f"{n}:{m}")
    assert kept_places(model, masks) == kept_of_blocks(case, n, m, rule)
    for (layer, name), mask in masks.items():
        alive = torch.tensor(case.alive[list(model).index(layer)])
        for places in blocks_of(getattr(layer, name).shape, m):
            assert int(mask.flatten()[places].sum()) == min(n, int(alive[places].sum()))


@given(case=tied(shapes=WITH_CHANNELS), share=st.floats(0, 1), rule=RULES)
def test_whole_channels_go(case, share, rule):
    channels = Channels(case)
    count = round(share * channels.count)
    model, scores = case.build()
    expected = channels.places(channels.layout.kept(count, rule))
    assert kept_places(model, scores.masks(count, rule, pattern="channels")) == expected


@given(case=tied(shapes=WITH_CHANNELS), share=st.floats(0, 1), rule=RULES, min_keep=st.integers(1, 2))
def test_channels_are_kept_in_every_tensor(case, share, rule, min_keep):
    channels = Channels(case)
    floors = [min(min_keep, size) for size in channels.layout.sizes]
    count = round(share * (channels.count - sum(floors)))
    model, scores = case.build()
    expected = channels.layout.kept_in_budget({"everything": count}, floors, rule)
    found = kept_places(model, scores.masks(count, rule, min_keep=min_keep, pattern="channels"))
    assert found == channels.places(expected)


@given(case=tied(shapes=WITH_CHANNELS), share=st.floats(0, 1))
def test_channels_of_each_part(case, share):
    layout = Channels(case).layout
    sizes = {}
    for parameter, size in enumerate(layout.sizes):
        sizes[layout.part(parameter)] = sizes.get(layout.part(parameter), 0) + size
    model, scores = case.build()
    masks = scores.masks(dict.fromkeys(sizes, share), pattern="channels")
    counts = {part: round(share * size) for part, size in sizes.items()}
    expected = layout.kept_in_budget(counts, [0] * len(layout.sizes), "unanimous")
    assert kept_places(model, masks) == Channels(case).places(expected)


def attach(masks):
    for (module, name), mask in masks.items():
        prune.custom_from_mask(module, name, mask)


@settings(max_examples=25)
@given(case=tied(shapes=((2, 4), (4, 8), (2, 4, 3))), share=st.floats(0, 0.5))
def test_patterns_compose(case, share):
    """Single weights, then 2:4, then channels, then 2:4 again: each takes what the ones before left."""
    model, scores = case.build()
    alive = kept_places(model, {(layer, "weight"): torch.ones_like(layer.weight) for layer in model})
    for pattern, amount in (("weights", share), ("2:4", None), ("channels", share), ("2:4", 0.0)):
        attach(scores.masks(amount, pattern=pattern))
        now = kept_places(model)
        assert now <= alive
        alive = now
    assert all(
        int(layer.weight_mask.flatten()[places].sum()) <= 2
        for layer in model
        for places in blocks_of(layer.weight.shape, 4)
    )


@settings(max_examples=25)
@given(case=tied(shapes=((2, 4), (4, 8), (2, 4, 3))))
def test_a_pattern_once_made_stays(case):
    model, scores = case.build()
    attach(scores.masks(pattern="2:4"))
    before = kept_places(model)
    assert kept_places(model, scores.masks(pattern="2:4")) == before
    attach(scores.masks(1, pattern="channels"))
    assert kept_places(model) < before


@pytest.mark.parametrize(("one_shot", "arbiter"), [(disparse_static, "unanimous"), (disparse_pretrained, "sum")])
@pytest.mark.parametrize(("pattern", "amount"), [("2:4", None), ("1:3", None), ("2:4", 0.5), ("channels", 0.5)])
def test_in_one_call(one_shot, arbiter, pattern, amount):
    model = TwoHeads(width=12).eval()
    excluded = [] if pattern == "channels" else ["trunk.0"]
    scores = one_shot(model, digit_losses, digit_batches(), amount, pattern=pattern, exclude=excluded)
    fresh = TwoHeads(width=12).eval()
    fresh.load_state_dict({k.replace("_orig", ""): v for k, v in model.state_dict().items() if "_mask" not in k})
    again = score_tasks(fresh, digit_losses, digit_batches(), criterion=scores.criterion, exclude=excluded)
    masks = again.masks(amount, arbiter, pattern=pattern)
    for (module, _), key in zip(scores.parameters, again.parameters, strict=True):
        assert torch.equal(module.weight_mask.bool(), masks[key])


@pytest.mark.parametrize(("pattern", "unfit"), [("2:4", {"trunk.0"}), ("1:8", {"trunk.0", "trunk.3"})])
def test_what_does_not_fit_can_be_excluded_as_the_message_says(pattern, unfit):
    model = TwoHeads().eval()
    before = Snapshot(model)
    with pytest.raises(ValueError, match=rf"pattern: with '{pattern}' every input dimension .* must be div") as error:
        disparse_static(model, digit_losses, digit_batches(), pattern=pattern)
    before.check()
    said = re.search(r"exclude=\[(.*)\]$", str(error.value))[1]
    excluded = [name.strip("' ") for name in said.split(",")]
    assert {name.removesuffix(".weight") for name in excluded} >= unfit
    disparse_static(model, digit_losses, digit_batches(), pattern=pattern, exclude=excluded)
    assert prune.is_pruned(model)


def test_a_vector_has_no_channels():
    layer = nn.BatchNorm1d(4)
    scores = TaskScores(nn.Sequential(layer), {"a": {(layer, "weight"): torch.rand(4)}})
    with pytest.raises(ValueError, match=r"pattern: with 'channels' .* two dim.* exclude=\['0.weight'\]"):
        scores.masks(0.5, pattern="channels")


WRONG = {
    "pattern: must be a name, found int: 24; e.g. '2:4'": {"pattern": 24},
    "pattern: must be one of weights, channels, n:m .* found 'chanels'; did you mean 'channels'": {
        "pattern": "chanels", "amount": 0.5
    },
    "pattern: n of n:m must be from 1 to m, found '0:4'": {"pattern": "0:4"},
    "pattern: n of n:m must be from 1 to m, found '5:4'": {"pattern": "5:4"},
    "pattern: must be one of .* found '2:4:8'": {"pattern": "2:4:8"},
    "min_keep: must be left out with pattern='2:4', found 3; every block keeps 2": {"pattern": "2:4", "min_keep": 3},
    r"amount: must be left out with pattern='2:4' or be 0.5, found \{'shared': 0.5\}": {
        "pattern": "2:4", "amount": {"shared": 0.5}
    },
    "amount: must be left out with pattern='2:4' or be 0.5, found 0.6": {"pattern": "2:4", "amount": 0.6},
    "amount: must be left out with pattern='2:4' or be 0.5, found 7": {"pattern": "2:4", "amount": 7},
    "amount: must be a float .* found NoneType; 90 % is amount=0.9": {"pattern": "weights"},
    "amount: must be a float .* found NoneType; 90 % is": {"pattern": "channels"},
}  # fmt: skip


@pytest.mark.parametrize("message", sorted(WRONG))
@pytest.mark.parametrize("one_call", [False, True])
def test_a_wrong_choice_is_refused_and_nothing_changes(message, one_call):
    model = TwoHeads(width=4).eval()
    options = {"exclude": ["trunk.0"]}
    scores = score_tasks(model, digit_losses, digit_batches(), **options)
    before = Snapshot(model)
    call = functools.partial(disparse_static, model, digit_losses, digit_batches(), **options)
    with pytest.raises((TypeError, ValueError), match=message):
        (call if one_call else scores.masks)(**WRONG[message])
    before.check()


@pytest.mark.parametrize("amount", [None, 0.5, np.float32(0.5), np.float64(0.5), 6])
def test_an_amount_that_is_what_the_pattern_makes_is_accepted(amount):
    layer = nn.Linear(4, 3)
    scores = TaskScores(layer, {"a": {(layer, "weight"): torch.rand(3, 4)}})
    assert int(scores.masks(amount, pattern="2:4")[layer, "weight"].sum()) == 6


def test_the_amount_that_a_message_advises_is_accepted():
    layer = nn.Linear(3, 700_000)
    scores = TaskScores(layer, {"a": {(layer, "weight"): torch.rand(700_000, 3)}})
    with pytest.raises(ValueError, match="amount: must be left out with pattern='2:3' or be") as raised:
        scores.masks(0.5, pattern="2:3")
    advised = float(re.search("or be ([^,]*),", str(raised.value))[1])
    assert int(scores.masks(advised, pattern="2:3")[layer, "weight"].sum()) == 1_400_000


def test_a_pattern_may_be_the_object_itself():
    layer = nn.Linear(8, 3)
    scores = TaskScores(layer, {"a": {(layer, "weight"): torch.rand(3, 8)}})
    for name in ("2:4", " 2 : 4 "):
        assert resolve(name) == resolve("2:4")
        assert torch.equal(
            scores.masks(pattern=resolve(name))[layer, "weight"], scores.masks(pattern="2:4")[layer, "weight"]
        )


@settings(max_examples=15)
@given(case=tied(), share=st.floats(0, 1), min_keep=st.integers(0, 2))
def test_a_budget_goes_wherever_an_amount_goes(case, share, min_keep):
    floors = [min(min_keep, size) for size in case.oracle().sizes]
    assume(round(share * case.size) <= case.size - sum(floors))
    model, scores = case.build()
    plain = kept_places(model, scores.masks(share, min_keep=min_keep))
    assert kept_places(model, scores.masks(Budget(share, min_keep))) == plain


@pytest.mark.parametrize("one_shot", [disparse_static, disparse_pretrained])
def test_a_budget_in_one_call(one_shot):
    model, same = PartlyShared(), PartlyShared()
    same.load_state_dict(model.state_dict())
    one_shot(model, square_losses, vectors(), Budget(0.7, 3), exclude=["unused"])
    one_shot(same, square_losses, vectors(), 0.7, min_keep=3, exclude=["unused"])
    found, expected = model.state_dict(), same.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    with pytest.raises(ValueError, match="min_keep: must be left out beside a Budget, found 2; it holds its own"):
        one_shot(PartlyShared(), square_losses, vectors(), Budget(0.7), min_keep=2)


def test_a_budget_is_frozen_with_all_that_it_holds():
    amounts = {"shared": 0.5, "a": 0.1}
    budget = Budget(amounts, 2)
    amounts["a"] = 0.9
    assert budget.amount["a"] == 0.1
    with pytest.raises(TypeError):
        budget.amount["a"] = 0.9
    with pytest.raises(AttributeError):
        budget.min_keep = 0
    assert Budget(0.5, 2) == Budget(0.5, 2) != Budget(0.5, 3)


def test_no_amount_of_a_bound_class_goes_unchecked():
    layer = nn.Linear(4, 3)
    scores = TaskScores(layer, {"a": {(layer, "weight"): torch.rand(3, 4)}})
    before = Snapshot(layer)
    with pytest.raises(TypeError, match="amount: must be a float"):
        DiSparseStatic.bind(scores).apply(layer, "weight", None)
    before.check()


def test_in_a_block_of_equal_agreement_the_larger_weights_stay():
    _, scores = build({"a": {0: [1.0] * 8}}, [8])

    def indifferent(percentiles):
        return torch.full_like(percentiles[0], 0.5)

    weights = torch.tensor(weights_of([8])[0]).abs().tolist()
    expected = set()
    for block in (range(4), range(4, 8)):
        expected |= set(sorted(block, key=lambda place: (weights[place], place))[2:])
    mask = scores.masks(arbiter=indifferent, pattern="2:4")[scores.parameters[0]]
    assert set(mask.flatten().nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("min_keep", [2, 0.5])
def test_a_floor_of_channels_counts_channels(min_keep):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(3, 8, bias=False), nn.Linear(5, 6, bias=False)])
    table = {(model[0], "weight"): torch.rand(8, 3) / 1000, (model[1], "weight"): torch.rand(6, 5)}
    masks = TaskScores(model, {"a": table}).masks(7, pattern="channels", min_keep=min_keep)
    kept = [int(mask.all(1).sum()) for mask in masks.values()]
    floors = [2, 2] if min_keep == 2 else [4, 3]
    assert sum(kept) == 7
    assert all(own >= floor for own, floor in zip(kept, floors, strict=True))
    assert kept[0] == floors[0]  # the first would lose everything


def test_weights_that_are_gone_take_no_place_in_a_block():
    """Also where an own arbiter ranks the alive as low as can be."""
    model, scores = build({"a": {0: [1.0] * 4}}, [4])
    prune.custom_from_mask(model[0], "weight", torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    (mask,) = scores.masks(arbiter=lambda percentiles: 0 * percentiles.amax(0), pattern="2:4").values()
    assert mask.tolist() == [[True, True, False, False]]
