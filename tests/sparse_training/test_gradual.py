"""Gradual pruning: the schedule's total at every stage, scores made anew, and rewinding."""

import warnings
from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils import prune

from disparse_plugin import prunable_parameters, score_tasks
from disparse_plugin.sparse_training import (
    CubicSparsity,
    DiSparseScheduler,
    GradualPruning,
    RewindPoint,
    joint,
    load_checkpoint,
    save_checkpoint,
)
from networks import TwoHeads, digit_batches, digit_losses
from runs import Run, alive_count, alive_places, frozen_steps, given_losses, masked_model, masks_of, weights_total


class GradualRun(Run):
    """The training run of the other tests, with a scheduler that prunes."""

    scheduler_class = GradualPruning
    defaults = MappingProxyType({"amount": 0.9, "update_every": 2, "stop_at": 8})


def expected_pruned(fraction, model):
    return round(fraction * weights_total(model))


def test_every_stage_has_the_exact_total_of_the_cubic_schedule():
    run = GradualRun()
    total, found = weights_total(run.model), {}
    for step in range(12):
        for stage in run.train(1, first=step):
            found[stage.step] = total - alive_count(run.model)
            assert stage.sparsity == found[stage.step] / total
    assert found == {t: round((0.9 - 0.9 * (1 - t / 8) ** 3) * total) for t in (2, 4, 6, 8)}


@pytest.mark.parametrize("amount", [10, 777, np.int64(777)])
def test_a_whole_number_is_a_number_of_weights(amount):
    run = GradualRun(amount=amount)
    run.train(8)
    assert weights_total(run.model) - alive_count(run.model) == amount
    assert f"amount={int(amount)}," in repr(run.scheduler)


def test_one_is_one_weight_and_not_all():
    model = masked_model([[1.0, 2.0, 3.0]], [[True, True, True]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = given_losses({"a": {0: [1.0, 1.0, 1.0]}})
    pruning = GradualPruning(model, optimizer, losses, amount=1, stop_at=1)
    frozen_steps(pruning, optimizer)
    assert alive_places(model) == [{1, 2}]


def test_a_schedule_of_whole_numbers():
    run = GradualRun(amount=lambda step: 100 * step)
    run.train(8)
    assert weights_total(run.model) - alive_count(run.model) == 800


def test_a_window_of_one_step_is_a_single_cut():
    run = GradualRun(start_at=5, stop_at=5, amount=0.6)
    (stage,) = run.train(9)
    assert (stage.step, stage.sparsity) == (5, round(0.6 * 954) / 954)


def test_a_window_in_fractions_of_the_training():
    run = GradualRun(start_at=0.25, stop_at=0.5, total_steps=12, update_every=1)
    assert [stage.step for stage in run.train(12)] == [3, 4, 5, 6]
    run = GradualRun(start_at=0.29, stop_at=0.29, total_steps=100, amount=0.5)  # 0.29 * 100 is 28.999999999999996
    assert "start_at=29, stop_at=29" in repr(run.scheduler)


@pytest.mark.parametrize(("kind", "when", "step"), [(GradualPruning, 0.5, 20), (DiSparseScheduler, 0.75, 30)])
def test_when_the_last_change_is_where_nothing_is_said(kind, when, step):
    model = TwoHeads()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=rf"total_steps: .* found None with stop_at={when}; pass the op"):
        kind(model, optimizer, digit_losses, amount=0.5)
    assert not masks_of(model)
    assert f"stop_at={step}" in repr(kind(model, optimizer, digit_losses, amount=0.5, total_steps=40))


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 20), st.integers(0, 20), st.integers(0, 45))
def test_the_cubic_schedule_is_the_formula(one, other, start, length, step):
    initial, final = sorted([one, other])
    schedule = CubicSparsity(final, start + length, start, initial)
    if step < start:
        assert schedule(step) == pytest.approx(initial)
    elif step >= start + length:
        assert schedule(step) == final
    else:
        assert schedule(step) == pytest.approx(final + (initial - final) * (1 - (step - start) / length) ** 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"final": 0.5, "stop_at": 10, "initial": 0.7}, "final: must be in"),
        ({"final": 0.5, "stop_at": 10, "initial": -0.1}, "final: must be in"),
        ({"final": 0.5, "stop_at": 10, "start_at": -1}, "stop_at: must be at least start_at, and that at least 0"),
    ],
)
def test_a_cubic_schedule_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        CubicSparsity(**options)


