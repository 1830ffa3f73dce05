"""One update against the definition: what is dropped, what grows, and that nothing else changes."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from disparse_plugin import at_least
from disparse_plugin.agreement.ranking import SMALLEST, highest
from disparse_plugin.arbiters import unanimous
from disparse_plugin.sparse_training import DiSparseScheduler, at_once, joint
from disparse_plugin.sparse_training.at_once import Layer
from disparse_plugin.sparse_training.exchange import Exchange, most_wanted, random_scores, smallest, wanted_by_any
from oracles.agreement import ARBITERS, Layout, ordered_positions
from runs import alive_places, frozen_steps, given_losses, masked_model

BY_NAME = {"at_least(2)": at_least(2), "at_least(3)": at_least(3)}
SMALL = st.integers(-6, 6).map(float)


@st.composite
def layers(draw):
    """Weights, masks and, for up to three tasks, gradients of one to three layers; ties and zeros are frequent."""
    sizes = draw(st.lists(st.integers(2, 14), min_size=1, max_size=3))
    weights = [draw(st.lists(SMALL, min_size=n, max_size=n)) for n in sizes]
    alive = [draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any)) for n in sizes]
    tasks = draw(st.sampled_from([["a"], ["a", "b"], ["a", "b", "c"]]))
    gradients = {}
    for task in tasks:
        reached = draw(st.sets(st.sampled_from(range(len(sizes))), min_size=1))
        rows = {i: st.lists(SMALL, min_size=sizes[i], max_size=sizes[i]) | st.just([0.0] * sizes[i]) for i in reached}
        gradients[task] = {i: draw(rows[i]) for i in sorted(reached)}
    return weights, alive, gradients


def expected_masks(weights, alive, gradients, fraction, arbiter, regrow):
    """The update, layer by layer, in plain Python."""
    result = []
    for layer, (row, mask) in enumerate(zip(weights, alive, strict=True)):
        kept = [i for i, here in enumerate(mask) if here]
        count = min(round(fraction * len(kept)), len(row) - len(kept))
        smallest = [kept[i] for i in ordered_positions([abs(row[j]) for j in kept])[:count]]
        places = [i for i in range(len(row)) if not mask[i] or (regrow and i in smallest)]
        tables = {
            task: {0: [abs(rows[layer][i]) for i in places]}
            for task, rows in gradients.items()
            if layer in rows and any(rows[layer][i] for i in places)
        }
        if count == 0 or not tables:
            result.append(set(kept))
            continue
        grown = {places[j] for _, j in Layout(tables, [len(places)]).kept(len(places) - count, arbiter)}
        result.append((set(kept) - set(smallest)) | grown)
    return result


def updated(weights, alive, gradients, **options):
    model = masked_model(weights, alive)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"update_every": 1, "stop_at": 2, "distribution": "existing", **options}
    losses = options.pop("losses", given_losses(gradients))
    scheduler = DiSparseScheduler(model, optimizer, losses, **options)
    (update,) = frozen_steps(scheduler, optimizer)
    return model, update


@given(layers(), st.floats(0, 1), st.sampled_from(sorted(ARBITERS)), st.booleans())
def test_an_update_is_the_definition(layout, fraction, arbiter, regrow):
    model, _ = updated(
        *layout,
        drop_fraction=lambda step: fraction,
        arbiter=BY_NAME.get(arbiter, arbiter),
        regrow_dropped=regrow,
    )
    assert alive_places(model) == expected_masks(*layout, fraction, arbiter, regrow)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("regrow", [False, True])
def test_a_task_may_ask_by_scores_below_zero(monkeypatch, at_once, regrow):
    monkeypatch.setattr(Layer, "fits", at_once)
    weight, alive = torch.tensor([1.0, 2, 0, 0, 0]), torch.tensor([True, True, False, False, False])
    scores = {"a": torch.tensor([0.0, 0, 0, 0, -2])}
    (mask,) = Exchange(0.5, unanimous, ["a"], regrow).new_masks([weight], [alive], [scores])
    assert mask.nonzero().flatten().tolist() == [1, 3]


@pytest.mark.parametrize("most", [1, 20, 1000])
@given(layers(), st.floats(0, 1), st.booleans())
def test_many_layers_at_once_are_the_definition_too(most, layout, fraction, regrow):
    """As an accelerator does it: few layers together, or all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(at_once.Layer, "fits", True)
        patch.setattr(at_once, "TOGETHER", most)
        model, _ = updated(*layout, drop_fraction=lambda step: fraction, regrow_dropped=regrow)
    assert alive_places(model) == expected_masks(*layout, fraction, "unanimous", regrow)


