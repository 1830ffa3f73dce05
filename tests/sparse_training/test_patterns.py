"""Patterns in training: n of every m at every step, and whole channels or n:m reached in stages."""

from types import MappingProxyType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from disparse_plugin import at_least, disparse_static, score_tasks
from disparse_plugin.sparse_training import DiSparseScheduler, GradualPruning
from networks import TwoHeads, digit_batches, digit_losses
from oracles.agreement import ARBITERS, Layout, ordered_positions
from runs import Run, alive_count, alive_places, frozen_steps, given_losses, masked_model, masks_of, weights_total

BY_NAME = {"at_least(2)": at_least(2), "at_least(3)": at_least(3)}
# Means of equal sums differ in their last bit, where the oracle's fractions are equal; the others only pick.
EXACT = sorted(ARBITERS.keys() - {"mean", "majority"})
SMALL = st.integers(-6, 6).map(float)


def blocks_of(size, m):
    return [range(start, start + m) for start in range(0, size, m)]


@st.composite
def layers_in_blocks(draw, dense=False):
    """Weights and gradients of one or two layers, and masks that keep n of every m (all of them, if dense)."""
    m = draw(st.integers(1, 4))
    n = draw(st.integers(1, m))
    sizes = [m * blocks for blocks in draw(st.lists(st.integers(1, 5), min_size=1, max_size=2))]
    weights = [draw(st.lists(SMALL, min_size=size, max_size=size)) for size in sizes]
    alive = []
    for size in sizes:
        kept = {i for block in blocks_of(size, m) for i in draw(st.permutations(block))[: m if dense else n]}
        alive.append([i in kept for i in range(size)])
    gradients = {
        task: {i: draw(st.lists(SMALL, min_size=size, max_size=size)) for i, size in enumerate(sizes)}
        for task in draw(st.sampled_from([["a"], ["a", "b"], ["a", "b", "c"]]))
    }
    return n, m, weights, alive, gradients


def exchanged(n, m, row, mask, rows, fraction, arbiter, regrow):
    """The exchange in one layer, block by block, in plain Python."""
    kept, blocks = {i for i, here in enumerate(mask) if here}, blocks_of(len(row), m)
    most = min(n, m - n)
    count = min(round(fraction * len(kept)), most * len(blocks))
    smallest = []
    for block in blocks:
        own = [i for i in block if i in kept]
        smallest += [own[j] for j in ordered_positions([abs(row[i]) for i in own])[:most]]
    smallest.sort()
    dropped = {smallest[j] for j in ordered_positions([abs(row[i]) for i in smallest])[:count]}
    places = [i for i in range(len(row)) if i not in kept or (regrow and i in dropped)]
    tables = {t: {0: [abs(g[i]) for i in places]} for t, g in rows.items() if any(g[i] for i in places)}
    if count == 0 or not tables:
        return kept
    wanted = [places[j] for _, j in reversed(Layout(tables, [len(places)]).by_agreement(arbiter))]
    grown = set()
    for block in blocks:
        grown |= set([i for i in wanted if i in block][: len(dropped & set(block))])
    return (kept - dropped) | grown


@given(layers_in_blocks(), st.floats(0, 1), st.sampled_from(EXACT), st.booleans())
def test_an_update_in_blocks_is_the_definition(layout, fraction, arbiter, regrow):
    n, m, weights, alive, gradients = layout
    model = masked_model(weights, alive)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = DiSparseScheduler(
        model,
        optimizer,
        given_losses(gradients),
        pattern=f"{n}:{m}",
        distribution="existing",
        update_every=1,
        stop_at=2,
        drop_fraction=lambda step: fraction,
        arbiter=BY_NAME.get(arbiter, arbiter),
        regrow_dropped=regrow,
    )
    frozen_steps(scheduler, optimizer)
    assert alive_places(model) == [
        exchanged(n, m, row, mask, {t: g[i] for t, g in gradients.items()}, fraction, arbiter, regrow)
        for i, (row, mask) in enumerate(zip(weights, alive, strict=True))
    ]


