"""The same network with channels masked instead of removed: what a correct removal must compute."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..parameters import keys_by_name, module_names
from .attention import attention_heads, head_dim_left
from .groups import Follower, parameter_slices
from .plan import Cut


def masked_copy(model: nn.Module, cuts: Iterable[Cut]) -> nn.Module:
    """Copy a model and silence the positions of a removal, leaving all shapes as they are.

    Weights at the positions are zero on both sides, so nothing goes in or out. Norms take their statistics over the
    remaining channels, and attention its scale from the remaining head width, as they do after a removal. If the cuts
    are consistent, this copy and the model after the removal have the same outputs, up to rounding.

    Args:
        model: The full model; not changed.
        cuts: The cuts of a plan.

    Returns:
        The masked copy, in evaluation mode.
    """
    masked = copy.deepcopy(model).eval()
    modules = {name: module for module, name in module_names(masked).items()}
    parameters = {name: module._parameters[key] for name, (module, key) in keys_by_name(masked).items()}
    heads = attention_heads(masked)
    with torch.no_grad():
        for cut in cuts:
            layer = parameters[cut.target] if cut.side == "parameter" else modules[cut.target]
            assert layer is not None
            follower = Follower(cut.target, layer, cut.side, cut.dim, cut.count, cut.positions, cut.positions)
            for piece in parameter_slices(follower):
                _silence(parameters[piece.name], piece.dim, piece.blocks, piece.positions)
            if isinstance(layer, nn.Module):
                _norm_over_kept(layer, cut)
    for module in masked.modules():
        qkv = module._modules.get("qkv")
        if isinstance(qkv, nn.Linear) and qkv in heads and "scale" in module.__dict__:
            gone = [c.positions for c in cuts if c.side == "out" and modules[c.target] is qkv]
            if gone:
                module.__dict__["scale"] = head_dim_left(qkv.out_features // 3, heads[qkv], torch.cat(gone)) ** -0.5
            if "fused_attn" in module.__dict__:
                module.__dict__["fused_attn"] = False  # the fused product takes its scale from the full width
    return masked


def _silence(parameter: nn.Parameter | None, dim: int, blocks: int, positions: Tensor) -> None:
    assert parameter is not None
    if blocks == 1:
        parameter.index_fill_(dim, positions.to(parameter.device), 0.0)
        return
    width, height = parameter.shape[1], parameter.shape[0] // blocks
    for position in positions.tolist():
        block, place = divmod(position, width)
        parameter[block * height : (block + 1) * height, place] = 0.0


def _norm_over_kept(layer: nn.Module, cut: Cut) -> None:
    kept = torch.ones(cut.count, dtype=torch.bool)
    kept[cut.positions] = False
    if isinstance(layer, nn.LayerNorm | nn.GroupNorm):
        hook = _layer_norm(kept) if isinstance(layer, nn.LayerNorm) else _group_norm(kept)
        layer.register_forward_hook(hook)
    elif isinstance(layer, _NormBase) and not layer.affine:
        layer.register_forward_hook(lambda _, __, output: output * _column(kept, output, 1))


def _column(kept: Tensor, like: Tensor, dim: int) -> Tensor:
    shape = [1] * like.dim()
    shape[dim] = -1
    return kept.to(like).view(shape)


def _layer_norm(kept: Tensor) -> Callable[[nn.LayerNorm, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(layer: nn.LayerNorm, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        # Some subclasses (timm's LayerNorm2d) normalise over dimension 1.
        dim = _normalized_dim(layer, x)
        places = kept.nonzero().flatten().to(x.device)
        part = x.index_select(dim, places).movedim(dim, -1)
        weight = None if layer.weight is None else layer.weight[places]
        bias = None if layer.bias is None else layer.bias[places]
        value = F.layer_norm(part, (places.numel(),), weight, bias, layer.eps).movedim(-1, dim)
        return torch.zeros_like(output).index_copy(dim, places, value)

    return hook


def _normalized_dim(layer: nn.LayerNorm, x: Tensor) -> int:
    if type(layer).forward is nn.LayerNorm.forward or x.dim() != 4:
        return x.dim() - 1
    probe = nn.LayerNorm.forward(layer, x.movedim(1, -1)).movedim(-1, 1) if x.shape[1] == layer.weight.numel() else None
    saved, layer._forward_hooks = layer._forward_hooks, type(layer._forward_hooks)()
    try:
        same = probe is not None and torch.allclose(layer(x), probe, atol=1e-4)
    finally:
        layer._forward_hooks = saved
    return 1 if same else x.dim() - 1


def _group_norm(kept: Tensor) -> Callable[[nn.GroupNorm, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(layer: nn.GroupNorm, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        places = kept.nonzero().flatten().to(x.device)
        weight = None if layer.weight is None else layer.weight[places]
        bias = None if layer.bias is None else layer.bias[places]
        value = F.group_norm(x.index_select(1, places), layer.num_groups, weight, bias, layer.eps)
        return torch.zeros_like(output).index_copy(1, places, value)

    return hook