@given(st.integers(2, 40), st.integers(2, 4), st.integers(0, 2**20), st.booleans())
def test_what_grows_is_the_union_of_the_tasks_tops(size, tasks, seed, ties):
    """The largest rank of any task decides, not that of the last; with and without ties, of any sign."""
    generator = torch.Generator().manual_seed(seed)
    rows = {str(task): torch.randn(size, generator=generator) for task in range(tasks)}
    rows = {task: (row * 2).round() if ties else row for task, row in rows.items()}
    oracle = Layout({task: {0: row.tolist()} for task, row in rows.items()}, [size])
    for count in (1, size // 2, size - 1):
        expected = {place for _, place in oracle.kept(size - count, "unanimous")}
        assert set(wanted_by_any(rows, count).nonzero().flatten().tolist()) == expected
        assert set(most_wanted(rows, list(rows), unanimous, count).nonzero().flatten().tolist()) == expected


def test_weights_that_differ_in_double_precision_only():
    weights = torch.tensor([1.0 + 2e-12, 1.0 + 1e-12, 1.0], dtype=torch.float64)
    assert smallest(weights, torch.ones(3, dtype=torch.bool), 1).tolist() == [False, False, True]
    assert smallest(weights, torch.tensor([True, True, False]), 1).tolist() == [False, True, False]


def test_random_scores_do_not_depend_on_the_default_type():
    drawn = []
    before = torch.get_default_dtype()
    for dtype in (torch.float32, torch.float16, torch.float64):
        torch.set_default_dtype(dtype)
        (rows,) = random_scores([torch.ones(9)], torch.Generator().manual_seed(0))
        drawn.append(rows["random"].tolist())
        torch.set_default_dtype(before)
    assert drawn[0] == drawn[1] == drawn[2]


def test_no_random_score_is_zero(monkeypatch):
    """A task whose scores are all zero asks for nothing."""
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.zeros(shape))
    (rows,) = random_scores([torch.ones(3)], torch.Generator())
    assert bool((rows["random"] > 0).all())


@given(layers(), st.floats(0, 1))
def test_counts_are_constant_and_what_grows_was_masked(layout, fraction):
    weights, alive, _ = layout
    model, update = updated(*layout, drop_fraction=lambda step: fraction)
    for row, mask, after, exchanged in zip(weights, alive, alive_places(model), update.exchanged.values(), strict=True):
        before = {i for i, here in enumerate(mask) if here}
        assert len(after) == len(before)
        assert len(after - before) == len(before - after) == exchanged
        if before & after and before - after:
            assert max(abs(row[i]) for i in before - after) <= min(abs(row[i]) for i in before & after)


@given(layers(), st.floats(0.1, 1))
def test_the_scale_of_a_loss_changes_nothing(layout, fraction):
    weights, alive, gradients = layout
    factors = dict(zip(gradients, (1.0, 1024.0, 2.0**-9), strict=False))
    scaled = {
        task: {i: [factors[task] * g for g in row] for i, row in rows.items()} for task, rows in gradients.items()
    }
    one, _ = updated(weights, alive, gradients, drop_fraction=lambda step: fraction)
    other, _ = updated(weights, alive, scaled, drop_fraction=lambda step: fraction)
    assert alive_places(one) == alive_places(other)


@given(layers(), st.floats(0.1, 1))
def test_rigl_is_the_joint_task(layout, fraction):
    weights, alive, gradients = layout
    summed = {}
    for rows in gradients.values():
        for layer, row in rows.items():
            summed[layer] = [x + y for x, y in zip(row, summed.get(layer, [0.0] * len(row)), strict=True)]
    model, _ = updated(
        weights, alive, gradients, losses=joint(given_losses(gradients)), drop_fraction=lambda step: fraction
    )
    assert alive_places(model) == expected_masks(weights, alive, {"joint": summed}, fraction, "unanimous", False)


@given(layers(), st.floats(0, 1))
def test_set_grows_at_random_and_needs_no_gradients(layout, fraction):
    weights, alive, _ = layout

    def forbidden(model, batch):
        raise AssertionError("random growth has no use for losses")

    results = []
    for seed in (0, 0):
        model, _ = updated(
            *layout, losses=forbidden, criterion="random", seed=seed, drop_fraction=lambda step: fraction
        )
        results.append(alive_places(model))
        for row, mask, after in zip(weights, alive, results[-1], strict=True):
            kept = [i for i, here in enumerate(mask) if here]
            count = min(round(fraction * len(kept)), len(row) - len(kept))
            smallest = {kept[i] for i in ordered_positions([abs(row[j]) for j in kept])[:count]}
            assert after & set(kept) == set(kept) - smallest
            assert len(after) == len(kept)
    assert results[0] == results[1]


