"""Networks of timm and SMP, as people use them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from disparse_plugin.structured import (
    DiSparseImportance,
    attention_heads,
    record_removal,
    remove_channels,
    replay_removal,
    sync_attention,
)
from disparse_plugin.structured.masked_copy import masked_copy
from oracles.structured import cuts_of
from structured_networks import randomized

timm = pytest.importorskip("timm", reason="needs timm")
smp = pytest.importorskip("segmentation_models_pytorch", reason="needs segmentation-models-pytorch")

TIMM = ["resnet18", "mobilenetv3_small_050", "convnext_atto", "vit_tiny_patch16_224", "regnety_002", "ghostnet_050"]
FIRST = ["resnet18"]
SMP = ["Unet", "FPN", "DeepLabV3Plus", "PAN", "MAnet"]


class ThreeHeads(nn.Module):
    """A trunk of timm with three linear heads."""

    def __init__(self, name: str) -> None:
        super().__init__()
        options = {"img_size": 128} if name.startswith("vit") else {}
        self.trunk = timm.create_model(name, pretrained=False, num_classes=0, **options)
        with torch.no_grad():
            width = self.trunk.eval()(torch.zeros(1, 3, 128, 128)).shape[1]
        self.a, self.b, self.c = nn.Linear(width, 4), nn.Linear(width, 3), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        features = self.trunk(x)
        return self.a(features), self.b(features), self.c(features)


def losses(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return {f"task {number}": out.square().mean() + out.mean() for number, out in enumerate(model(x))}


def picture(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def difference(first: nn.Module, second: nn.Module) -> float:
    pairs = zip(first.eval()(picture(3)), second.eval()(picture(3)), strict=True)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = (
        getattr(smp, name)("resnet18", encoder_weights=None, aux_params={"classes": 2})
        if name in SMP
        else ThreeHeads(name)
    )
    return randomized(model)


def output_layers(model: Any) -> list[nn.Module]:
    return (
        [model.a, model.b, model.c]
        if isinstance(model, ThreeHeads)
        else [model.segmentation_head, model.classification_head]
    )


def attached(model: nn.Module, **options: Any) -> Any:
    """Make a pruner of torch-pruning with our importance, which scores afresh before each step."""
    importance = DiSparseImportance(rescore=(losses, [picture()]))
    heads = output_layers(model)
    pruner = tp.pruner.BasePruner(
        model, (picture(),), importance=importance, global_pruning=True, ignored_layers=heads, **options
    )
    importance.attach(pruner)
    return pruner


@pytest.mark.parametrize("name", [n if n in FIRST else pytest.param(n, marks=pytest.mark.slow) for n in [*TIMM, *SMP]])
def test_remove_channels(name: str) -> None:
    model = built(name)
    full = copy.deepcopy(model)
    report = remove_channels(model, losses, [picture()], picture(1), 0.5)
    assert report.achieved == pytest.approx(0.5, abs=0.02)
    assert difference(masked_copy(full, report.plan.cuts), model) < 1e-4
    sum(losses(model.train(), picture()).values()).backward()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")
@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "vit_tiny_patch16_224"])
def test_a_pruner_of_torch_pruning(name: str, ratio: float) -> None:
    model = built(name)
    pruner = attached(model, pruning_ratio=ratio)
    groups = list(pruner.step(interactive=True))
    soft = masked_copy(model, cuts_of(pruner, groups))
    for group in groups:
        group.prune()
    sync_attention(pruner.num_heads, model)
    assert difference(soft, model) < 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "Unet"])
def test_a_recorded_removal_is_replayed(name: str, tmp_path: Path) -> None:
    """Two steps with training in between; the ViT loses whole heads too."""
    model, path = built(name), tmp_path / "removal.safetensors"
    heads = attention_heads(model)
    full, before = copy.deepcopy(model), sum(heads.values())
    whole = {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": 0.4} if heads else {}
    pruner = attached(model, pruning_ratio=0.5, iterative_steps=2, num_heads=heads, **whole)
    recording = record_removal(pruner)
    for _ in range(2):
        pruner.step()
        sync_attention(pruner.num_heads, model)
    assert sum(pruner.num_heads.values()) == (before - int(0.4 * before) - 1 if heads else 0)
    assert difference(masked_copy(full, recording.plan.cuts), model) < 1e-4
    sum(losses(model.train(), picture()).values()).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-3 * (0 if parameter.grad is None else parameter.grad)
    recording.save(path)
    fresh = built(name)
    replay_removal(fresh, path)
    fresh.load_state_dict(model.state_dict())
    assert difference(model, fresh) == 0
    assert difference(full, model) > 1e-3
