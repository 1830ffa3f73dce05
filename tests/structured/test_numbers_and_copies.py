"""Numbers, activations and keywords that models carry along: only what a removal must change is changed."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from disparse_plugin.structured import remove_channels
from disparse_plugin.structured.copies import copied

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def losses(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return {name: out.square().mean() for name, out in zip("ab", model(x), strict=True)}


def remove(model: nn.Module, x: Tensor, amount: float = 0.5, **options: Any) -> Any:
    return remove_channels(model, losses, [x], x, amount, **options)


class Sizes(nn.Module):
    """A net with numbers that equal a width: two by chance, one that its forward reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.num_classes = self.image_size = self.width = 16
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.a, self.b = nn.Conv2d(16, 1, 1), nn.Linear(16, 16)
        self.register_buffer("scale", torch.rand(16) + 0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.first(x).relu() * self.scale.view(1, self.width, 1, 1)
        hidden = self.second(hidden).relu()
        return self.a(hidden), self.b(hidden.mean((2, 3)))


def test_a_number_that_no_forward_reads_stays_though_it_equals_a_width():
    model = Sizes()
    report = remove(model, X)
    assert model.first.out_channels == model.width == len(model.scale) < 16
    assert (model.num_classes, model.image_size, model.b.out_features) == (16, 16, 16)
    assert report.plan.attributes == {"": {"width": model.width}}


class Keywords(nn.Module):
    """A net that may call its layers by keyword."""

    def __init__(self, *, by_name: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.by_name = by_name
        self.first, self.norm, self.second = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 16)
        self.mix = nn.MultiheadAttention(16, 4, batch_first=True)
        self.a, self.b = nn.Linear(16, 2), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.first(x)
        if self.by_name:
            hidden = self.second(input=self.norm(input=hidden)).relu()
            hidden = hidden + self.mix(query=hidden, key=hidden, value=hidden, need_weights=False)[0]
        else:
            hidden = self.second(self.norm(hidden)).relu()
            hidden = hidden + self.mix(hidden, hidden, hidden, need_weights=False)[0]
        return self.a(hidden), self.b(hidden)


def test_layers_that_are_called_by_keyword_count_as_others():
    by_place, by_name = Keywords(by_name=False), Keywords(by_name=True)
    rows = torch.randn(2, 4, 6)
    one, other = remove(by_place, rows, of="macs"), remove(by_name, rows, of="macs")
    assert (one.macs, one.skipped) == (other.macs, other.skipped)
    assert one.macs.removed >= 0.5
    assert {name: p.shape for name, p in by_place.named_parameters()} == {
        name: p.shape for name, p in by_name.named_parameters()
    }
    assert set(one.skipped) == {"a", "b"}  # what an attention reads of its output layer is no layer that does not run


class Keeping(nn.Module):
    """A net that keeps an activation, for a loss or a plot."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 16)
        self.a, self.b = nn.Linear(16, 2), nn.Linear(16, 3)
        self.seen: dict[str, list[Tensor]] = {}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.second(self.first(x).relu()).relu()
        self.features, self.seen["hidden"] = hidden, [hidden]
        return self.a(hidden), self.b(hidden)


def test_activations_that_a_model_keeps_are_no_obstacle():
    model = Keeping()
    model(ROWS)
    twin = copied(model)
    assert torch.equal(twin.features, model.features)
    assert not twin.features.requires_grad
    remove(model, ROWS)
    assert model.second.out_features < 16


def test_what_cannot_be_copied_is_named():
    model = Keeping()
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"model: must be one that copy.deepcopy can copy.*lock.*; keep locks, files"):
        remove(model, ROWS)
    assert model.second.out_features == 16


def test_parameters_made_in_inference_mode_are_refused_and_the_mode_itself_is_not():
    with torch.inference_mode():
        made_inside = Keeping()
    with pytest.raises(ValueError, match=r"model: must be built outside of torch.inference_mode\(\)"):
        remove(made_inside, ROWS)
    model = Keeping()
    with torch.inference_mode():
        remove(model, ROWS)
    assert model.second.out_features < 16
    assert not any(parameter.is_inference() for parameter in model.parameters())


@pytest.mark.parametrize(
    "norm",
    [nn.InstanceNorm2d(12), nn.BatchNorm2d(12, affine=False, track_running_stats=False)],
    ids=lambda n: type(n).__name__,
)
def test_norms_without_tensors_know_their_new_width(norm):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.norm = nn.Conv2d(3, 12, 3, bias=False), norm
            self.deep, self.point = nn.Conv2d(12, 24, 3, groups=12), nn.Conv2d(24, 8, 1)  # groups that need our tracing
            self.a, self.b = nn.Conv2d(8, 1, 1), nn.Conv2d(8, 1, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.point(self.deep(self.norm(self.first(x)).relu()).relu()).relu()
            return self.a(hidden), self.b(hidden)

    model = Net()
    remove(model, X)
    assert model.norm.num_features == model.first.out_channels < 12
    model(X)  # InstanceNorm warns of another number
