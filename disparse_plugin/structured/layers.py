"""What the removal of channels must know of each type of layer, in one table: a new type is one entry of ``RULES``.

Nothing else in this room asks for the type of a layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from ..parameters import class_if_loaded
from .layer_rule import Axis, LayerRule, Side, nothing
from .recurrent import RECURRENT


def is_depthwise(layer: nn.Module) -> bool:
    """Tell whether every output channel of a convolution has an input channel of its own."""
    return isinstance(layer, _ConvNd) and layer.groups == layer.out_channels > 1


def has_multiplier(layer: nn.Module) -> bool:
    """Tell whether every input channel of a convolution makes several outputs, so that it has no inputs to itself."""
    one_each = isinstance(layer, _ConvNd) and 1 < layer.groups == layer.in_channels < layer.out_channels
    return one_each and not layer.transposed


def _convolution_axes(layer: _ConvNd, side: Side) -> list[Axis]:
    if is_depthwise(layer) or has_multiplier(layer):
        return [Axis("weight", 0), Axis("bias", 0)]
    outer, inner = (1, 0) if layer.transposed else (0, 1)
    if side == "out":
        return [Axis("weight", outer, layer.groups if layer.transposed else 1), Axis("bias", 0)]
    return [Axis("weight", inner, 1 if layer.transposed else layer.groups)]


def has_own_inputs(layer: nn.Module) -> bool:
    """Tell whether a layer's inputs are not those of its outputs, so that it can lose the ones without the others."""
    rule = rule_of(layer)
    return rule is not None and not (rule.same or is_depthwise(layer) or has_multiplier(layer))


def _resize_convolution(layer: _ConvNd, left: Mapping[Side, int]) -> None:
    if is_depthwise(layer) or has_multiplier(layer):
        each = layer.out_channels // layer.in_channels
        layer.in_channels = layer.groups = left["out"] // each
        layer.out_channels = layer.in_channels * each
        return
    layer.in_channels, layer.out_channels = left.get("in", layer.in_channels), left.get("out", layer.out_channels)
    # What the weight says: whole groups may have gone.
    layer.groups = (layer.out_channels if layer.transposed else layer.in_channels) // layer.weight.shape[1]


def _convolution_uses(layer: _ConvNd, inputs: Sequence[Any], out: Tensor) -> dict[str, int]:
    rows = inputs[0].numel() // layer.in_channels if layer.transposed else out.numel() // layer.out_channels
    return {"weight": rows}


def _convolution_refusal(layer: _ConvNd) -> str | None:
    if is_depthwise(layer) and layer.in_channels != layer.out_channels:
        return "merges input channels group by group"
    if layer.transposed and 1 < layer.groups == layer.in_channels < layer.out_channels:
        return "is a transposed convolution in which each input makes several outputs of its own"
    return None


def _convolution_misread(layer: _ConvNd) -> str | None:
    if layer.transposed and layer.groups > 1 and not is_depthwise(layer):
        return "is a grouped transposed convolution"
    return "makes several outputs of each input" if has_multiplier(layer) else None


