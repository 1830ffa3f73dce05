"""Our own tracing: which channels go together, where torch-pruning's graph has no answer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from disparse_plugin.structured import remove_channels, replay_removal
from disparse_plugin.structured.tracing.labels import Labels

pytest.importorskip("timm", reason="the coverage script needs timm")
pytest.importorskip("segmentation_models_pytorch", reason="the coverage script needs segmentation-models-pytorch")
pytest.importorskip("transformers", reason="the coverage script needs transformers")
coverage: Any = pytest.importorskip("structured_coverage", reason="needs torch-pruning")
page: Any = pytest.importorskip("coverage_page")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.mark.parametrize("name", coverage.build.__globals__["modules"].NAMES)
def test_a_block_of_a_user_loses_what_was_asked(name: str) -> None:
    entry = coverage.row(f"modules/{name}")
    assert page.is_right(entry), entry
    assert not page.left_alone(entry), entry["skipped"]
    assert entry["parameters"] > 0.4


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], layers: int, bidirectional: bool) -> None:
        super().__init__()
        self.enter = nn.Linear(5, 8)
        self.rnn = kind(8, 12, layers, batch_first=True, bidirectional=bidirectional)
        self.a, self.b = (nn.Linear(24 if bidirectional else 12, n) for n in (3, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.rnn(self.enter(x))[0]
        return self.a(h[:, -1]), self.b(h.mean(1))


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_lose_inputs_and_hidden_channels(
    kind: type[nn.RNNBase], layers: int, bidirectional: bool
) -> None:
    """The smaller layer computes what one of that size computes with the weights that are left."""
    model, x = Recurrent(kind, layers, bidirectional).eval(), torch.randn(2, 6, 5)
    report = remove_channels(
        model, lambda model, x: {k: v.square().mean() for k, v in zip("ab", model(x), strict=True)}, [x], x, 0.5
    )
    assert set(report.skipped) == {"a", "b"}
    assert report.deviation < 1e-9
    assert model.enter.out_features == model.rnn.input_size < 8
    assert model.rnn.hidden_size < 12
    fresh = kind(model.rnn.input_size, model.rnn.hidden_size, layers, batch_first=True, bidirectional=bidirectional)
    fresh.load_state_dict(model.rnn.state_dict())
    h = model.enter(x)
    torch.testing.assert_close(model.rnn(h)[0], fresh(h)[0])


class Pieces(nn.Module):
    """Splits by a list that it holds, of equal and unequal sizes, and gates by single positions of the last piece."""

    def __init__(self) -> None:
        super().__init__()
        self.splits = [13, 12, 12, 2]
        self.stem, self.mix = nn.Conv2d(3, 39, 1), nn.Conv2d(37, 16, 1)
        self.one, self.two, self.three = (nn.Conv2d(n, n, 3, padding=1) for n in self.splits[:3])
        self.a, self.b = nn.Conv2d(16, 3, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        *pieces, gates = self.stem(x).split(self.splits, 1)
        h = [layer(piece) for layer, piece in zip((self.one, self.two, self.three), pieces, strict=True)]
        h = self.mix(torch.cat([h[0] * gates[:, 0:1], h[1] * gates[:, 1:], h[2]], 1)).relu()
        return self.a(h), self.b(h)


def test_split_sizes_in_a_list_shrink_and_gates_that_are_picked_out_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Pieces().eval(), torch.randn(2, 3, 6, 6)
    fresh = copy.deepcopy(model)
    report = remove_channels(
        model, lambda model, x: {k: v.square().mean() for k, v in zip("ab", model(x), strict=True)}, [x], x, 0.5
    )
    assert set(report.skipped) == {"a", "b"}
    assert report.deviation < 1e-9
    assert type(model.splits) is list
    assert model.splits[3] == 2
    assert model.splits[:3] == [layer.in_channels for layer in (model.one, model.two, model.three)]
    assert sum(model.splits) == model.stem.out_channels < 39
    report.save(tmp_path / "removal.safetensors")
    replay_removal(fresh, tmp_path / "removal.safetensors")
    assert fresh.splits == model.splits
    assert type(fresh.splits) is list


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=4).map(tuple)


@settings(deadline=None)
@given(shapes(), st.data())
def test_labels_follow_their_positions_through_a_reshape(old: tuple[int, ...], data: st.DataObject) -> None:
    """Every position keeps its label; the labels of one dimension at most tell positions apart afterwards."""
    count = int(np.prod(old))
    new = data.draw(
        st.sampled_from([(count,), (1, count), (count, 1), *((d, count // d) for d in (2, 3, 4) if count % d == 0)])
    )
    dim, labels = data.draw(st.integers(0, len(old) - 1)), Labels()
    row = labels.fresh(old[dim]) if old[dim] > 1 else None
    rows = tuple(row if d == dim else None for d in range(len(old)))
    found = labels.reshaped(rows, old, new, whole=data.draw(st.booleans()))
    if row is None:
        assert all(one is None for one in found)
        return
    before = np.broadcast_to(row.reshape([-1 if d == dim else 1 for d in range(len(old))]), old).reshape(new)
    known = [(d, one) for d, one in enumerate(found) if one is not None]
    if not known:
        assert set(labels.classes(row).tolist()) == {0}
        return
    ((place, after),) = known
    spread = np.broadcast_to(after.reshape([-1 if d == place else 1 for d in range(len(new))]), new)
    np.testing.assert_array_equal(labels.classes(before), labels.classes(spread))


@pytest.mark.parametrize(("whole", "ties"), [(False, [0, 1, 2, 3, 0, 1, 2, 3]), (True, [0, 0, 0, 0, 1, 1, 1, 1])])
def test_heads_lose_width_or_go_as_a_whole(whole: bool, ties: list[int]) -> None:
    labels = Labels()
    row = labels.fresh(8)
    labels.reshaped((row,), (8,), (2, 4), whole)
    assert np.unique(labels.classes(row), return_inverse=True)[1].tolist() == ties


class GroupedQueries(nn.Module):
    """Four heads of queries, two of keys and values, repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.groups, self.width = 4, 2, 8
        self.q, self.k, self.v = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 16)
        self.o, self.a, self.b = nn.Linear(32, 16), nn.Linear(16, 3), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        n, t, _ = x.shape
        q = self.q(x).view(n, t, self.heads, self.width).transpose(1, 2)
        k, v = (layer(x).view(n, t, self.groups, self.width).transpose(1, 2) for layer in (self.k, self.v))
        repeats = self.heads // self.groups
        k, v = (y[:, :, None].expand(n, self.groups, repeats, t, self.width).reshape(q.shape) for y in (k, v))
        h = (q @ k.transpose(2, 3) * 0.3).softmax(-1) @ v
        h = self.o(h.transpose(1, 2).reshape(n, t, -1)).relu()
        return self.a(h), self.b(h)


