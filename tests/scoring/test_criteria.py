"""Criteria on their own, against the numpy definitions, and by the names that reports print."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disparse_plugin import criteria, layer_adaptive, score_tasks
from networks import TwoHeads, digit_batches, digit_losses
from oracles.agreement import lamp, ordered_positions


@given(st.lists(st.floats(-1e6, 1e6, width=32).map(lambda x: round(x, 2)), min_size=1, max_size=40))
def test_lamp_is_its_definition(values):
    found = criteria.lamp_scores(torch.tensor(values, dtype=torch.float64))
    np.testing.assert_allclose(found, lamp(values), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_lamp_survives_tiny_and_huge_scores(scale):
    values = torch.rand(100) + 0.01
    torch.testing.assert_close(criteria.lamp_scores(values * scale), criteria.lamp_scores(values), rtol=1e-4, atol=0)


def test_lamp_of_nothing_and_of_zeros():
    assert criteria.lamp_scores(torch.zeros(0)).numel() == 0
    assert torch.equal(criteria.lamp_scores(torch.zeros(3)), torch.zeros(3))


def test_shares_that_are_too_small_for_the_type_are_zero_and_in_order_otherwise():
    values = [1e-30, 1e-24, 1e-21, 1.0]
    assert criteria.lamp_scores(torch.tensor(values)).sign().tolist() == [0, 0, 1, 1]
    found = criteria.lamp_scores(torch.tensor(values, dtype=torch.float64))
    np.testing.assert_allclose(found, [1e-60, 1e-48, 1e-42, 1.0], rtol=1e-12)


def test_one_task_with_snip_is_plain_snip():
    model = TwoHeads(tasks=["only"]).eval()
    scores = score_tasks(model, digit_losses, digit_batches(), criterion="snip")
    sensitivity = np.concatenate([score.flatten() for score in scores["only"].values()])
    pruned = set(ordered_positions(sensitivity.tolist())[: round(0.9 * len(sensitivity))])
    found = np.concatenate([mask.flatten() for mask in scores.masks(0.9).values()])
    assert set(np.flatnonzero(~found).tolist()) == pruned


def test_one_task_with_lamp_is_lamp():
    model = TwoHeads(tasks=["only"]).eval()
    scores = score_tasks(model, digit_losses, digit_batches(1), criterion="lamp")
    values = np.concatenate([lamp(m.weight.detach().double().flatten().numpy()) for m, _ in scores.parameters])
    pruned = set(ordered_positions(values.tolist())[: round(0.8 * len(values))])
    found = np.concatenate([mask.flatten() for mask in scores.masks(0.8).values()])
    assert set(np.flatnonzero(~found).tolist()) == pruned


def test_layer_adaptive_keeps_every_layer_alive():
    model = TwoHeads().eval()
    with torch.no_grad():
        model.trunk[0].weight *= 1e-4  # its plain scores are far below those of all other layers
    plain = score_tasks(model, digit_losses, digit_batches(), criterion="magnitude").masks(0.98)
    adapted = score_tasks(model, digit_losses, digit_batches(), criterion=layer_adaptive("magnitude")).masks(0.98)
    key = (model.trunk[0], "weight")
    assert not plain[key].any()
    assert adapted[key].any()


@pytest.mark.parametrize("exponent", [0.0, 0.25, 0.3, 0.5, 0.75, 1.0])
def test_damped_is_its_formula(exponent):
    model, data = TwoHeads().eval(), digit_batches()
    plain = score_tasks(model, digit_losses, data, criterion="taylor")
    found = score_tasks(model, digit_losses, data, criterion=criteria.damped("taylor", exponent))
    for task in plain:
        for (module, name), score in plain[task].items():
            weight = getattr(module, name).detach().double().abs()
            expected = weight ** (1 - exponent) * score.double() ** exponent
            torch.testing.assert_close(found[task][module, name].double(), expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("exponent", [0.25, 0.5, 0.75])
def test_a_damped_score_does_not_depend_on_where_in_memory_it_lies(exponent):
    finish = criteria.damped("taylor", exponent).complete
    weight, total = torch.randn(200, 64), torch.rand(200, 64)
    whole = finish(weight, total)
    assert torch.equal(finish(weight[:, ::2], total[:, ::2]), whole[:, ::2])
    for row, (own, sums) in enumerate(zip(weight[:, :37], total[:, :37], strict=True)):
        assert torch.equal(finish(own.clone(), sums.clone()), whole[row, :37])


def test_damped_is_between_magnitude_and_the_criterion():
    model, data = TwoHeads().eval(), digit_batches()
    for exponent, end in ((0, "magnitude"), (1, "taylor")):
        one = score_tasks(model, digit_losses, data, criterion=f"damped(taylor, {exponent})").masks(0.7)
        other = score_tasks(model, digit_losses, data, criterion=end).masks(0.7)
        assert all(torch.equal(mask, other[key]) for key, mask in one.items())


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_a_loss_changes_no_damped_share(scale):
    model, data = TwoHeads().double().eval(), [(x.double(), y) for x, y in digit_batches()]
    rule = "layer_adaptive(damped(taylor, 0.25))"

    def scaled(model, batch):
        return {task: loss * scale for task, loss in digit_losses(model, batch).items()}

    one, other = (score_tasks(model, losses, data, criterion=rule) for losses in (digit_losses, scaled))
    for task in one:
        for key, score in one[task].items():
            torch.testing.assert_close(score, other[task][key], rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "name",
    [
        "snip",
        "damped(taylor, 0.5)",
        "layer_adaptive(damped(snip, 0.25))",
        "damped(taylor, 0.12345678)",
        f"layer_adaptive(damped(taylor, {1 / 3!r}))",
        "damped(taylor, 1e-05)",
        "layer_adaptive(taylor)",
        "layer_adaptive( fisher )",
        "lamp",
    ],
)
def test_what_reports_print_is_accepted(name):
    rule = criteria.resolve(name)
    assert rule.name == name.replace("( ", "(").replace(" )", ")")
    assert criteria.resolve(rule.name) == rule
    scores = score_tasks(TwoHeads().eval(), digit_losses, digit_batches(), criterion=name)
    assert scores.criterion == rule.name


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(criteria, "_CRITERIA", dict(criteria._CRITERIA))


@pytest.mark.usefixtures("registry")
def test_a_built_in_name_is_replaced_only_when_asked_for():
    with pytest.raises(ValueError, match="names: must not be of this package, found 'fisher'"):
        criteria.register("mine", "fisher")
    criteria.register("fisher", replace=True)(lambda weight, grad: weight.abs() + grad.abs())
    assert criteria.resolve("fisher").score(torch.ones(1), torch.ones(1)).item() == 2
    criteria.register("mine")(lambda weight, grad: weight.abs())
    criteria.register("mine")(lambda weight, grad: 3 * weight.abs())  # as when a cell of a notebook runs again
    assert criteria.resolve("layer_adaptive(mine)").score(torch.ones(1), torch.ones(1)).item() == 3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: criteria.resolve("snipp"),
            ValueError,
            r"criterion: must be one of .*snip.*found 'snipp'; did you mean",
        ),
        (lambda: criteria.resolve("layer_adaptive"), ValueError, r"found none; write 'layer_adaptive\(taylor\)'"),
        (lambda: criteria.resolve("layer_adaptive(tailor)"), ValueError, "found 'tailor'; did you mean 'taylor'"),
        (lambda: criteria.resolve("layeradaptive(taylor)"), ValueError, r"did you mean 'layer_adaptive\(taylor\)'"),
        (lambda: criteria.resolve("layer_adaptive(lamp)"), ValueError, "not layer-adaptive yet, found 'lamp'"),
        (lambda: criteria.resolve("damped"), ValueError, r"found none; write 'damped\(taylor\)'"),
        (
            lambda: criteria.resolve("damped(taylor, much)"),
            ValueError,
            "exponent of damped must be a number, found 'much'",
        ),
        (lambda: criteria.damped("taylor", 1.5), ValueError, "exponent: must be from 0 .* found 1.5"),
        (lambda: criteria.damped("taylor", "1"), TypeError, "exponent: must be a number from 0 to 1, found str"),
        (lambda: criteria.damped("lamp"), ValueError, "neither damped nor layer-adaptive yet, found 'lamp'"),
        (lambda: criteria.lamp_scores(torch.ones(2, 2)), ValueError, r"scores: .* 1-D, found shape \(2, 2\)"),
        (lambda: criteria.resolve(3), TypeError, "criterion: must be a name or a callable.*found int"),
        (lambda: layer_adaptive("lamp"), ValueError, "not layer-adaptive yet, found 'lamp'"),
    ],
)
def test_unknown_choices(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_lamp_of_scores_whose_squares_are_no_floats():
    scores = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
    for scale in (1e-200, 1e200):
        torch.testing.assert_close(criteria.lamp_scores(scores * scale), criteria.lamp_scores(scores))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("snip", 6.0),
        ("taylor", 6.0),
        ("magnitude", 2.0),
        ("fisher", 36.0),
        ("gradient", 3.0),
        ("authors_pretrained", 12.0),
    ],
)
def test_the_formula_of_each_criterion(name, expected):
    assert float(criteria.resolve(name).score(torch.tensor([-2.0]), torch.tensor([3.0]))) == expected


def test_magnitudes_do_not_add_up_over_batches():
    model = TwoHeads().eval()
    scores = score_tasks(model, digit_losses, digit_batches(3), criterion="magnitude")
    for task in scores:
        assert all(torch.equal(score, module.weight.abs()) for (module, _), score in scores[task].items())
