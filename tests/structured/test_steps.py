"""Removals in several steps: counts, limits and parts hold over all of them, and one file replays them."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from disparse_plugin.structured import record_removal, remove_channels, replay_removal
from disparse_plugin.structured.cuts import Cut
from disparse_plugin.structured.plan import RemovalPlan
from disparse_plugin.structured.shrinking import shrink


class TwoHeads(nn.Module):
    """A trunk in a row, with two heads."""

    def __init__(self, *trunk: nn.Module, width: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*trunk)
        self.a, self.b = nn.Conv2d(width, 1, 1), nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(x)
        return self.a(hidden), self.b(hidden)


def in_a_row(*widths: int, groups: int = 1) -> TwoHeads:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for place, (before, after) in enumerate(zip((3, *widths), widths, strict=False)):
        layers += [nn.Conv2d(before, after, 3, padding=1, groups=groups if place == 1 else 1), nn.ReLU()]
    return TwoHeads(*layers, width=widths[-1])


def losses(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return {name: out.square().mean() for name, out in zip("ab", model(x), strict=True)}


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def remove(model: nn.Module, amount: Any, **options: Any) -> Any:
    return remove_channels(model, losses, [X], X, amount, **options)


def widths(model: TwoHeads) -> list[int]:
    return [layer.out_channels for layer in model.trunk if isinstance(layer, nn.Conv2d)]


def test_a_convolution_that_becomes_depthwise_on_the_way_is_counted_and_replayed(tmp_path):
    model = in_a_row(8, 8, 8, groups=4)
    report = remove(model, 0.85, steps=2)
    left = widths(model)
    assert left[0] == left[1] == model.trunk[2].groups < 4  # whole groups are gone
    assert sorted(group.channels.after for group in report.groups.values()) == sorted(left)
    assert report.achieved == 1 - sum(left) / 24
    report.save(tmp_path / "removal")
    fresh = in_a_row(8, 8, 8, groups=4)
    replay_removal(fresh, tmp_path / "removal")
    fresh.load_state_dict(model.state_dict())
    assert all(torch.equal(one, other) for one, other in zip(model(X), fresh(X), strict=True))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_no_step_takes_more_of_a_group_than_all_may(steps):
    model = in_a_row(16, 64, 16)
    report = remove(model, 0.45, steps=steps, max_pruning_ratio=0.5)
    assert report.gone == round(0.45 * 96)
    assert all(2 * group.channels.after >= group.channels.before for group in report.groups.values())
    before = widths(model)
    with pytest.raises(
        ValueError, match=r"at most .* channels .* can be removed, found 0\.6 asked.*max_pruning_ratio=0\.2"
    ):
        remove(model, 0.6, steps=steps, max_pruning_ratio=0.2)
    assert widths(model) == before


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_channels_are_met_exactly_in_any_number_of_steps(steps):
    model = in_a_row(3, 33, 2, 17)
    assert remove(model, 0.9, steps=steps).gone == round(0.9 * 55)
    assert sum(widths(model)) == 55 - round(0.9 * 55)


class Private(nn.Module):
    """A shared trunk, and a layer that one task has to itself."""

    def __init__(self, own: int = 16) -> None:
        super().__init__()
        self.trunk, self.own = nn.Conv2d(3, 24, 3), nn.Conv2d(24, own, 1)
        self.a, self.b = nn.Conv2d(own, 1, 1), nn.Conv2d(24, 3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(x).relu()
        return self.a(self.own(hidden).relu()), self.b(hidden)


@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize("amount", [{"shared": 0.5, "a": 0.25}, {"shared": 12, "a": 4}, {"a": 1, "shared": 0.5}])
def test_each_part_loses_its_own_amount_in_any_number_of_steps(amount, steps):
    torch.manual_seed(0)
    model = Private()
    remove(model, amount, steps=steps)
    gone = {"shared": 24 - model.trunk.out_channels, "a": 16 - model.own.out_channels}
    wanted = {
        part: one if isinstance(one, int) else one * {"shared": 24, "a": 16}[part] for part, one in amount.items()
    }
    assert gone == wanted


def test_a_part_may_have_lost_all_that_it_can_before_the_last_step():
    torch.manual_seed(0)
    model = Private(own=2)
    remove(model, {"shared": 12, "a": 1}, steps=3)
    assert (model.trunk.out_channels, model.own.out_channels) == (12, 1)


def test_parts_are_counted_in_parameters_over_steps():
    torch.manual_seed(0)
    model = Private()
    report = remove(model, {"shared": 0.5, "a": 100}, of="parameters", steps=3)
    parts = {name: part.parameters.before - part.parameters.after for name, part in report.parts.items()}
    assert parts["shared"] >= 0.5 * report.parts["shared"].parameters.before - 1
    assert parts["a"] >= 100


class SometimesDropped(nn.Module):
    """Two heads, and a branch that some batches leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Linear(8, 32), nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
        self.a, self.b = nn.Linear(32, 3), nn.Linear(32, 2)

    def forward(self, x: Tensor, whole: bool = True) -> tuple[Tensor, Tensor]:
        hidden = self.stem(x).relu()
        hidden = hidden + self.branch(hidden) if whole else hidden
        return self.a(hidden), self.b(hidden)


