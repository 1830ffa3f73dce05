"""What remove_channels must find out before it changes anything: outputs that differ, and heads that nobody traced."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disparse_plugin.structured import remove_channels, replay_removal
from disparse_plugin.structured.masked_copy import masked_copy


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


class MeanNorm(nn.Module):
    """Computes with the mean of all its channels, so that a removal is not masking, whatever one does."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6)


class Boxes(nn.Module):
    """Boxes in pixels and probabilities in one tensor, as YOLO in evaluation mode."""

    def __init__(self, pixels: float) -> None:
        super().__init__()
        self.pixels, self.stem = pixels, nn.Conv2d(3, 16, 3, 2, 1)
        self.box1, self.box2 = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 4, 1)
        self.class1, self.norm, self.class2 = nn.Conv2d(16, 32, 3, padding=1), MeanNorm(), nn.Conv2d(32, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).relu()
        boxes = F.softplus(self.box2(self.box1(h).relu())) * self.pixels
        classes = self.class2(self.norm(self.class1(h).relu())).mul(3).sigmoid()
        return torch.cat([boxes, classes], 1).flatten(2)


@pytest.mark.parametrize("pixels", [1.0, 640.0])
def test_boxes_do_not_hide_probabilities(pixels: float) -> None:
    def losses(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        out = model(x)
        target = torch.full_like(out[:, 4:], 0.1)
        return {"box": (out[:, :4] / pixels).sub(0.3).square().mean(), "cls": (out[:, 4:] - target).square().mean()}

    model, x = Boxes(pixels).eval(), torch.randn(2, 3, 16, 16)
    report = remove_channels(model, losses, [x], x, 0.5)
    assert model.class1.out_channels == 32
    assert "differ from those with masked channels" in report.skipped["class1"]
    assert model.stem.out_channels < 16
    assert report.deviation < 1e-9


class Policy(nn.Module):
    """Logits of which some are filled, and a value; the first layer is followed by a mean over its channels."""

    def __init__(self, fill: float | None, extra: str, zero: bool) -> None:
        super().__init__()
        self.fill, self.extra = fill, extra
        self.first, self.second = nn.Linear(10, 32), nn.Linear(32, 32)
        self.pi, self.value = nn.Linear(32, 6), nn.Linear(32, 1)
        if zero:
            for layer in (self.pi, self.value):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.first(x).relu()
        h = self.second(h - h.mean(-1, keepdim=True)).relu()
        pi, value = self.pi(h), self.value(h)
        if self.fill is not None:
            pi = pi.masked_fill(torch.arange(6) >= 4, self.fill)
        out = {"pi": pi, "value": value}
        if self.extra == "bool":
            out["legal"] = pi > 0
        if self.extra == "int":
            out["best"] = pi.argmax(-1)
        if self.extra == "nan":
            out["value"] = value.masked_fill(torch.arange(4)[:, None] > 2, math.nan)
        return out


def policy_losses(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    out = model(x)
    return {"pi": -out["pi"].log_softmax(-1)[:, 0].mean(), "value": out["value"].nan_to_num().sub(1).square().mean()}


@pytest.mark.filterwarnings("ignore:scores.*score exactly zero")
@pytest.mark.parametrize(
    ("fill", "extra", "zero"),
    [
        (None, "", False),
        (-1e4, "", False),
        (-1e9, "", False),
        (torch.finfo(torch.float32).min, "", False),
        (-math.inf, "", False),
        (None, "bool", False),
        (None, "int", False),
        (None, "nan", False),
        (None, "", True),
    ],
    ids=["plain", "-1e4", "-1e9", "lowest", "-inf", "bool", "int", "nan", "zero heads"],
)
def test_fills_and_kinds_of_output_hide_nothing(fill: float | None, extra: str, zero: bool) -> None:
    """What is removed is what can be: the second layer. The first is followed by a mean, and is named."""
    model, x = Policy(fill, extra, zero).eval(), torch.randn(4, 10)
    full = copy.deepcopy(model)
    report = remove_channels(model, policy_losses, [x], x, 0.5)
    assert model.first.out_features == 32
    assert "differ from those with masked channels" in report.skipped["first"]
    assert model.second.out_features == 16
    soft = masked_copy(full, report.plan.cuts)
    for one, other in zip(soft(x).values(), model(x).values(), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


def test_the_reason_names_what_differed() -> None:
    model, x = Policy(None, "", False).eval(), torch.randn(4, 10)
    reason = remove_channels(model, policy_losses, [x], x, 0.5).skipped["first"]
    assert "output['pi'] of the forward in evaluation mode: entry [" in reason


def test_what_to_compare_is_the_users_choice() -> None:
    """It sees the outputs of every forward; losses and what enters the last layers are compared all the same."""
    model, x = Policy(None, "", False).eval(), torch.randn(4, 10)
    chosen: list[int] = []

    def compare(outputs: dict[str, Tensor]) -> Tensor:
        chosen.append(1)
        return outputs["value"]

    report = remove_channels(model, policy_losses, [x], x, 0.5, compare=compare)
    assert chosen
    assert "what enters" in report.skipped["first"] or "output of" in report.skipped["first"]


@pytest.mark.parametrize(
    ("compare", "rule"),
    [
        (lambda outputs: outputs["typo"], "compare: must take the outputs of the model as it is"),
        (lambda outputs: None, "compare: must return at least one tensor"),
    ],
)
def test_what_to_compare_must_be_there(compare: Any, rule: str) -> None:
    model, x = Policy(None, "", False).eval(), torch.randn(4, 10)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rule):
        remove_channels(model, policy_losses, [x], x, 0.5, compare=compare)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Leaning(nn.Module):
    """Adds a little of the mean over the channels, which is another mean over fewer of them."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share, self.first, self.second = share, nn.Linear(10, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.first(x).square()
        return {"a": self.second(hidden + self.share * hidden.mean(1, keepdim=True))}


def test_a_small_difference_is_a_difference() -> None:
    x = torch.randn(4, 10)
    exact, leaning = Leaning(0.0).eval(), Leaning(5e-6).eval()
    remove_channels(exact, lambda m, b: {"a": m(b)["a"].square().mean()}, [x], x, 0.5)
    assert exact.first.out_features == 8
    with pytest.raises(ValueError, match=r"'first': .* differ"):
        remove_channels(leaning, lambda m, b: {"a": m(b)["a"].square().mean()}, [x], x, 0.5)
    assert leaning.first.out_features == 16


class TrainOnly(nn.Module):
    def __init__(self, pooled_norm: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)
        pooled: list[nn.Module] = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 8, 1, bias=not pooled_norm)]
        self.image = nn.Sequential(*pooled, *([nn.BatchNorm2d(8), nn.ReLU()] if pooled_norm else []))
        self.seg, self.cls, self.aux = nn.Conv2d(40, 3, 1), nn.Linear(32, 5), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.first(x).relu()
        g = self.second(h).relu()
        p = self.image(g).expand(-1, -1, *g.shape[2:])
        out = {"seg": self.seg(torch.cat([g, p], 1)), "cls": self.cls(g.mean((2, 3)))}
        if self.training:
            out["aux"] = self.aux(h)
        return out


@pytest.mark.parametrize("in_losses", [False, True])
@pytest.mark.parametrize(("pooled_norm", "batch"), [(False, 2), (True, 2), (True, 1)])
def test_a_head_of_training_only(pooled_norm: bool, batch: int, in_losses: bool) -> None:
    """With a batch of one, BatchNorm on pooled features cannot train: the losses' own batch shows the head then.

    Where the losses reach the head it is traced and loses inputs; where nobody does, its inputs stay.
    """

    def losses(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        out = model(x)
        found = {"seg": out["seg"].square().mean(), "cls": out["cls"].logsumexp(1).mean()}
        return {**found, "aux": out["aux"].square().mean()} if in_losses else found

    model = TrainOnly(pooled_norm)
    model.train(in_losses)
    report = remove_channels(model, losses, [torch.randn(4, 3, 16, 16)], torch.randn(batch, 3, 16, 16), 0.5)
    out = model.train()(torch.randn(4, 3, 16, 16))
    assert out["aux"].shape == (4, 3, 16, 16)
    assert model.second.out_channels < 32
    if in_losses:
        assert model.aux.in_channels == model.first.out_channels < 16
        assert report.skipped["aux"] == "makes an output of the model"
    else:
        assert model.aux.in_channels == model.first.out_channels == 16
        assert "training mode" in report.skipped["first"]


class Targets(nn.Module):
    """Runs a head more in training, and returns losses then, as torchvision's detectors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1)
        self.seg, self.cls, self.aux = nn.Conv2d(24, 3, 1), nn.Linear(24, 5), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        h = self.first(x).relu()
        g = self.second(h).relu()
        seg, cls = self.seg(g), self.cls(g.mean((2, 3)))
        if not self.training:
            return seg, cls
        assert y is not None
        aux = F.cross_entropy(self.aux(h), y)
        return {"seg": F.cross_entropy(seg, y), "cls": cls.logsumexp(1).mean(), "aux": aux}


@pytest.mark.parametrize("with_target", [False, True])
def test_a_forward_that_needs_targets_in_training(with_target: bool) -> None:
    x, y = torch.randn(4, 3, 8, 8), torch.randint(0, 3, (4, 8, 8))
    model = Targets().train()
    report = remove_channels(model, lambda m, b: m(*b), [(x, y)], (x, y) if with_target else x, 0.5)
    assert set(report.skipped) == {"seg", "cls", "aux"}
    assert all(value.isfinite() for value in model.train()(x, y).values())
    assert model.aux.in_channels == model.first.out_channels < 16


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        label = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
        self.heads = nn.ModuleDict({"depth": nn.Linear(16, 1), "label": label})

    def forward(self, x: Tensor, task: str) -> Tensor:
        return self.heads[task](self.trunk(x))


def routed_losses(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return {"depth": model(x, "depth").square().mean(), "label": model(x, "label").logsumexp(1).mean()}


@pytest.mark.parametrize("training", [False, True])
def test_heads_that_the_example_does_not_run_follow_the_trunk(training: bool) -> None:
    model, x = Routed().train(training), torch.randn(4, 8)
    report = remove_channels(model, routed_losses, [x], (x, "depth"), 0.5)
    assert model.heads["label"][0].in_features == model.heads["depth"].in_features < 16
    assert model(x, "label").shape == (4, 3)
    assert set(report.skipped) == {"heads.depth", "heads.label.2"}
    assert report.parameters.after == sum(p.numel() for p in model.parameters())
    assert all(bool(loss.isfinite()) for loss in routed_losses(model, x).values())


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.deep = nn.Linear(16, 12)
        self.a, self.b = nn.Linear(12, 2), nn.Linear(12, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x).relu()
        h = (self.one(h) if x.mean() > 0 else self.two(h)).relu()
        h = self.deep(h).relu()
        return self.a(h), self.b(h)


def two_losses(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    a, b = model(batch)
    return {"a": a.square().mean(), "b": b.sub(1).square().mean()}


def test_an_expert_that_only_a_later_batch_runs() -> None:
    model, x = Experts(), torch.randn(4, 8)
    report = remove_channels(model, two_losses, [x.abs(), -x.abs()], x.abs(), 0.5)
    assert model.trunk.out_features == model.one.out_features == 16
    assert "losses" in report.skipped["trunk"]
    assert report.skipped["two"] == "runs in some batches only, which were not traced"
    assert model.deep.out_features < 12
    two_losses(model, -x.abs())


class LanguageModel(nn.Module):
    """An embedding whose weight is that of the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(20, 16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.norm, self.words, self.tag = nn.LayerNorm(16), nn.Linear(16, 20, bias=False), nn.Linear(16, 4)
        self.words.weight = self.embed.weight

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        h = self.embed(ids)
        h = self.norm(h + self.second(self.first(h).relu()))
        return self.words(h), self.tag(h)


def test_a_shared_parameter_is_cut_once_and_stays_shared(tmp_path: Any) -> None:
    model, ids = LanguageModel().eval(), torch.randint(0, 20, (4, 7))
    full = sum(p.numel() for p in model.parameters())
    report = remove_channels(model, two_losses, [ids], ids, 0.5)
    assert model.words.weight is model.embed.weight
    assert model.words.weight.shape == (20, model.norm.normalized_shape[0])
    assert model.norm.normalized_shape[0] < 16
    assert (report.parameters.before, report.parameters.after) == (full, sum(p.numel() for p in model.parameters()))
    report.save(tmp_path / "removal.safetensors")
    fresh = LanguageModel().eval()
    replay_removal(fresh, tmp_path / "removal.safetensors")
    assert fresh.words.weight is fresh.embed.weight
    fresh.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(fresh(ids), model(ids), strict=True))


class HalfTied(nn.Module):
    """One weight of two layers: both can lose outputs, but only one reads channels that could go."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 10)
        self.two.weight = self.one.weight
        self.deep, self.a, self.b = nn.Linear(10, 12), nn.Linear(12, 2), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.stem(x).relu()
        return self.a(self.deep(self.one(h).relu()).relu()), self.b(self.two(x.repeat(1, 2)[:, :10]).relu())


def test_layers_that_share_a_parameter_lose_the_same_or_are_refused_by_both_names() -> None:
    model, x = HalfTied(), torch.randn(3, 6)
    full = copy.deepcopy(model)
    report = remove_channels(model, two_losses, [x], x, 0.5)
    assert model.one.weight is model.two.weight
    assert model.one.out_features == model.two.out_features == len(model.one.weight) < 10
    assert model.one.in_features == model.two.in_features == model.stem.out_features == 10
    assert report.skipped["stem"] == (
        "one.weight and two.weight share one Parameter, of which only one would lose channels"
    )
    for one, other in zip(masked_copy(full, report.plan.cuts)(x), model(x), strict=True):
        torch.testing.assert_close(one, other)
    assert all(out.isfinite().all() for out in model(x))


class OwnNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.rand(width) + 0.5), nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain[:, None, None] + self.shift[:, None, None]


class Normed(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first, self.norm1, self.second = nn.Conv2d(3, 16, 3, padding=1), norm(16), nn.Conv2d(16, 12, 1)
        self.norm2, self.a, self.b = norm(12), nn.Conv2d(12, 3, 1), nn.Conv2d(12, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.norm2(self.second(self.norm1(self.first(x)).relu())).relu()
        return self.a(h), self.b(h)


def _cutter(names: tuple[str, ...]) -> Any:
    import torch_pruning as tp

    class Cutter(tp.pruner.function.BasePruningFunc):  # type: ignore[misc]
        def prune_out_channels(self, layer: nn.Module, idxs: list[int]) -> nn.Module:
            keep = [i for i in range(len(getattr(layer, names[0]))) if i not in set(idxs)]
            for name in names:
                value = getattr(layer, name)[keep].detach()
                setattr(layer, name, nn.Parameter(value) if name in layer._parameters else value)
            return layer

        prune_in_channels = prune_out_channels

        def get_out_channels(self, layer: nn.Module) -> int:
            return len(getattr(layer, names[0]))

        get_in_channels = get_out_channels

    return Cutter()


@pytest.mark.parametrize("own", [False, True], ids=["our table", "customized_pruners"])
@pytest.mark.parametrize("kind", ["frozen", "own"])
def test_norms_that_torch_pruning_does_not_know(kind: str, own: bool) -> None:
    frozen = pytest.importorskip("torchvision.ops", reason="needs torchvision").FrozenBatchNorm2d
    norm = frozen if kind == "frozen" else OwnNorm
    names = ("weight", "bias", "running_mean", "running_var") if kind == "frozen" else ("gain", "shift")
    model, x = Normed(norm).eval(), torch.randn(2, 3, 8, 8)
    for module in model.modules():
        if isinstance(module, frozen):
            module.bias.uniform_(0.1, 1)
            module.running_mean.uniform_(-0.3, 0.3)
    full = copy.deepcopy(model)
    pruners = {norm: _cutter(names)} if own else None
    report = remove_channels(model, two_losses, [x], x, 0.5, customized_pruners=pruners)
    assert model.first.out_channels + model.second.out_channels == 14
    soft = masked_copy(full, report.plan.cuts, customized_pruners=pruners)
    for one, other in zip(soft(x), model(x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_an_amount_that_cannot_be_reached_says_how_far_and_why() -> None:
    model, x = Experts(), torch.randn(4, 8)
    with pytest.raises(ValueError, match=r"at most .* can be removed.*What holds the rest: .*makes an output"):
        remove_channels(model, two_losses, [x.abs()], x.abs(), 0.99, of="parameters")


class Named(NamedTuple):
    """A batch whose entries have names."""

    image: Tensor
    label: Tensor


@dataclasses.dataclass
class Record:
    """A batch that is a record."""

    image: Tensor
    label: Tensor


class Encoding(UserDict[str, Tensor]):
    """A batch as tokenizers make it: a mapping that keeps its entries in ``data``."""

    def __init__(self, image: Tensor, label: Tensor) -> None:
        super().__init__(image=image, label=label)

    def __getattr__(self, name: str) -> Tensor:
        return self.data[name]


@pytest.mark.parametrize("kind", [Named, Record, Encoding, SimpleNamespace], ids=lambda kind: kind.__name__)
def test_a_batch_of_any_kind_is_tried_in_double_precision(kind: Any) -> None:
    """What is not known as a container is passed on as it is; the trial is then in the precision of the model."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    batch, seen = kind(image=torch.randn(2, 3, 8, 8), label=torch.tensor([0, 1])), set()

    def losses(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        seen.add((batch.image.dtype, batch.label.dtype))
        out = model(batch.image)
        return {"a": out.square().mean(), "b": F.cross_entropy(out, batch.label)}

    report = remove_channels(model, losses, [batch], torch.randn(2, 3, 8, 8), 0.5)
    assert model[0].out_channels == 4
    assert report.deviation < 1e-5
    types = {torch.float32} if kind is SimpleNamespace else {torch.float32, torch.float64}
    assert seen == {(dtype, torch.int64) for dtype in types}


class ShuffledBranch(nn.Module):
    """A residual branch that shuffles its channels, behind a scale that may start at nothing."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 1)
        self.second, self.scale = nn.Conv2d(16, 8, 1), nn.Parameter(torch.full((8, 1, 1), scale))
        self.a, self.b = nn.Conv2d(8, 3, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        inner = self.first(x)
        shuffled = inner.unflatten(1, (2, inner.shape[1] // 2)).transpose(1, 2).flatten(1, 2)
        x = x + self.scale * self.second(shuffled.relu())
        return self.a(x), self.b(x)


def _of_two_heads(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    a, b = model(x)
    return {"a": a.square().mean(), "b": b.logsumexp(1).mean()}


@pytest.mark.parametrize("scale", [1.0, 1e-6, 0.0])
def test_a_branch_that_gives_nothing_yet_hides_nothing(scale: float) -> None:
    model = ShuffledBranch(scale).eval()
    full, x = copy.deepcopy(model), torch.randn(2, 3, 8, 8)
    report = remove_channels(model, _of_two_heads, [x], x, 0.5, exclude=["stem", "scale"])
    (gone,) = [cut.positions for cut in report.plan.cuts if cut.target == "first"]
    assert len(gone) == 8
    with torch.no_grad():
        for layer in (full.first.weight, full.first.bias):
            layer[gone] = 0
        full.scale.fill_(1)
        model.scale.fill_(1)
        for masked, removed in zip(full(x), model(x), strict=True):
            torch.testing.assert_close(removed, masked)


class Context(nn.Module):
    """Attention over the last places, of which there are as many as the heads are wide together, by chance."""

    size = (10, 8)

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.max_len = 4, 16, 64
        self.stem, self.a, self.b = nn.Linear(8, 64), nn.Linear(64, 3), nn.Linear(64, 2)
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)[:, -self.max_len :]
        q, k, v = (layer(x).unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)
                   for layer in (self.q, self.k, self.v))  # fmt: skip
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.a(x), self.b(x)


class Halves(nn.Module):
    """Halves of a stored width, in windows that are as wide, by chance."""

    size = (3, 32, 32)

    def __init__(self) -> None:
        super().__init__()
        self.half, self.window = 16, 16
        self.stem, self.inner, self.outer = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 32, 1), nn.Conv2d(16, 8, 1)
        self.a, self.b = nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.pad(self.stem(x), (0, -x.shape[-1] % self.window, 0, -x.shape[-2] % self.window))
        one, other = self.inner(x).split([self.half, self.half], 1)
        x = self.outer(one * other.sigmoid()).mean((2, 3))
        return self.a(x), self.b(x)


@pytest.mark.parametrize(
    ("kind", "changed", "kept", "larger"),
    [(Context, "num_heads", ("max_len", 64), (64, 8)), (Halves, "half", ("window", 16), (3, 24, 24))],
)
def test_numbers_that_equal_a_width_by_chance_stay(kind: Any, changed: str, kept: Any, larger: tuple[int, ...]) -> None:
    model, x = kind().eval(), torch.randn(2, *kind.size)
    full = copy.deepcopy(model)
    report = remove_channels(model, _of_two_heads, [x], x, 0.5, exclude=["stem"])
    assert getattr(model, changed) < getattr(full, changed)
    assert getattr(model, kept[0]) == kept[1]
    x = torch.randn(1, *larger)
    for masked, removed in zip(masked_copy(full, report.plan.cuts)(x), model(x), strict=True):
        torch.testing.assert_close(removed, masked)


class Mixer(nn.Module):
    """An MLP over tokens, between channels that go: before it other entries are gone than those that it loses."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.over_tokens = nn.Sequential(nn.Linear(9, 14), nn.GELU(), nn.Linear(14, 9))
        self.norm, self.over_channels = nn.LayerNorm(12), nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))
        self.heads = nn.ModuleDict({"a": nn.Linear(12, 2), "b": nn.Linear(12, 3)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.patches(x).flatten(2)
        x = (x + self.over_tokens(x)).transpose(1, 2)
        x = (x + self.over_channels(self.norm(x))).mean(1)
        return {task: head(x) for task, head in self.heads.items()}


def test_a_layer_over_tokens_loses_channels_beside_those_of_its_input() -> None:
    model, x = Mixer(), torch.randn(4, 3, 12, 12)
    report = remove_channels(
        model, lambda model, x: {task: y.square().mean() for task, y in model(x).items()}, [x], x, 0.5
    )
    assert set(report.skipped) == {"heads.a", "heads.b", "over_tokens.2"}  # that gives one output for each token
    assert report.deviation < 1e-9
    widths = (model.patches.out_channels, model.over_tokens[0].out_features, model.over_channels[0].out_features)
    assert all(left < full for left, full in zip(widths, (12, 14, 20), strict=True))
    assert model.over_tokens[2].out_features == 9


@pytest.mark.parametrize("kind", ["numpy", "calls"])
def test_losses_that_differ_from_call_to_call_are_run_and_not_compared(kind: str) -> None:
    calls = []

    def losses(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        calls.append(0)
        weight = np.random.default_rng().random() if kind == "numpy" else 1 / len(calls)
        a, b = model(x)
        return {"a": weight * a.square().mean(), "b": b.logsumexp(1).mean()}

    model, x = ShuffledBranch(1.0).eval(), torch.randn(2, 3, 8, 8)
    full = copy.deepcopy(model)
    report = remove_channels(model, losses, [x], x, 0.5)
    assert set(report.skipped) == {"a", "b"}
    masked = masked_copy(full, report.plan.cuts)
    for expected, removed in zip(masked(x), model(x), strict=True):
        torch.testing.assert_close(removed, expected)
