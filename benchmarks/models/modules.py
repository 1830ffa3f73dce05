"""The rows of ``structured_coverage.py`` as users write them: one small network for each kind of block."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Case, plain, randomize


class Heads(nn.Module):
    """Two heads on the features of a block between two convolutions, of 3 to 16 and ``width`` to 24 channels."""

    def __init__(self, block: nn.Module, width: int = 16, dims: int = 2) -> None:
        super().__init__()
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.stem, self.block, self.neck = kind(3, 16, 3, padding=1), block, kind(width, 24, 1)
        self.dense, self.label = kind(24, 2, 1), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return a map and a vector."""
        h = self.neck(self.block(self.stem(x).relu())).relu()
        return self.dense(h), self.label(h.flatten(2).mean(2))


class Recurrent(nn.Module):
    """A recurrent layer between two linear ones."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.enter, self.rnn, self.leave = nn.Linear(8, 16), kind(16, 24, batch_first=True), nn.Linear(24, 32)
        self.a, self.b = nn.Linear(32, 3), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return a sequence and a vector."""
        h = self.leave(self.rnn(self.enter(x).relu())[0]).relu()
        return self.a(h), self.b(h[:, -1])


class SqueezeExcite(nn.Module):
    """Gates of channels, from their means."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Gate."""
        return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class LinearSqueezeExcite(nn.Module):
    """The same with linear layers and a view that knows the width."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.down, self.up = 16, nn.Linear(16, 4), nn.Linear(4, 16)

    def forward(self, x: Tensor) -> Tensor:
        """Gate."""
        gate = self.up(self.down(x.mean((2, 3))).relu()).sigmoid()
        return x * gate.view(x.shape[0], self.width, 1, 1)


class C2f(nn.Module):
    """The block of YOLOv8: halves, a chain on the second, and all together again."""

    def __init__(self, split: bool) -> None:
        super().__init__()
        self.split, self.half = split, 8
        self.enter, self.leave = nn.Conv2d(16, 16, 1), nn.Conv2d(32, 16, 1)
        self.chain = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Run the chain."""
        x = self.enter(x)
        parts = list(x.split((self.half, self.half), 1) if self.split else x.chunk(2, 1))
        for layer in self.chain:
            parts.append(F.silu(layer(parts[-1])) + parts[-1])
        return F.silu(self.leave(torch.cat(parts, 1)))


class GatedLinear(nn.Module):
    """A gated linear unit over channels: one convolution for value and gate."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.leave = nn.Conv2d(16, 48, 1), nn.Conv2d(24, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Gate."""
        return self.leave(F.glu(self.both(x), 1))


class ChunkedGate(GatedLinear):
    """The same by chunk, as SwiGLU in many language models."""

    def forward(self, x: Tensor) -> Tensor:
        """Gate."""
        value, gate = self.both(x).chunk(2, 1)
        return self.leave(value * F.silu(gate))


class Partial(nn.Module):
    """The block of FasterNet: a convolution on a part of the channels, the others untouched."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.rest = 4, 12
        self.conv, self.mix = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve the first channels."""
        one, two = x.split((self.part, self.rest), 1)
        return self.mix(torch.cat([self.conv(one), two], 1))


class Mixture(nn.Module):
    """Experts weighed by a router."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 24, 1), nn.ReLU(), nn.Conv2d(24, 16, 1)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Mix."""
        weights = self.router(x.mean((2, 3))).softmax(1)
        return torch.stack([e(x) * w[:, None, None, None] for e, w in zip(self.experts, weights.T, strict=True)]).sum(0)


class Pyramid(nn.Module):
    """Fusion of levels with learned weights, up and down again (BiFPN)."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(16, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.fuse, self.weights = nn.Conv2d(16, 16, 3, padding=1), nn.Parameter(torch.ones(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Fuse."""
        low = self.down(x)
        weights = self.weights.relu() / (self.weights.relu().sum(1, keepdim=True) + 1e-4)
        high = self.up(weights[0, 0] * x + weights[0, 1] * F.interpolate(low, scale_factor=2.0))
        low = self.fuse(weights[1, 0] * low + weights[1, 1] * F.max_pool2d(high, 2))
        return high + F.interpolate(low, scale_factor=2.0)


class Shuffle(nn.Module):
    """The block of ShuffleNet: half goes through, and channels are shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8))

    def forward(self, x: Tensor) -> Tensor:
        """Shuffle."""
        one, two = x.chunk(2, 1)
        x = torch.cat([one, self.branch(two)], 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class SelfAttention(nn.Module):
    """Single-head attention over places, with 1x1 convolutions and flattened maps (SAGAN, MAnet)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 1), nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        q, k, v = self.q(x).flatten(2), self.k(x).flatten(2), self.v(x).flatten(2)
        return x + (v @ (q.transpose(1, 2) @ k).softmax(1)).reshape(x.shape)