def test_a_negative_fraction_is_refused():
    run = Run(drop_fraction=lambda step: -0.5)
    with pytest.raises(ValueError, match="drop_fraction: a schedule must return a fraction"):
        run.train(2)


def test_what_is_undone_is_said_until_the_last_stage():
    run = GradualRun()
    run.train(6)
    assert "stop_at=8 with 6 optimizer steps: 88.6% of the weights are masked, of 90.0%" in run.scheduler.unfinished()
    assert "pass e.g. stop_at=4" in run.scheduler.unfinished()
    run.train(2, first=6)
    assert run.scheduler.unfinished() is None


def test_its_options_are_shown():
    assert repr(GradualRun(arbiter="any").scheduler) == (
        "GradualPruning(update_every=2, start_at=0, stop_at=8, amount=0.9, "
        "criterion='layer_adaptive(damped(taylor, 0.25))', arbiter='any'; "
        "4 tensors, 0 steps completed)"
    )


def test_excluded_layers_are_neither_pruned_nor_counted():
    run = GradualRun(exclude=["heads.*"], amount=0.5)
    run.train(8)
    total = sum(layer.weight_orig.numel() for layer in (run.model.trunk[0], run.model.trunk[3]))
    assert alive_count(run.model) == total - round(0.5 * total)
    assert not any(prune.is_pruned(head) for head in run.model.heads.values())


@given(st.integers(0, 5), st.integers(1, 4), st.integers(6, 11))
def test_stages_come_at_the_promised_steps(start, every, stop):
    run = GradualRun(start_at=start, update_every=every, stop_at=stop, amount=lambda step: step / 40)
    stages = [stage.step for stage in run.train(12)]
    assert stages == sorted({t for t in range(1, stop) if t >= start and (t - start) % every == 0} | {stop})


def test_each_stage_is_one_shot_pruning_with_new_scores():
    run = GradualRun(stop_at=4)
    run.train(1)
    before = masks_of(run.model)
    run.model.eval()  # without dropout, scores can be made a second time
    batch = digit_batches(2)[1]
    run.optimizer.zero_grad()
    sum(digit_losses(run.model, batch).values()).backward()
    run.optimizer.step()
    scores = score_tasks(run.model, digit_losses, [batch], criterion="layer_adaptive(damped(taylor, 0.25))")
    target = expected_pruned(CubicSparsity(0.9, 4)(2), run.model)
    expected = scores.masks(target - sum(int((mask == 0).sum()) for mask in before.values()), "sum")
    assert run.scheduler.step(batch).step == 2
    for (module, name), mask in expected.items():
        assert torch.equal(getattr(module, f"{name}_mask") != 0, mask)


def test_every_tensor_keeps_a_floor_of_all_its_weights_through_all_stages():
    """Without the option, the same run goes below the floor."""
    kept, total = {}, weights_total(TwoHeads())
    for min_keep in (0, 0.15):
        run = GradualRun(min_keep=min_keep, amount=0.84)
        run.train(10)
        assert alive_count(run.model) == total - round(0.84 * total)
        kept[min_keep] = {
            name: (int(mask.sum()), round(0.15 * mask.numel())) for name, mask in masks_of(run.model).items()
        }
    assert any(count < floor for count, floor in kept[0].values())
    assert all(count >= floor for count, floor in kept[0.15].values())


def test_a_state_with_another_floor_is_refused():
    with_floor, without = GradualRun(min_keep=2), GradualRun()
    for one, other in [(with_floor, without), (without, with_floor)]:
        with pytest.raises(ValueError, match=r"found other min_keep (None|2) \(saved: (2|None)\)"):
            one.scheduler.load_state_dict(other.scheduler.state_dict())
    assert "min_keep" not in without.scheduler.state_dict()["settings"]
    with_floor.scheduler.load_state_dict(with_floor.scheduler.state_dict())


