"""What a pruner of torch-pruning removed, replayed from a file on a freshly built model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import nn

from disparse_plugin.structured import RemovalPlan, record_removal, replay_removal, sync_attention
from disparse_plugin.structured.cuts import Cut
from disparse_plugin.structured.masked_copy import masked_copy
from structured_networks import batches, build, deviation, make_pruner

KINDS = ["batchnorm", "grouped", "depthwise", "groupnorm", "transformer"]

pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def check_replay(recording: Any, full: nn.Module, pruned: nn.Module, fresh: nn.Module, path: Path) -> None:
    """The replay has the pruned model's shapes and outputs, and its cuts are those of masking."""
    recording.save(path)
    assert path.stat().st_size < 60_000
    plan = RemovalPlan.load(path)
    again = copy.deepcopy(full)
    plan.apply(again)
    assert deviation(pruned, again) < 1e-6  # nothing was trained, so the weights that are left are those of before
    assert deviation(masked_copy(full, plan.cuts), pruned) < 1e-5
    replay_removal(fresh, path)
    fresh.load_state_dict(pruned.state_dict())
    assert deviation(pruned, fresh) == 0
    assert deviation(full, pruned) > 1e-3


@pytest.mark.parametrize("interactive", [False, True], ids=["step", "interactive"])
@pytest.mark.parametrize("kind", KINDS)
def test_iterative_steps(kind: str, interactive: bool, tmp_path: Path) -> None:
    model = build(kind)
    full = copy.deepcopy(model)
    pruner = make_pruner(model, iterative_steps=3, pruning_ratio=0.6)
    recording = record_removal(pruner)
    for _ in range(3):
        if interactive:
            for group in pruner.step(interactive=True):
                group.prune()
        else:
            pruner.step()
        sync_attention(pruner.num_heads, model)
    check_replay(recording, full, model, build(kind, seed=7), tmp_path / "removal.safetensors")


@pytest.mark.parametrize("everywhere", [True, False], ids=["global", "local"])
@pytest.mark.parametrize("dims", [True, False], ids=["dims", "heads only"])
def test_whole_heads(everywhere: bool, dims: bool, tmp_path: Path) -> None:
    model = build("transformer")
    full = copy.deepcopy(model)
    pruner = make_pruner(
        model,
        num_heads={block.attn.qkv: 4 for block in model.blocks},
        prune_num_heads=True,
        prune_head_dims=dims,
        head_pruning_ratio=0.5,
        global_pruning=everywhere,
        pruning_ratio=0.25,
    )
    recording = record_removal(pruner)
    pruner.step()
    sync_attention(pruner.num_heads, model)
    assert sum(block.attn.num_heads for block in model.blocks) == 4
    fresh = build("transformer", seed=7)
    check_replay(recording, full, model, fresh, tmp_path / "removal.safetensors")
    assert [b.attn.num_heads for b in fresh.blocks] == [b.attn.num_heads for b in model.blocks]


def test_unwrapped_parameters(tmp_path: Path) -> None:
    model = build("transformer")
    full = copy.deepcopy(model)
    pruner = make_pruner(model, unwrapped_parameters=[(model.position, 2)])
    recording = record_removal(pruner)
    pruner.step()
    sync_attention(pruner.num_heads, model)
    assert model.position.shape[2] < 32
    check_replay(recording, full, model, build("transformer", seed=7), tmp_path / "removal.safetensors")


def test_torch_pruning_without_us_and_groups_that_the_user_chose(tmp_path: Path) -> None:
    """Another importance, only every second group pruned, and one with indices of the user's own."""
    model = build("batchnorm")
    full = copy.deepcopy(model)
    pruner = tp.pruner.MetaPruner(
        model,
        (batches()[0],),
        importance=tp.importance.GroupMagnitudeImportance(),
        global_pruning=True,
        pruning_ratio=0.5,
        ignored_layers=[model.dense_out, model.label_out],
    )
    recording = record_removal(pruner)
    groups = list(pruner.step(interactive=True))
    for number, group in enumerate(groups):
        if number % 2:
            group.prune()
    pruner.DG.get_pruning_group(model.hidden, tp.prune_linear_out_channels, list(range(24))).prune(idxs=[1, 5])
    assert model.hidden.out_features <= 22
    check_replay(recording, full, model, build("batchnorm", seed=7), tmp_path / "removal.safetensors")


def test_no_step_is_an_empty_plan() -> None:
    model = build("batchnorm")
    recording = record_removal(make_pruner(model))
    assert recording.plan.cuts == ()
    recording.plan.apply(model)
    assert deviation(model, build("batchnorm")) == 0