def test_set_reaches_every_masked_weight_equally_often():
    counts = torch.zeros(10)
    for seed in range(300):
        model, _ = updated(
            [[1.0] * 10],
            [[True] * 5 + [False] * 5],
            {"a": {0: [0.0] * 10}},
            criterion="random",
            seed=seed,
            drop_fraction=lambda step: 0.4,
        )
        counts += model.layers[0].weight_mask[0]
    assert counts[:2].tolist() == [0, 0]
    assert counts[2:5].tolist() == [300] * 3
    assert counts[5:].sum() == 600
    assert (counts[5:] - 120).abs().max() < 50  # five standard deviations


@pytest.mark.parametrize(("alive", "options"), [([True, True], {}), ([True, False], {"drop_fraction": 0.0})])
def test_nothing_to_drop_needs_no_scores(alive, options):
    """One forward shows at the first step what can be masked; the update asks for no other, and for no gradient."""
    calls = []

    def watched(model, batch):
        calls.append(batch)
        return {}

    _, update = updated([[1.0, 2.0]], [alive], {}, losses=watched, **options)
    assert set(update.exchanged.values()) == {0}
    assert len(calls) == 1


def test_a_task_without_gradient_in_a_layer_has_no_wish_there():
    """A head whose labels are missing may return a zero loss: it must not vote by the order of the entries."""
    gradients = {"a": {0: [0.0, 0.0, 3.0, 2.0, 1.0, 0.5]}, "b": {0: [0.0] * 6}}
    model, _ = updated([[1.0, 2.0] + [0.0] * 4], [[True, True] + [False] * 4], gradients, drop_fraction=lambda t: 0.5)
    assert alive_places(model) == [{1, 2}]


def test_a_custom_arbiter_sees_every_task_and_nan_where_one_does_not_reach():
    seen = []

    def second_task(percentiles):
        seen.append(percentiles.clone())
        return percentiles[1].nan_to_num(0.0)

    gradients = {"a": {0: [0.0, 1.0, 2.0], 1: [0.0, 2.0, 1.0]}, "b": {0: [0.0, 2.0, 1.0]}}
    alive = [[True, False, False]] * 2
    model, _ = updated([[1.0, 0.0, 0.0]] * 2, alive, gradients, arbiter=second_task, drop_fraction=lambda step: 1.0)
    assert alive_places(model) == [{1}, {2}]
    assert [row.shape for row in seen] == [(2, 2)] * 2
    assert seen[1][1].isnan().all()


@given(st.integers(1, 40), st.integers(2, 9), st.integers(1, 60))
def test_updates_come_every_so_many_steps_until_the_end(steps, every, stop):
    model = masked_model([[3.0, 2.0, 1.0, 0.0]], [[True, True, False, False]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = DiSparseScheduler(
        model,
        optimizer,
        given_losses({"a": {0: [1.0, 2.0, 3.0, 4.0]}}),
        distribution="existing",
        update_every=every,
        stop_at=stop,
    )
    updates = [update for update in frozen_steps(scheduler, optimizer, [None] * steps) if update is not None]
    assert [update.step for update in updates] == [t for t in range(1, steps + 1) if t % every == 0 and t < stop]
    for update in updates:
        cosine = 0.25 * (1 + torch.cos(torch.tensor(torch.pi * update.step / stop, dtype=torch.float64)))
        assert update.drop_fraction == pytest.approx(float(cosine))


@given(st.integers(0, 2**32 - 1), st.integers(1, 3000), st.integers(1, 4000))
def test_the_highest_of_many_values_are_those_of_a_stable_sort(seed, count, distinct):
    """Large enough that a sample decides where to look; ties go to the last, zeros and infinities are frequent."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(distinct, (SMALLEST + seed % 100,), generator=generator).float()
    values[torch.rand(values.shape, generator=generator) < 0.3] = -torch.inf
    assert highest(values, count).tolist() == sorted(values.argsort(stable=True)[-count:].tolist())


@pytest.mark.filterwarnings("ignore:parameters. .* are reached by no task:UserWarning")
@given(layers())
def test_many_updates_keep_every_count(layout):
    weights, alive, gradients = layout
    assume(len(gradients) > 1)
    model = masked_model(weights, alive)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = DiSparseScheduler(
        model, optimizer, given_losses(gradients), distribution="existing", update_every=1, stop_at=9
    )
    before = [len(places) for places in alive_places(model)]
    for _ in range(8):
        frozen_steps(scheduler, optimizer)
        assert [len(places) for places in alive_places(model)] == before