def test_a_floor_that_leaves_too_little_to_prune_is_refused():
    with pytest.raises(ValueError, match="min_keep: must leave enough to prune"):
        GradualRun(min_keep=0.3)
    with pytest.raises(ValueError, match="min_keep: must leave enough to prune"):
        GradualRun(min_keep=0.3, amount=0.5).scheduler.prune_to(0.9, digit_batches(1)[0])
    with pytest.raises(ValueError, match="min_keep: an int must be a count"):
        GradualRun(min_keep=-1)


def test_masked_weights_stay_masked_and_zero():
    run = GradualRun(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1))
    before = masks_of(run.model)
    for step in range(10):
        run.train(1, first=step)
        after = masks_of(run.model)
        for name, mask in after.items():
            assert bool((mask <= before[name]).all())
            module = run.model.get_submodule(name.removesuffix(".weight_mask"))
            assert bool((module.weight_orig[mask == 0] == 0).all())
        before = after


def test_it_starts_from_the_masks_of_a_pruned_model():
    model = TwoHeads()
    for module, name in prunable_parameters(model):
        prune.l1_unstructured(module, name, 0.3)
    before = masks_of(model)
    run = GradualRun(model=model)
    assert all(torch.equal(mask, before[name]) for name, mask in masks_of(model).items())
    run.train(8)
    assert weights_total(model) - alive_count(model) == expected_pruned(0.9, model)
    assert all(bool((mask <= before[name]).all()) for name, mask in masks_of(model).items())


def test_a_resumed_run_has_the_same_bits(tmp_path):
    whole = GradualRun()
    whole.train(9)
    first = GradualRun()
    first.train(5)
    save_checkpoint(tmp_path / "run.pt", **first.parts())
    second = GradualRun()
    load_checkpoint(tmp_path / "run.pt", **second.parts())
    second.train(4, first=5)
    expected, found = whole.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), torch.optim.Adam])
def test_iterative_magnitude_pruning_with_rewinding(make):
    """Masks by trained magnitudes, values from the rewinding point, for three rounds."""
    run = GradualRun(make, losses=joint(digit_losses), criterion="magnitude", amount=lambda step: 0.0, stop_at=1000)
    run.train(1)
    values = [p.detach().clone() for p in run.model.parameters()]
    moments = [
        {k: torch.as_tensor(v).clone() for k, v in run.optimizer.state[p].items()} for p in run.model.parameters()
    ]
    statistics = run.model.trunk[1].running_mean.clone()
    point = RewindPoint(run.model, run.optimizer)
    for amount in (0.5, 0.75, 0.9):
        run.train(3, first=1)
        run.scheduler.prune_to(amount, digit_batches(1)[0])
        alive = torch.cat([m.weight_orig[m.weight_mask != 0].abs() for m, _ in prunable_parameters(run.model)])
        assert alive.numel() == weights_total(run.model) - expected_pruned(amount, run.model)
        point.rewind()
        assert torch.equal(run.model.trunk[1].running_mean, statistics)
        masks = {id(m.weight_orig): m.weight_mask for m, _ in prunable_parameters(run.model)}
        for parameter, value, state in zip(run.model.parameters(), values, moments, strict=True):
            mask = masks.get(id(parameter), torch.ones_like(value))
            assert torch.equal(parameter, value * mask)
            for name, moment in run.optimizer.state[parameter].items():
                before = state[name] if moment.shape != mask.shape else state[name] * mask
                assert torch.equal(torch.as_tensor(moment), before)


def test_magnitude_pruning_of_the_joint_task_keeps_the_largest():
    run = GradualRun(losses=joint(digit_losses), criterion="magnitude", amount=lambda step: 0.0)
    run.train(1)
    values = torch.cat([m.weight_orig.detach().abs().flatten() for m, _ in prunable_parameters(run.model)])
    run.scheduler.prune_to(0.6, digit_batches(1)[0])
    kept = torch.cat([m.weight_mask.flatten() != 0 for m, _ in prunable_parameters(run.model)])
    assert values[kept].min() >= values[~kept].max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amount": 1.5}, "amount: a float must be a fraction"),
        ({"amount": 9}, "amount: 9 is a number of weights, 0.94 % of 954; for 9 % pass 0.09"),
        ({"start_at": 9}, "stop_at: must be at least start_at"),
        ({"start_at": -1, "amount": lambda step: 0.5}, "start_at: must be at least 0"),
        ({"start_at": 9, "amount": lambda step: 0.5}, "stop_at: must be at least start_at"),
        ({"stop_at": 0}, "stop_at: must be at least 1"),
        ({"criterion": "best"}, "criterion: must be one of"),
    ],
)
def test_bad_options_leave_the_model_dense(options, message):
    model = TwoHeads()
    with pytest.raises(ValueError, match=message):
        GradualRun(model=model, **options)
    assert not masks_of(model)


