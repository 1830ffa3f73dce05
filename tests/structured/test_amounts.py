"""How much remove_channels takes: steps, parts, multiples, latency, and what the report says of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from disparse_plugin.structured import latency, remove_channels, replay_removal
from disparse_plugin.structured.masked_copy import masked_copy
from structured_networks import batches, build, deviation, losses


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def remove(model: nn.Module, amount: Any, **options: Any) -> Any:
    return remove_channels(model, losses, options.pop("data", batches()), batches()[0], amount, **options)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("of", ["channels", "parameters", "macs"])
@pytest.mark.parametrize("kind", ["batchnorm", "transformer"])
def test_steps_reach_the_amount_and_one_file_replays_them_all(kind: str, of: str, tmp_path: Path) -> None:
    model, calls = build(kind), []
    full = copy.deepcopy(model)

    def between(smaller: nn.Module, step: int) -> None:
        calls.append((step, count(smaller)))
        with torch.no_grad():
            for parameter in smaller.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))

    report = remove(model, 0.6, of=of, steps=3, between=between)
    assert [step for step, _ in calls] == [1, 2]
    assert count(full) > calls[0][1] > calls[1][1] > count(model)
    assert report.achieved == pytest.approx(0.6, abs=0.03)
    assert report.achieved >= 0.6 - 1 / report.channels.before
    assert (report.parameters.before, report.parameters.after) == (count(full), count(model))
    assert sum(part.parameters.after for part in report.parts.values()) == count(model)
    report.save(tmp_path / "removal.safetensors")
    fresh = build(kind, seed=3)
    replay_removal(fresh, tmp_path / "removal.safetensors")
    fresh.load_state_dict(model.state_dict())
    assert deviation(model, fresh) == 0


def test_steps_without_training_are_one_removal_of_what_is_masked() -> None:
    model = build("batchnorm")
    full = copy.deepcopy(model)
    report = remove(model, 0.5, steps=2)
    assert deviation(masked_copy(full, report.plan.cuts), model) < 1e-5
    assert report.channels.after == report.channels.before - round(0.5 * report.channels.before)


def test_a_schedule_says_how_much_is_gone_after_each_step() -> None:
    left: list[int] = []
    model = build("batchnorm")
    remove(model, 40, steps=2, schedule={1: 0.75, 2: 1.0}.__getitem__, between=lambda m, _: left.append(m))
    assert len(left) == 1
    one = build("batchnorm")
    assert remove(one, 30).channels.after == remove(one, 0).channels.before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps: must be at least 1, found 0"),
        ({"steps": 10**9}, "steps: must be at most"),
        ({"steps": 1, "between": print}, "between: is called between steps"),
        ({"steps": 2, "between": 3}, "between: must be callable"),
        ({"steps": 2, "schedule": lambda _: 0.5}, "schedule: must rise"),
        ({"steps": 2, "data": iter(batches())}, "data: must be readable"),
        ({"data": 3}, "data: must be an iterable"),
        ({"amount": {}}, "amount: must name at least one part"),
        ({"amount": {"shared": 1.5}}, r"amount\['shared'\]"),
        ({"amount": {"nobody": 0.5}}, "none in 'nobody'"),
        ({"amount": {"shared": 1.0}}, r"amount\['shared'\]: at most"),
        ({"amount": 3, "of": "latency"}, "must be a fraction"),
        ({"round_to": "some"}, "round_to"),
    ],
)
def test_bad_amounts_change_nothing(options: dict[str, Any], words: str) -> None:
    model = build("batchnorm")
    before = count(model)
    with pytest.raises((ValueError, TypeError), match=words):
        remove(model, **{"amount": 0.5, **options})
    assert count(model) == before


@pytest.mark.parametrize("of", ["channels", "parameters", "macs"])
def test_what_cannot_be_reached_is_said_before_anything_is_trained(of: Any) -> None:
    model, trained = build("batchnorm"), []
    before = [parameter.shape for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"at most .* found 0.9999 asked"):
        remove_channels(
            model, losses, batches(), batches()[0], 0.9999, of=of, steps=4, between=lambda _, step: trained.append(step)
        )
    assert not trained
    assert [parameter.shape for parameter in model.parameters()] == before


def test_one_amount_for_each_part() -> None:
    """Exact in every part; a part that is not named keeps all."""
    report = remove(build("batchnorm"), {"shared": 0.25, "label": 0.5})
    gone = {"shared": 0, "label": 0, "dense": 0}
    there = dict(gone)
    for change in report.groups.values():
        part = change.tasks[0] if len(change.tasks) == 1 else "shared"
        there[part] += change.channels.before
        gone[part] += change.channels.before - change.channels.after
    assert gone == {"shared": round(0.25 * there["shared"]), "label": 12, "dense": 0}


def test_parameters_of_each_part() -> None:
    """What a head reads shrinks with the trunk; its own channels go only as far as that is not enough."""
    report = remove(build("batchnorm"), {"shared": 0.5, "label": 0.9, "dense": 0.01}, of="parameters")
    assert report.parts["shared"].parameters.removed == pytest.approx(0.5, abs=0.04)
    assert report.parts["label"].parameters.removed == pytest.approx(0.9, abs=0.05)
    assert report.groups["dense.0"].channels.removed == 0
    assert "shared 50.0%, label 90.0%" in str(report)


def test_numpy_numbers_are_numbers() -> None:
    one, other = remove(build("batchnorm"), np.int64(7)), remove(build("batchnorm"), 7)
    assert one.channels == other.channels
    assert remove(build("batchnorm"), np.float32(0.5), round_to=np.int64(4)).channels.after % 4 == 0


def test_auto_rounding_keeps_multiples_that_narrow_layers_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    report = remove(build("batchnorm"), 0.4, round_to="auto")
    changed = [change.channels for change in report.groups.values() if change.channels.removed]
    assert changed
    assert all(c.after % (8 if c.before >= 32 else 4) == 0 for c in changed)


def test_the_report_begins_with_the_whole_model() -> None:
    model = build("batchnorm")
    report = remove(model, 0.5)
    first, second, *_ = str(report).splitlines()
    assert first == (
        f"removed {report.parameters.removed:.1%} of the parameters and {report.macs.removed:.1%} of the MACs of the "
        "whole model"
    )
    assert second.endswith("follow no channels that could be removed")
    assert "of the channels that can be removed" in str(report)
    keep = remove(build("batchnorm"), 0.2, exclude=["stem", "blocks.*", "down", "up", "dense.*"])
    assert keep.outside > 0.5
    assert "WARNING: most of the model cannot be removed from" in str(keep)
    label = sum(p.numel() for p in [*model.hidden.parameters(), *model.label_out.parameters()])
    assert label < count(model)


def test_exclude_takes_modules_names_and_patterns() -> None:
    found = []
    for exclude in (lambda m: [m.blocks[0]], lambda _: ["blocks.0"], lambda _: ["blocks.0.*"]):
        model = build("batchnorm")
        report = remove(model, 0.4, exclude=exclude(model))
        assert model.blocks[0].conv1.out_channels == 32
        found.append([cut.positions.tolist() for cut in report.plan.cuts])
    assert found[0] == found[1] == found[2]
    with pytest.raises(ValueError, match="exclude"):
        remove(build("batchnorm"), 0.4, exclude=["nothing"])
    model = build("batchnorm")
    with pytest.warns(DeprecationWarning, match="exclude") as caught:
        remove(model, 0.4, ignored_layers=[model.blocks[0]])
    assert caught[0].filename == __file__
    assert model.blocks[0].conv1.out_channels == 32


def test_latency_is_removed_until_the_clock_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that counts parameters: half of the time is half of them, within one channel."""
    measured: list[int] = []

    def clock(model: nn.Module, _: Any) -> float:
        measured.append(count(model))
        return 1e-6 * count(model)

    monkeypatch.setattr(latency, "seconds", clock)
    model = build("batchnorm")
    before = count(model)
    report = remove(model, 0.5, of="latency")
    assert 0.45 * before <= count(model) <= 0.5 * before
    assert report.latency is not None
    assert (report.latency.before, report.latency.after) == (1e-6 * before, 1e-6 * count(model))
    assert report.achieved == pytest.approx(1 - count(model) / before)
    assert len(measured) < 20
    assert "of the measured latency" in str(report)


def test_seconds_are_those_of_a_forward() -> None:
    calls: list[bool] = []

    class Counted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(torch.is_grad_enabled())
            return super().forward(x)

    found = latency.seconds(Counted(4, 4).train(), (torch.zeros(1, 4),))
    assert 1e-7 < found < 1e-2
    assert calls
    assert not any(calls)
