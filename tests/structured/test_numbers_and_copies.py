"""Numbers, activations and keywords that models carry along: only what a removal must change is changed."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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


class Queries(nn.Module):
    """Two queries that look at a longer sequence, whose keys and values are of one width or of two."""

    def __init__(self, kdim: int, *, by_name: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.by_name, self.rows = by_name, nn.Parameter(torch.randn(1, 2, 16))
        self.keys, self.values = nn.Linear(6, kdim), nn.Linear(6, 16)
        self.mix = nn.MultiheadAttention(16, 4, kdim=kdim, batch_first=True)
        self.wide, self.narrow = nn.Linear(16, 24), nn.Linear(24, 16)
        self.a, self.b = nn.Linear(16, 2), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = self.rows.expand(len(x), -1, -1), self.keys(x), self.values(x)[:, :20]
        key = key[:, :20]
        hidden = self.mix(value=value, query=query, key=key)[0] if self.by_name else self.mix(query, key, value)[0]
        hidden = self.narrow(self.wide(hidden).relu())
        return self.a(hidden), self.b(hidden)

    def macs(self) -> int:
        """Count by hand for three examples of 30 rows."""
        outside = 3 * 30 * (self.keys.weight.numel() + self.values.weight.numel())
        after = sum(layer.weight.numel() for layer in (self.mix.out_proj, self.wide, self.narrow, self.a, self.b))
        query, key, value = self.mix.embed_dim, self.mix.kdim, self.mix.vdim
        return outside + 3 * 2 * after + self.mix.embed_dim * 3 * (2 * query + 20 * key + 20 * value)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize(("kdim", "amount"), [(16, 0.2), (12, 0.05)])  # of two widths it stays whole
def test_keys_and_values_count_by_their_own_length(kdim: int, amount: float, by_name: bool):
    model = Queries(kdim, by_name=by_name).eval()
    before = model.macs()
    report = remove(model, torch.randn(3, 30, 6), of="macs", amount=amount)
    assert (report.macs.before, report.macs.after) == (before, model.macs())
    assert (model.mix.embed_dim < 16) == (kdim == 16)
    assert report.macs.removed >= amount


class Borrowing(nn.Module):
    """A net that gives the weights of layers, and one of its own, to functions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.up = nn.Conv2d(3, 16, 3), nn.ConvTranspose2d(16, 12, 2)
        self.mix, self.bare = nn.Linear(12, 16), nn.Parameter(torch.randn(8, 16) / 4)
        self.twice = nn.Linear(8, 8)
        self.same = nn.Linear(8, 8)
        self.same.weight = self.twice.weight
        self.a, self.b = nn.Linear(8, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.conv2d(x, self.first.weight, self.first.bias).relu()
        hidden = F.conv_transpose2d(hidden, bias=self.up.bias, weight=self.up.weight).flatten(2).mT
        hidden = F.linear(input=hidden, weight=self.mix.weight, bias=self.mix.bias).relu()
        hidden = F.linear(hidden, self.bare).relu()
        hidden = F.linear(self.same(self.twice(hidden)), self.twice.weight)
        return self.a(hidden), self.b(hidden)


def test_weights_that_other_modules_give_to_functions_count():
    from torch.utils.flop_counter import FlopCounterMode

    def macs() -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(X)
        return counter.get_total_flops() // 2

    model = Borrowing().eval()
    before = macs()
    report = remove(model, X, amount=0.2)
    assert (report.macs.before, report.macs.after) == (before, macs())
    assert report.macs.removed > 0


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
    model.kept = {"twice": [2 * model.features]}
    twin = copied(model)
    assert torch.equal(twin.features, model.features)
    assert torch.equal(twin.kept["twice"][0], 2 * model.features)
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