def test_what_no_task_reaches_is_told_at_the_first_stage():
    """All that is masked is then taken from the others."""
    run = GradualRun(losses=lambda model, batch: {"a": digit_losses(model, batch)["a"]}, amount=0.5)
    with pytest.warns(UserWarning, match="1 of 4 are reached by no task's loss, .*: heads.b.weight") as told:
        run.train(8)
    assert len(told) == 1
    assert bool(run.model.heads["b"].weight_mask.all())


@pytest.mark.filterwarnings("ignore:parameters. 1 of 4 are reached")
def test_more_than_the_tasks_reach_is_refused_with_what_to_exclude():
    run = GradualRun(losses=lambda model, batch: {"a": digit_losses(model, batch)["a"]}, amount=0.999)
    with pytest.raises(ValueError, match=r"amount: .* reaches heads.b.weight: pass exclude=\['heads.b.weight'\]"):
        run.train(10)
    assert bool(run.model.heads["b"].weight_mask.all())


@pytest.mark.parametrize("make", [GradualRun, Run])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"grad_scaler": torch.amp.GradScaler}, "grad_scaler: .* found the class GradScaler"),
        ({"grad_scaler": 8.0}, "grad_scaler: .* found float"),
        ({"losses": {"a": 1.0}}, "losses: must be a function of model and batch .* found dict"),
        ({"update_every": 2.0}, "update_every: must be an int, found float"),
    ],
)
def test_what_is_of_the_wrong_type_is_found_before_anything_changes(make, given, message):
    model = TwoHeads()
    with pytest.raises(TypeError, match=message):
        make(model=model, **given)
    assert not masks_of(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_bad_schedule_or_amount_is_an_error_and_nothing_changes():
    run = GradualRun(amount=lambda step: 2.0)
    with pytest.raises(ValueError, match="amount: a schedule must return a fraction"):
        run.train(2)
    with pytest.raises(TypeError, match="batches: at least one"):
        run.scheduler.prune_to(0.5)
    with pytest.raises(ValueError, match="amount: a float must be a fraction"):
        run.scheduler.prune_to(1.5, digit_batches(1)[0])
    assert alive_count(run.model) == weights_total(run.model)


@pytest.mark.parametrize("apart", [True, False])
def test_a_stage_that_a_task_has_no_say_in_is_told(apart):
    """With a task per batch, an even ``update_every`` shows the same one to every stage."""

    def losses(model, batch):
        names, digits = batch
        return {name: loss for name, loss in digit_losses(model, digits).items() if name in names}

    run = GradualRun(losses=losses, amount=0.3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, digits in enumerate(digit_batches(4)):
            batch = (["a", "b"][step % 2] if apart else "ab", digits)
            run.optimizer.zero_grad()
            sum(losses(run.model, batch).values()).backward()
            run.optimizer.step()
            run.scheduler.step(batch)
    said = [str(each.message) for each in caught if str(each.message).startswith("batches: must hold every task")]
    assert len(said) == apart
    assert all("found none of a: b alone decide; pass one batch of each task" in text for text in said)


def test_rewinding_finds_buffers_that_were_replaced():
    class Centred(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)
            self.register_buffer("centre", torch.zeros(4))
            self.register_buffer("later", None)

        def forward(self, x):
            self.centre = 0.9 * self.centre + 0.1 * x.mean(0).detach()
            self.later = self.centre + 1
            return self.norm(self.layer(x - self.centre))

    model = Centred()
    point = RewindPoint(model, torch.optim.SGD(model.parameters(), 0.1))
    model.double().float()
    model(torch.ones(3, 4))
    point.rewind()
    assert torch.equal(model.centre, torch.zeros(4))
    assert torch.equal(model.norm.running_mean, torch.zeros(4))
    assert model.later is None