@given(layers_in_blocks(dense=True), st.sampled_from(EXACT), st.lists(st.floats(0, 1), max_size=3))
def test_the_way_to_blocks_is_the_definition(layout, arbiter, shares):
    """Stage by stage: of all that is not among the n highest of its block, the lowest."""
    n, m, weights, alive, gradients = layout
    model = masked_model(weights, alive)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruning = GradualPruning(
        model,
        optimizer,
        given_losses(gradients),
        pattern=f"{n}:{m}",
        stop_at=1,
        criterion="gradient",
        arbiter=BY_NAME.get(arbiter, arbiter),
    )
    kept = [set(range(len(row))) for row in weights]
    total = sum(map(len, kept))
    for share in [*sorted(shares), 1.0]:
        amount = share * (1 - n / m)
        pruning.prune_to(amount, None)
        count = round(amount * total) - (total - sum(map(len, kept)))
        kept = staged(n, m, weights, kept, gradients, arbiter, count)
        assert alive_places(model) == kept
    assert all(len(places & set(block)) == n for places in kept for block in blocks_of(max(places) // m * m + m, m))


def test_between_equals_on_the_way_the_smaller_weight_goes():
    """Two tasks rank the first and the third weight in turn second of four, so that both have the same agreement."""
    model = masked_model([[5.0, 3.0, 1.0, 3.0]], [[True] * 4])
    losses = given_losses({"a": {0: [1.0, 9.0, 2.0, 8.0]}, "b": {0: [2.0, 9.0, 1.0, 8.0]}})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruning = GradualPruning(model, optimizer, losses, pattern="1:2", stop_at=1, criterion="gradient")
    pruning.prune_to(0.25, None)
    assert alive_places(model) == [{0, 1, 3}]


def staged(n, m, weights, kept, gradients, arbiter, count):
    places = [sorted(own) for own in kept]
    tables = {t: {p: [abs(g[p][i]) for i in own] for p, own in enumerate(places)} for t, g in gradients.items()}
    magnitudes = [[weights[p][i] for i in own] for p, own in enumerate(places)]
    ordered = [
        (p, places[p][j]) for p, j in Layout(tables, [len(own) for own in places], magnitudes).by_agreement(arbiter)
    ]
    free = []
    for p, i in ordered:
        rivals = [other for other in ordered if other[0] == p and other[1] // m == i // m]
        if (p, i) in rivals[: max(0, len(rivals) - n)]:
            free.append((p, i))
    gone = set(free[:count])
    return [{i for i in own if (p, i) not in gone} for p, own in enumerate(places)]


def counts_in_blocks(mask, m):
    """How many of every m inputs are alive; written without the package's own reshaping."""
    inputs = mask.transpose(0, 1).reshape(mask.shape[1], -1) != 0
    return {
        int(inputs[start : start + m].sum(0)[j]) for start in range(0, len(inputs), m) for j in range(inputs.shape[1])
    }


WIDE = MappingProxyType({"exclude": ["trunk.0"], "pattern": "2:4", "amount": None})


@pytest.mark.parametrize("criterion", ["gradient", "random"])
def test_every_block_keeps_n_at_every_step(criterion):
    run = Run(model=TwoHeads(width=8), criterion=criterion, stop_at=16, **WIDE)
    start = masks_of(run.model)
    for step in range(12):
        run.train(1, first=step)
        assert all(counts_in_blocks(mask, 4) == {2} for mask in masks_of(run.model).values())
    assert not all(torch.equal(mask, start[name]) for name, mask in masks_of(run.model).items())


def test_the_first_masks_are_drawn_by_the_seed_and_reach_every_place():
    seen = torch.zeros(8)
    for seed in range(60):
        model = nn.ModuleDict({"a": nn.Linear(8, 1)})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        DiSparseScheduler(model, optimizer, given_losses({}), pattern="1:4", stop_at=2, seed=seed)
        seen += model["a"].weight_mask[0]
    assert int(seen.sum()) == 120
    assert bool((seen > 5).all())


def test_it_goes_on_from_blocks_that_static_pruning_chose():
    model = TwoHeads(width=8)
    disparse_static(model, digit_losses, digit_batches(2), pattern="2:4", exclude=["trunk.0"])
    before = masks_of(model)
    run = Run(model=model, distribution="existing", **WIDE)
    assert all(torch.equal(mask, before[name]) for name, mask in masks_of(model).items())
    run.train(4)
    assert all(counts_in_blocks(mask, 4) == {2} for mask in masks_of(model).values())


class Gradual(Run):
    scheduler_class = GradualPruning
    defaults = MappingProxyType({"update_every": 2, "stop_at": 8})


def test_gradually_every_total_is_exact_and_the_end_is_the_pattern():
    run = Gradual(model=TwoHeads(width=8), **WIDE)
    total = sum(layer.weight_orig.numel() for layer in (run.model.trunk[3], *run.model.heads.values()))
    for step in range(10):
        for stage in run.train(1, first=step):
            assert total - alive_count(run.model) == round((0.5 - 0.5 * (1 - stage.step / 8) ** 3) * total)
            assert all(min(counts_in_blocks(mask, 4)) >= 2 for mask in masks_of(run.model).values())
    assert all(counts_in_blocks(mask, 4) == {2} for mask in masks_of(run.model).values())


def test_gradually_from_blocks_with_fewer():
    model = TwoHeads(width=8)
    mask = torch.ones(3, 128)
    mask[:, :4] = 0
    prune.custom_from_mask(model.heads["a"], "weight", mask)
    Gradual(model=model, **WIDE).train(8)
    assert counts_in_blocks(model.heads["a"].weight_mask, 4) == {0, 2}
    assert counts_in_blocks(model.trunk[3].weight_mask, 4) == {2}


def test_channels_are_masked_stage_by_stage_as_by_scoring_anew():
    run = Gradual(pattern="channels", amount=0.5, exclude=["heads.*"], stop_at=4, min_keep=2)

    def channels():
        return sum(int(layer.weight_mask.flatten(1).any(1).sum()) for layer in (run.model.trunk[0], run.model.trunk[3]))

    assert channels() == 12
    run.model.eval()  # without dropout, scores can be made a second time
    for step, batch in enumerate(digit_batches(4)):
        run.optimizer.zero_grad()
        sum(digit_losses(run.model, batch).values()).backward()
        run.optimizer.step()
        scores = score_tasks(
            run.model, digit_losses, [batch], criterion="layer_adaptive(damped(taylor, 0.25))", exclude=["heads.*"]
        )
        target = 12 - round((0.5 - 0.5 * (1 - (step + 1) / 4) ** 3) * 12)
        expected = scores.masks(channels() - target, "sum", pattern="channels", min_keep=2)
        if run.scheduler.step(batch) is None:
            continue
        assert channels() == target
        for (module, name), mask in expected.items():
            assert torch.equal(getattr(module, f"{name}_mask") != 0, mask)
    assert target == 6


@pytest.mark.parametrize("kind", [Run, Gradual])
def test_a_resumed_run_goes_on_and_another_pattern_is_refused(kind):
    whole, first, second = (kind(model=TwoHeads(width=8), **WIDE) for _ in range(3))
    whole.train(8)
    first.train(4)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.scheduler.load_state_dict(first.scheduler.state_dict())
    torch.manual_seed(0)
    assert masks_of(first.model).keys() == masks_of(second.model).keys()
    assert all(torch.equal(mask, masks_of(first.model)[name]) for name, mask in masks_of(second.model).items())
    other = kind(model=TwoHeads(width=8), **{**WIDE, "pattern": "1:2"})
    with pytest.raises(ValueError, match=r"found other .*pattern '1:2' \(saved: '2:4'\)"):
        other.scheduler.load_state_dict(first.scheduler.state_dict())


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            Run,
            {"pattern": "channels"},
            "pattern: must be 'weights' or n:m where weights drop and grow, found 'channels'",
        ),
        (Run, {"pattern": "2:4", "amount": None}, r"leave out what does not fit: exclude=\['trunk.0.weight'"),
        (Run, {**WIDE, "amount": 0.8}, "amount: must be left out with pattern='2:4' or be 0.5, found 0.8"),
        (Run, {**WIDE, "distribution": "erk"}, "distribution: must be left out with pattern='2:4', found 'erk'"),
        (Run, {**WIDE, "exempt": ["heads.a.weight"]}, "exempt: must be left out with pattern='2:4'"),
        (Run, {"pattern": "5:4"}, "pattern: n of n:m must be from 1 to m"),
        (Gradual, {**WIDE, "amount": 0.8}, "amount: must be left out with pattern='2:4' or be 0.5, found 0.8"),
        (Gradual, {**WIDE, "amount": lambda step: 0.5}, "amount: must be left out with pattern='2:4'"),
        (Gradual, {**WIDE, "min_keep": 2}, "min_keep: must be left out with pattern='2:4'"),
        (Gradual, {"pattern": "2:4"}, r"leave out what does not fit: exclude=\['trunk.0.weight'"),
    ],
)
@pytest.mark.filterwarnings("ignore:exempt:DeprecationWarning")
def test_what_a_pattern_cannot_do_is_refused_by_name(make, options, message):
    model = TwoHeads(width=8)
    with pytest.raises(ValueError, match=message):
        make(model=model, **options)
    assert not masks_of(model)


