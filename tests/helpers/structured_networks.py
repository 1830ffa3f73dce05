"""Small multi-task networks for the tests of structured pruning, and what the tests do with them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from disparse_plugin.structured import DiSparseImportance

INPUT = (2, 3, 16, 16)


class Residual(nn.Module):
    """A block of two convolutions and a shortcut, with the norm to be tested."""

    def __init__(self, width: int, norm: Callable[[int], nn.Module], groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.norm1 = norm(2 * width)
        self.conv2 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=groups)
        self.norm2 = norm(2 * width)
        self.conv3 = nn.Conv2d(2 * width, width, 1)
        self.norm3 = norm(width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(self.conv1(x)).relu()
        h = self.norm2(self.conv2(h)).relu()
        return (x + self.norm3(self.conv3(h))).relu()


class TwoTasks(nn.Module):
    """A trunk of residual blocks, a dense head with a transposed convolution, and a classifier."""

    def __init__(
        self,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        width: int = 16,
        groups: int = 1,
        transposed: bool = True,
    ) -> None:
        super().__init__()
        upsampled = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(2 * width, width, 1))
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = norm(width)
        self.blocks = nn.Sequential(Residual(width, norm, groups), Residual(width, norm, groups))
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2) if transposed else upsampled
        self.dense = nn.Sequential(nn.Conv2d(2 * width, width, 3, padding=1), nn.BatchNorm2d(width), nn.PReLU(width))
        self.dense_out = nn.Conv2d(width, 4, 1)
        self.hidden = nn.Linear(2 * width, 24)
        self.label_out = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        trunk = self.blocks(self.norm(self.stem(x)).relu())
        deep = self.down(trunk).relu()
        dense = self.dense(torch.cat([trunk, self.up(deep)], 1))
        return {"dense": self.dense_out(dense), "label": self.label_out(self.hidden(deep.mean((2, 3))).relu())}


class Block(nn.Module):
    """A transformer block written as timm writes it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.scale = self.head_dim**-0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q * self.scale @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, -1))


class TwoTaskTransformer(nn.Module):
    """Patches, a position embedding, two blocks, and two heads on the mean token."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, stride=4)
        self.position = nn.Parameter(0.1 * torch.randn(1, 16, width))
        self.blocks = nn.Sequential(Block(width, heads), Block(width, heads))
        self.norm = nn.LayerNorm(width)
        self.dense_out, self.label_out = nn.Linear(width, 4), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        tokens = self.patch(x).flatten(2).transpose(1, 2) + self.position
        tokens = self.norm(self.blocks(tokens))
        return {"dense": self.dense_out(tokens), "label": self.label_out(tokens.mean(1))}


class SeparateAttention(nn.Module):
    """An attention with a Linear each for query, key and value, and maybe fewer heads of keys than of queries."""

    def __init__(self, width: int, heads: int, key_heads: int) -> None:
        super().__init__()
        self.heads, self.key_heads, self.head_dim = heads, key_heads, width // heads
        self.q, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = (nn.Linear(width, key_heads * self.head_dim) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, self.heads, -1).transpose(1, 2)
        k, v = (layer(x).view(batch, tokens, self.key_heads, -1).transpose(1, 2) for layer in (self.k, self.v))
        if self.key_heads != self.heads:
            k, v = (value.repeat_interleave(self.heads // self.key_heads, 1) for value in (k, v))
        weights = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, tokens, -1))


class SeparateTransformer(nn.Module):
    """Patches, one such attention, two heads."""

    def __init__(self, heads: int = 4, key_heads: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 4, stride=4)
        self.attn = SeparateAttention(32, heads, key_heads)
        self.norm = nn.LayerNorm(32)
        self.dense_out, self.label_out = nn.Linear(32, 4), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        tokens = self.norm(tokens + self.attn(tokens))
        return {"dense": self.dense_out(tokens), "label": self.label_out(tokens.mean(1))}


def build(kind: str, seed: int = 0) -> nn.Module:
    """Make a network of a kind, with every norm off its initial values."""
    torch.manual_seed(seed)
    model = {
        "batchnorm": lambda: TwoTasks(),
        "upsampled": lambda: TwoTasks(transposed=False),
        "grouped": lambda: TwoTasks(groups=4),
        "depthwise": lambda: TwoTasks(groups=32),
        "groupnorm": lambda: TwoTasks(lambda width: nn.GroupNorm(4, width)),
        "instancenorm": lambda: TwoTasks(lambda width: nn.InstanceNorm2d(width, affine=True)),
        "transformer": lambda: TwoTaskTransformer(),
        "separate": lambda: SeparateTransformer(),
        "grouped-query": lambda: SeparateTransformer(key_heads=2),
    }[kind]()
    return randomized(model)


def randomized(model: nn.Module) -> nn.Module:
    """Draw the affine parameters and running statistics of all norms at random."""
    with torch.no_grad():
        for module in model.modules():
            for name in ("weight", "bias", "running_mean"):
                tensor = getattr(module, name, None)
                if isinstance(tensor, Tensor) and tensor.dim() == 1:
                    tensor.uniform_(-1, 1).add_(name == "weight")
            if isinstance(getattr(module, "running_var", None), Tensor):
                module.running_var.uniform_(0.5, 2)
    return model.eval()


def losses(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    out = model(batch)
    return {"dense": out["dense"].square().mean(), "label": 1000 * out["label"].logsumexp(1).mean()}


def batches(count: int = 2, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(INPUT, generator=generator) for _ in range(count)]


def outputs_of(model: nn.Module) -> list[Tensor]:
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        out = model(batches(1, seed=5)[0])
    return list(out.values()) if isinstance(out, Mapping) else list(out)


def deviation(first: nn.Module, second: nn.Module) -> float:
    """Return the largest difference between the outputs of two networks, relative to the size of the outputs."""
    pairs = zip(outputs_of(first), outputs_of(second), strict=True)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def make_pruner(model: nn.Module, *, cls: Any = tp.pruner.BasePruner, options: Any = None, **arguments: Any) -> Any:
    """Make an importance that scores afresh, and a pruner to which it is attached."""
    importance = DiSparseImportance(**{"rescore": (losses, batches()), **(options or {})})
    arguments = {"pruning_ratio": 0.5, "global_pruning": True, **arguments}
    ignored = [model.dense_out, model.label_out, *arguments.pop("ignored_layers", [])]
    pruner = cls(model, (batches()[0],), importance=importance, ignored_layers=ignored, **arguments)
    importance.attach(pruner)
    return pruner