class Windows(nn.Module):
    """Attention with a table of relative positions and a mask, whose merged neighbours are normalised (Swin)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.enter, self.qkv = 2, nn.Linear(6, 16), nn.Linear(16, 48)
        self.table = nn.Parameter(torch.randn(7, 2))
        self.register_buffer("places", torch.arange(4)[:, None] - torch.arange(4) + 3)
        self.proj, self.norm, self.merge = nn.Linear(16, 16), nn.LayerNorm(32), nn.Linear(32, 24)
        self.a, self.b = nn.Linear(24, 3), nn.Linear(24, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.enter(x)
        n, t, _ = x.shape
        qkv = F.linear(x, self.qkv.weight, self.qkv.bias)  # as torchvision's do
        q, k, v = qkv.reshape(n, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        apart = x.new_zeros((t, t))  # of x no more than the type
        apart[:2, 2:] = -1
        scores = 0.3 * q @ k.transpose(2, 3) + self.table[self.places].permute(2, 0, 1) + apart
        x = x + self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, -1))
        h = self.merge(self.norm(torch.cat([x[:, 0::2], x[:, 1::2]], -1))).relu()
        return self.a(h), self.b(h)


@pytest.mark.parametrize(("make", "width"), [(GroupedQueries, 16), (Windows, 6)])
def test_attentions_with_repeated_heads_or_tables(make: type[nn.Module], width: int) -> None:
    model, x = make(), torch.randn(2, 4, width)

    def losses(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        return {task: out.square().mean() + out.mean() for task, out in zip("ab", model(x), strict=True)}

    report = remove_channels(model, losses, [x], x, 0.5)
    assert set(report.skipped.values()) == {"makes an output of the model"}
    assert report.deviation < 1e-6
    assert report.parameters.removed > 0.5


def test_a_grouped_convolution_may_end_with_one_output_in_each_group() -> None:
    """Then it looks like a depthwise one, half-way through the removal."""
    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(16, 2, 1))

    def losses(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        out = model(x)
        return {"a": out[:, 0].square().mean(), "b": out[:, 1].square().mean()}

    x = torch.randn(2, 3, 8, 8)
    remove_channels(net, losses, [x], x, 0.6)
    assert (net[1].groups, net[1].in_channels % 4, net[1].out_channels % 4) == (4, 0, 0)
    assert net(x).shape == (2, 2, 8, 8)
