"""Arbiters and criteria on their own, against the numpy definitions."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disparse_plugin import arbiters, at_least, criteria, layer_adaptive, score_tasks
from networks import TwoHeads, digit_batches, digit_losses
from oracles.agreement import ARBITERS, lamp, ordered_positions

BY_NAME = {"at_least(2)": at_least(2), "at_least(3)": at_least(3)}


@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, None]), min_size=4, max_size=4), min_size=1, max_size=6),
    st.sampled_from(sorted(ARBITERS)),
)
def test_arbiters_ignore_absent_tasks(rows, name):
    table = torch.tensor([[torch.nan if value is None else value for value in row] for row in rows])
    found = arbiters.resolve(BY_NAME.get(name, name))(table)
    for column, value in enumerate(found.tolist()):
        present = [row[column] for row in rows if row[column] is not None]
        if present:
            assert value == pytest.approx(float(ARBITERS[name](present)), abs=1e-6)


def test_at_least_one_is_unanimous():
    table = torch.rand(4, 50)
    assert torch.equal(at_least(1)(table), arbiters.unanimous(table))


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


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: criteria.resolve("snipp"), ValueError, r"criterion: must be one of .*snip.*found 'snipp'"),
        (lambda: criteria.resolve(3), TypeError, "criterion: must be a name or a callable.*found int"),
        (lambda: layer_adaptive("lamp"), ValueError, "not layer-adaptive yet, found 'lamp'"),
        (lambda: arbiters.resolve("all"), ValueError, r"arbiter: must be one of .*unanimous.*found 'all'"),
        (lambda: arbiters.resolve(None), TypeError, "arbiter: must be a name or a callable.*found NoneType"),
        (lambda: at_least(0), ValueError, "k: must be at least 1, found 0"),
        (lambda: at_least(1.5), TypeError, "k: must be an int, found float"),
    ],
)
def test_unknown_choices(call, error, message):
    with pytest.raises(error, match=message):
        call()