@pytest.mark.filterwarnings("ignore:parameters. 2 of 5 are reached by no task")
def test_parts_add_up_where_a_later_step_does_not_run_a_layer():
    model, x, data = SometimesDropped().eval(), torch.randn(4, 8), [(torch.randn(4, 8), True)]

    def of_heads(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        return {name: out.square().mean() for name, out in zip("ab", model(*batch), strict=True)}

    def leave_out(*_: object) -> None:
        data[0] = (x, False)

    report = remove_channels(model, of_heads, data, x, 0.3, steps=2, between=leave_out, of="parameters")
    left = sum(p.numel() for p in model.parameters())
    assert report.parameters.after == left == sum(part.parameters.after for part in report.parts.values())
    weights = [p for p in model.branch.parameters() if p.dim() > 1]
    assert report.parts["unreached"].parameters.after == sum(p.numel() for p in weights)
    assert report.macs.before == sum(part.macs.before for part in report.parts.values())
    assert report.macs.after == sum(part.macs.after for part in report.parts.values())


def test_no_task_may_have_the_name_of_the_shared_part():
    model = Private()
    named = lambda net, x: dict(zip(("shared", "b"), losses(net, x).values(), strict=True))  # noqa: E731
    with pytest.raises(ValueError, match="no task may be called 'shared'"):
        remove_channels(model, named, [X], X, {"shared": 0.5})


def test_a_recorded_grouped_convolution_with_one_input_left_in_each_group_is_replayed(tmp_path):
    model, fresh = (in_a_row(8, 16, groups=4) for _ in range(2))
    first, second = model.trunk[0], model.trunk[2]
    importance = tp.importance.MagnitudeImportance()
    pruner = tp.pruner.BasePruner(
        model, (X,), importance=importance, pruning_ratio=0.5, ignored_layers=[model.a, model.b]
    )
    with record_removal(pruner) as recording:
        pruner.DG.get_pruning_group(first, tp.prune_conv_out_channels, [0, 2, 4, 6]).prune()
        pruner.DG.get_pruning_group(second, tp.prune_conv_out_channels, [0, 4, 8, 12]).prune()
    recording.save(tmp_path / "removal")
    replay_removal(fresh, tmp_path / "removal")
    fresh.load_state_dict(model.state_dict())
    assert repr(fresh) == repr(model)
    assert all(torch.equal(one, other) for one, other in zip(model(X), fresh(X), strict=True))


def cases() -> list[tuple[nn.Module, list[int], list[int]]]:
    """Convolutions, and which inputs and outputs of them stay: alike in all groups that stay."""
    draw, found = random.Random(0), []
    while len(found) < 150:
        groups, transposed = draw.choice([1, 2, 4]), draw.random() < 0.4
        inner, outer = (draw.choice([1, 2, 3]) for _ in range(2))
        if groups > 1 and ((inner > 1 and outer == 1) or (transposed and inner == 1 < outer)):
            continue  # refused: see layers.py
        kind = nn.ConvTranspose2d if transposed else nn.Conv2d
        layer = kind(groups * inner, groups * outer, 3, padding=1, groups=groups)
        stay = draw.sample(range(groups), draw.randint(1, groups))
        left_in, left_out = draw.randint(1, inner), outer if groups > 1 and inner == 1 else draw.randint(1, outer)
        ins = [g * inner + i for g in sorted(stay) for i in sorted(draw.sample(range(inner), left_in))]
        outs = [g * outer + i for g in sorted(stay) for i in sorted(draw.sample(range(outer), left_out))]
        found.append((layer, ins, outs))
    return found


def without(kept: list[int], count: int) -> Tensor:
    return torch.tensor(sorted(set(range(count)) - set(kept)), dtype=torch.int64)


def test_a_smaller_convolution_computes_what_the_kept_channels_did():
    torch.manual_seed(0)
    for layer, ins, outs in cases():
        x = torch.randn(2, layer.in_channels, 5, 5)
        silent = torch.zeros_like(x).index_copy(1, torch.tensor(ins), x[:, ins])
        gone: dict[Any, Tensor] = {"in": without(ins, layer.in_channels), "out": without(outs, layer.out_channels)}
        if layer.groups == layer.in_channels > 1:  # the inputs go without saying
            del gone["in"]
        smaller, replayed = copy.deepcopy(layer), nn.Sequential(copy.deepcopy(layer))
        shrink(smaller, gone)
        torch.testing.assert_close(smaller(x[:, ins]), layer(silent)[:, outs])
        counts = {"in": layer.in_channels, "out": layer.out_channels}
        RemovalPlan(tuple(Cut("0", side, -1, counts[side], lost) for side, lost in gone.items() if len(lost))).apply(
            replayed
        )
        assert repr(replayed[0]) == repr(smaller)
        assert torch.equal(replayed[0].weight, smaller.weight)


def test_groups_that_would_be_left_with_different_widths_are_refused_before_anything_changes():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=4))
    before = copy.deepcopy(model)
    plan = RemovalPlan((Cut("0", "out", -1, 8, torch.tensor([0])), Cut("1", "in", -1, 8, torch.tensor([0]))))
    with pytest.raises(
        ValueError, match=r"model: the 4 groups of a convolution must be left with equally many channels"
    ):
        plan.apply(model)
    assert repr(model) == repr(before)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