def test_attributes_of_another_architecture_are_refused(tmp_path: Path) -> None:
    plan = RemovalPlan((), {"blocks.0.attn": {"num_heads": 2, "window": (1, 2)}})
    plan.save(tmp_path / "removal.safetensors")
    assert RemovalPlan.load(tmp_path / "removal.safetensors") == plan
    model = build("transformer")
    with pytest.raises(ValueError, match=r"'blocks.0.attn' must have window"):
        replay_removal(model, tmp_path / "removal.safetensors")
    assert model.blocks[0].attn.num_heads == 4
    with pytest.raises(ValueError, match="num_heads, window"):
        replay_removal(build("batchnorm"), tmp_path / "removal.safetensors")


def test_a_recording_can_be_stopped_and_leaves_nothing_patched() -> None:
    model = build("batchnorm")
    pruner = make_pruner(model, iterative_steps=2, pruning_ratio=0.6)
    with record_removal(pruner) as outer:
        inner = record_removal(pruner)
        with pytest.raises(RuntimeError, match="reverse order"):
            outer.stop()
        kept = next(iter(pruner.step(interactive=True)))
        inner.stop()
        inner.stop()
    assert "get_pruning_group" not in pruner.DG.__dict__
    assert "prune" not in kept.__dict__
    kept.prune()
    pruner.step()
    assert outer.plan.cuts == inner.plan.cuts == ()


def test_what_was_recorded_stays_after_the_stop(tmp_path: Path) -> None:
    model = build("batchnorm")
    full = copy.deepcopy(model)
    pruner = make_pruner(model)
    with record_removal(pruner) as recording:
        pruner.step()
    check_replay(recording, full, model, build("batchnorm", seed=7), tmp_path / "removal.safetensors")


def test_objects_that_all_of_torch_pruning_shares_stay_as_they_were() -> None:
    shared = {kind: dict(cutter.__dict__) for kind, cutter in tp.function.PrunerBox.items()}
    cut = Cut("position", "parameter", 2, 32, torch.tensor([1, 5]))
    model = build("transformer")
    RemovalPlan((cut,)).apply(model)
    assert model.position.shape == (1, 16, 30)
    assert {kind: dict(cutter.__dict__) for kind, cutter in tp.function.PrunerBox.items()} == shared


def cut_of(**changes: Any) -> Cut:
    return Cut(
        **{"target": "hidden", "side": "out", "dim": -1, "count": 24, "positions": torch.tensor([3, 7]), **changes}
    )


@pytest.mark.parametrize(
    ("cuts", "words"),
    [
        ([cut_of(positions=torch.tensor([3, 24]))], "must lie in 0..23"),
        ([cut_of(positions=torch.tensor([-1, 3]))], "must lie in 0..23"),
        ([cut_of(positions=torch.tensor([7, 3]))], "must lie in|must ascend"),
        ([cut_of(positions=torch.tensor([3, 3]))], "must ascend"),
        ([cut_of(positions=torch.arange(24))], "loses all 24"),
        ([cut_of(positions=torch.tensor([3.0]))], "int64"),
        ([cut_of(), cut_of()], "twice"),
        ([cut_of(side="up")], "side"),
        ([cut_of(count="24")], "count"),
    ],
    ids=str,
)
def test_plans_that_cannot_be_right_are_refused(cuts: list[Cut], words: str, tmp_path: Path) -> None:
    model = build("batchnorm")
    with pytest.raises(ValueError, match=words):
        RemovalPlan(tuple(cuts)).apply(model)
    assert model.hidden.out_features == 24
    RemovalPlan(tuple(cuts)).save(tmp_path / "removal.safetensors")
    with pytest.raises(ValueError, match=f"damaged.*({words})"):
        RemovalPlan.load(tmp_path / "removal.safetensors")


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"blocks.0.attn": {"num_heads": 8}}, "may only shrink"),
        ({"blocks.0.attn": {"num_heads": 0}}, "may only shrink"),
        ({"blocks.0.attn": {"scale": float("nan")}}, "may only shrink"),
        ({"blocks.1.attn": {"num_heads": 2}}, "around a cut layer"),
        ({"blocks.0.attn": {"forward": 2}}, "must have forward"),
    ],
    ids=str,
)
def test_attributes_that_no_removal_writes_are_refused(attributes: dict[str, Any], words: str) -> None:
    model = build("transformer")
    cuts = (Cut("blocks.0.attn.proj", "out", -1, 32, torch.tensor([0])),)
    with pytest.raises(ValueError, match=words):
        RemovalPlan(cuts, attributes).apply(model)
    assert model.blocks[0].attn.proj.out_features == 32