class LayerScale(nn.Module):
    """A residual branch with a bare scale for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.conv = nn.Parameter(torch.rand(16)), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch."""
        return x + self.scale.view(1, -1, 1, 1) * self.conv(x)


class Dense(nn.Module):
    """Every layer reads all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(16 + 8 * n, 8, 3, padding=1) for n in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate."""
        for layer in self.layers:
            x = torch.cat([x, layer(x).relu()], 1)
        return x


class Residual(nn.Module):
    """A residual block with a norm of choice."""

    def __init__(self, norm: Callable[[int], nn.Module], groups: int = 1) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(16, 16, 3, padding=1, groups=groups), nn.Conv2d(16, 16, 3, padding=1)
        self.norm = norm(16)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch."""
        return x + self.two(self.norm(self.one(x)).relu())


class Transformer(nn.Module):
    """torch's own encoder on a sequence."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.enter, self.body = nn.Linear(8, 32), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.a, self.b = nn.Linear(32, 3), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return a sequence and a vector."""
        h = self.body(self.enter(x))
        return self.a(h), self.b(h.mean(1))


_IMAGE, _SEQUENCE = (2, 3, 16, 16), (2, 9, 8)
_ROWS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LSTM": (lambda: Recurrent(nn.LSTM), _SEQUENCE),
    "GRU": (lambda: Recurrent(nn.GRU), _SEQUENCE),
    "TransformerEncoder": (Transformer, _SEQUENCE),
    "Conv1d": (lambda: Heads(nn.Conv1d(16, 16, 3, padding=1), dims=1), (2, 3, 32)),
    "Conv3d": (lambda: Heads(nn.Conv3d(16, 16, 3, padding=1), dims=3), (2, 3, 8, 8, 8)),
    "transposed": (lambda: Heads(nn.ConvTranspose2d(16, 16, 2, 2)), _IMAGE),
    "grouped transposed": (lambda: Heads(nn.ConvTranspose2d(16, 16, 2, 2, groups=4)), _IMAGE),
    "PixelShuffle": (lambda: Heads(nn.Sequential(nn.Conv2d(16, 64, 1), nn.PixelShuffle(2))), _IMAGE),
    "PixelUnshuffle": (lambda: Heads(nn.PixelUnshuffle(2), 64), _IMAGE),
    "grouped": (lambda: Heads(Residual(nn.BatchNorm2d, groups=4)), _IMAGE),
    "depthwise separable": (
        lambda: Heads(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 16, 1))), _IMAGE,
    ),
    "depthwise multiplier": (lambda: Heads(nn.Conv2d(16, 32, 3, padding=1, groups=16), 32), _IMAGE),
    "GroupNorm": (lambda: Heads(Residual(lambda width: nn.GroupNorm(4, width))), _IMAGE),
    "InstanceNorm": (lambda: Heads(Residual(lambda width: nn.InstanceNorm2d(width, affine=True))), _IMAGE),
    "PReLU": (lambda: Heads(Residual(lambda width: nn.PReLU(width))), _IMAGE),
    "squeeze-excite": (lambda: Heads(SqueezeExcite()), _IMAGE),
    "squeeze-excite, linear": (lambda: Heads(LinearSqueezeExcite()), _IMAGE),
    "C2f, chunk": (lambda: Heads(C2f(split=False)), _IMAGE),
    "C2f, split": (lambda: Heads(C2f(split=True)), _IMAGE),
    "GLU": (lambda: Heads(GatedLinear()), _IMAGE),
    "SwiGLU by chunk": (lambda: Heads(ChunkedGate()), _IMAGE),
    "partial convolution": (lambda: Heads(Partial()), _IMAGE),
    "mixture of experts": (lambda: Heads(Mixture()), _IMAGE),
    "BiFPN": (lambda: Heads(Pyramid()), _IMAGE),
    "channel shuffle": (lambda: Heads(Shuffle()), _IMAGE),
    "attention over places": (lambda: Heads(SelfAttention()), _IMAGE),
    "layer scale": (lambda: Heads(LayerScale()), _IMAGE),
    "dense block": (lambda: Heads(Dense(), 40), _IMAGE),
    "flatten to linear": (
        lambda: Heads(
            nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(256, 64), nn.Unflatten(1, (16, 2, 2)))
        ),
        _IMAGE,
    ),
}  # fmt: skip
NAMES = tuple(_ROWS)


def build(name: str) -> Case:
    """Build a network, and inputs for it."""
    make, shape = _ROWS[name]
    return plain(randomize(make()), torch.randn(shape))