def _linear_uses(_: nn.Module, __: Sequence[Any], out: Tensor) -> dict[str, int]:
    return {"weight": out.numel() // max(1, out.shape[-1])}


def _resize(out: str, into: str) -> Callable[[Any, Mapping[Side, int]], None]:
    def write(layer: nn.Module, left: Mapping[Side, int]) -> None:
        for side, count in left.items():
            setattr(layer, out if side == "out" else into, count)

    return write


def _of_norm(*names: str) -> Callable[[Any, Side], list[Axis]]:
    return lambda _, __: [Axis(name, -1) for name in names]


def _attention_axes(_: nn.MultiheadAttention, __: Side) -> list[Axis]:
    """Rows of query, key and value, columns of the input, both sides of the output."""
    return [
        Axis("in_proj_weight", 1),
        Axis("in_proj_weight", 0, repeats=3),
        Axis("in_proj_bias", 0, repeats=3),
        Axis("out_proj.weight", 0),
        Axis("out_proj.weight", 1),
        Axis("out_proj.bias", 0),
    ]


def _resize_attention(layer: nn.MultiheadAttention, left: Mapping[Side, int]) -> None:
    (count,) = left.values()
    layer.embed_dim = layer.kdim = layer.vdim = count
    layer.head_dim = count // layer.num_heads
    layer.out_proj.in_features = layer.out_proj.out_features = count


def _rescale_attention(layer: nn.MultiheadAttention, count: int) -> None:
    """Multiply the queries such that the scale is that of narrower heads."""
    factor = (layer.embed_dim / count) ** 0.5
    assert layer.in_proj_weight is not None
    layer.in_proj_weight[: layer.embed_dim] *= factor
    if layer.in_proj_bias is not None:
        layer.in_proj_bias[: layer.embed_dim] *= factor


def _attention_uses(layer: nn.MultiheadAttention, inputs: Sequence[Any], _: Tensor) -> dict[str, Fraction | int]:
    """Count rows of queries, keys and values, of which each has a third of the weight to itself."""
    own = type(layer).forward is not nn.MultiheadAttention.forward  # its arguments may be others
    rows = [x.numel() // x.shape[-1] for x in ([inputs[0]] * 3 if own else inputs[:3])]
    if layer.in_proj_weight is None:
        return dict(
            zip(("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"), [*rows, rows[0]], strict=True)
        )
    return {"in_proj_weight": Fraction(sum(rows), 3), "out_proj.weight": rows[0]}


def _attention_refusal(layer: nn.MultiheadAttention) -> str | None:
    if layer.in_proj_weight is None or layer.bias_k is not None:
        return "is an attention whose keys and values are of another width, or have a bias of their own"
    return None


def _normalized_dim(layer: nn.LayerNorm, x: Tensor) -> int:
    """Find out over which dimension a LayerNorm works: some subclasses (timm's LayerNorm2d) take dimension 1."""
    if type(layer).forward is nn.LayerNorm.forward or x.dim() != 4 or x.shape[1] != layer.normalized_shape[0]:
        return x.dim() - 1
    if x.shape[-1] != x.shape[1]:
        return 1
    probe = nn.LayerNorm.forward(layer, x.movedim(1, -1)).movedim(-1, 1)
    return 1 if torch.allclose(layer.forward(x), probe, atol=1e-4) else x.dim() - 1


def _norm_refusal(layer: Any) -> str | None:
    shape = layer.normalized_shape
    return f"normalises over {len(shape)} dimensions" if len(shape) > 1 else None


_CONVOLUTION = LayerRule(
    axes=_convolution_axes,
    count=lambda layer, side: int(layer.in_channels if side == "in" else layer.out_channels),
    resize=_resize_convolution,
    same=False,
    channel_dim=lambda layer, x: x.dim() - len(layer.kernel_size) - 1,
    uses=_convolution_uses,
    refusal=_convolution_refusal,
    misread=_convolution_misread,
)
_LINEAR = LayerRule(
    axes=lambda _, side: [Axis("weight", 0), Axis("bias", 0)] if side == "out" else [Axis("weight", 1)],
    count=lambda layer, side: int(layer.in_features if side == "in" else layer.out_features),
    resize=_resize("out_features", "in_features"),
    same=False,
    uses=_linear_uses,
)
_TRANSPOSED_LINEAR = LayerRule(  # GPT-2 keeps its linear layers as (inputs, outputs)
    axes=lambda _, side: [Axis("weight", 1), Axis("bias", 0)] if side == "out" else [Axis("weight", 0)],
    count=lambda layer, side: int(layer.weight.shape[0 if side == "in" else 1]),
    resize=_resize("nf", "nx"),
    same=False,
    uses=_linear_uses,
    ours=True,
)
_BATCH_NORM = LayerRule(
    axes=_of_norm("weight", "bias", "running_mean", "running_var"),
    count=lambda layer, _: int(layer.num_features),
    resize=_resize("num_features", "num_features"),
    silent_dim=1,
)
_FROZEN_BATCH_NORM = LayerRule(
    axes=_of_norm("weight", "bias", "running_mean", "running_var"),
    count=lambda layer, _: len(layer.weight),
    resize=nothing,
    silent_dim=1,
    ours=True,
)
_LAYER_NORM = LayerRule(
    axes=_of_norm("weight", "bias"),
    count=lambda layer, _: int(layer.normalized_shape[-1]),
    resize=lambda layer, left: setattr(layer, "normalized_shape", (*layer.normalized_shape[:-1], *left.values())),
    over=_normalized_dim,
    refusal=_norm_refusal,
    ours=True,  # torch-pruning 1.6.1 permutes the weights
)
_RMS_NORM = dataclasses.replace(_LAYER_NORM, axes=_of_norm("weight"), over=lambda _, x: x.dim() - 1)
_GROUP_NORM = LayerRule(
    axes=_of_norm("weight", "bias"),
    count=lambda layer, _: int(layer.num_channels),
    resize=_resize("num_channels", "num_channels"),
    over=lambda _, __: 1,
)
_PRELU = LayerRule(
    axes=lambda layer, _: [Axis("weight", 0)] if layer.num_parameters > 1 else [],
    count=lambda layer, _: int(layer.num_parameters) if layer.num_parameters > 1 else None,
    resize=_resize("num_parameters", "num_parameters"),
)
_EMBEDDING = LayerRule(
    axes=lambda _, __: [Axis("weight", 1)],
    count=lambda layer, _: int(layer.embedding_dim),
    resize=_resize("embedding_dim", "embedding_dim"),
)
_ATTENTION = LayerRule(
    axes=_attention_axes,
    count=lambda layer, _: int(layer.embed_dim),
    resize=_resize_attention,
    adjust=_rescale_attention,
    uses=_attention_uses,
    folds=lambda layer: int(layer.num_heads),
    refusal=_attention_refusal,
)
# The first that fits counts. A string names a class of a package that may not be installed, as module:class.
RULES: tuple[tuple[type | str, LayerRule], ...] = (
    (_ConvNd, _CONVOLUTION),
    (nn.Linear, _LINEAR),
    (nn.MultiheadAttention, _ATTENTION),
    (nn.Embedding, _EMBEDDING),
    (nn.PReLU, _PRELU),
    (_NormBase, _BATCH_NORM),
    (nn.LayerNorm, _LAYER_NORM),
    (nn.RMSNorm, _RMS_NORM),
    (nn.GroupNorm, _GROUP_NORM),
    (nn.RNNBase, RECURRENT),
    ("torchvision.ops.misc:FrozenBatchNorm2d", _FROZEN_BATCH_NORM),
    ("transformers.pytorch_utils:Conv1D", _TRANSPOSED_LINEAR),
)


def rule_of(layer: object) -> LayerRule | None:
    """Return what is known of a layer; None for a type that is not in the table.

    Example:
        >>> rule_of(nn.Linear(4, 3)).count(nn.Linear(4, 3), "in"), rule_of(nn.ReLU())
        (4, None)
    """
    for kind, rule in RULES:
        if isinstance(layer, class_if_loaded(kind) if isinstance(kind, str) else kind):
            return rule
    return None


def stores_channels(layer: object) -> bool:
    """Tell whether a layer looks its channels up instead of making them: a root where nothing is added to them."""
    return rule_of(layer) is _EMBEDDING


def makes_channels(layer: object) -> bool:
    """Tell whether a layer makes channels of its own, as convolutions, linear and recurrent layers do."""
    rule = rule_of(layer)
    return rule in (_CONVOLUTION, _LINEAR, _TRANSPOSED_LINEAR, RECURRENT)