def test_existing_masks_that_are_not_in_blocks_are_refused():
    model = TwoHeads(width=8)
    for layer in (model.trunk[3], *model.heads.values()):
        prune.l1_unstructured(layer, "weight", 0.5)
    with pytest.raises(ValueError, match=r"distribution: every block must have 2 of 4 alive .* of trunk.3.weight that"):
        Run(model=model, distribution="existing", **WIDE)


def test_a_dense_model_is_not_in_blocks():
    with pytest.raises(ValueError, match="distribution: every block must have 2 of 4 alive"):
        Run(model=TwoHeads(width=8), distribution="existing", **WIDE)


def test_more_than_the_pattern_removes_is_refused():
    run = Gradual(model=TwoHeads(width=8), **WIDE)
    with pytest.raises(ValueError, match=r"amount: must be at most 0.5 with pattern='2:4'"):
        run.scheduler.prune_to(0.6, digit_batches(1)[0])
    assert alive_count(run.model) == weights_total(run.model) - run.model.trunk[0].weight.numel()


def test_an_amount_is_needed_without_blocks():
    with pytest.raises(TypeError, match=r"amount: must be a float \(fraction\) or an int \(count\), found NoneType"):
        Gradual()


def test_no_block_falls_below_n_where_a_stage_reaches_too_little():
    """The batch has no labels for one task, so what its head should lose is not there to be taken."""
    weights = [[float(i) for i in range(1, 9)], [float(i) for i in range(1, 9)]]
    model = masked_model(weights, [[True] * 8, [True] * 8])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = given_losses({"a": {0: [1.0] * 8}})
    pruning = GradualPruning(model, optimizer, losses, pattern="2:4", criterion="taylor", update_every=1, stop_at=2)
    with pytest.warns(UserWarning, match="reached by no task"):
        frozen_steps(pruning, optimizer)  # 7 of 16 are due; of the layer that is reached, 4 can go
    assert alive_places(model) == [{2, 3, 6, 7}, set(range(8))]
