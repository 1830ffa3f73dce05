"""The same network with channels masked instead of removed: what a correct removal must compute."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..parameters import keys_by_name, module_names
from .applying import Pruners
from .attention import attention_heads, head_dim_left, scale_by_kept
from .copies import copied
from .cuts import Cut
from .groups import Follower, parameter_slices
from .hooks import after_forward
from .layers import rule_of
from .means import has_own_code, over_kept
from .shrinking import kept_of, shrink

_Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]


def masked_copy(model: nn.Module, cuts: Iterable[Cut], *, customized_pruners: Pruners | None = None) -> nn.Module:
    """Copy a model and silence the positions of a removal, leaving all shapes as they are.

    Weights at the positions are zero on both sides, so nothing goes in or out. Norms take their statistics over the
    remaining channels, and attention its scale from the remaining head width, as they do after a removal. If the cuts
    are consistent, this copy and the model after the removal have the same outputs, up to rounding.

    Args:
        model: The full model; not changed.
        cuts: The cuts of a plan.
        customized_pruners: As in torch-pruning, by class, if they were used to make the cuts. Such a layer is taken
            to be right by itself: it runs with the channels that are left, and the others are zero.

    Returns:
        The masked copy, in evaluation mode.
    """
    return mask(copied(model).eval(), list(cuts), customized_pruners)


def mask(model: nn.Module, cuts: list[Cut], customized_pruners: Pruners | None = None) -> nn.Module:
    """Silence the positions of a removal in a model itself; see :func:`masked_copy`."""
    modules = {name: module for module, name in module_names(model).items()}
    parameters = {name: module._parameters[key] for name, (module, key) in keys_by_name(model).items()}
    pruners = customized_pruners or {}
    owners = dict.fromkeys(_owner(cut) for cut in cuts)
    full = {name: copy.deepcopy(modules[name]) for name in owners if _computes_otherwise(modules[name], pruners)}
    with torch.no_grad():
        for cut in cuts:
            if cut.side == "parameter" and cut.target not in parameters:
                model.get_buffer(cut.target).index_fill_(cut.dim, cut.positions, 0.0)
                continue
            layer = parameters[cut.target] if cut.side == "parameter" else modules[cut.target]
            assert layer is not None
            follower = Follower(cut.target, layer, cut.side, cut.dim, cut.count, cut.positions, cut.positions)
            for piece in parameter_slices(follower):
                _silence(parameters[piece.name], piece.dim, piece.blocks, piece.positions)
        for owner in owners:
            _over_kept(modules[owner], full.get(owner), [cut for cut in cuts if _owner(cut) == owner], pruners)
        _rescale(model, [cut for cut in cuts if cut.side == "out"], modules)
    for parent in dict.fromkeys(cut.target.rpartition(".")[0] for cut in cuts if cut.side == "out"):
        scale_by_kept(modules[parent])
    return model


def _owner(cut: Cut) -> str:
    return cut.target.rpartition(".")[0] if cut.side == "parameter" else cut.target


def _silence(parameter: nn.Parameter | None, dim: int, blocks: int, positions: Tensor) -> None:
    assert parameter is not None
    if blocks == 1:
        parameter.index_fill_(dim, positions.to(parameter.device), 0.0)
        return
    width, height = parameter.shape[1], parameter.shape[0] // blocks
    for position in positions.tolist():
        block, place = divmod(position, width)
        parameter[block * height : (block + 1) * height, place] = 0.0


def _computes_otherwise(layer: nn.Module, pruners: Pruners) -> bool:
    """Tell whether a layer may compute something else with zeros than with fewer channels."""
    rule = rule_of(layer)
    return type(layer) in pruners or has_own_code(layer) or (rule is not None and rule.over is not None)


def _over_kept(layer: nn.Module, full: nn.Module | None, cuts: Sequence[Cut], pruners: Pruners) -> None:
    """Let a layer compute as it will with fewer channels, where zero weights are not enough for that."""
    rule = rule_of(layer)
    if full is not None and has_own_code(full):
        if (hook := over_kept(full, cuts)) is not None:
            after_forward(layer, hook)
        return
    for cut in [cut for cut in cuts if cut.side != "parameter"]:
        kept = kept_of(cut.count, cut.positions)
        if full is not None and rule is None and cut.side == "out":
            pruners[type(layer)].prune_out_channels(full, cut.positions.tolist())
            after_forward(layer, _through(full, kept, partial(_channel_dim, cut.count)))
        elif full is not None and rule is not None and rule.over is not None:
            over, original = rule.over, copy.deepcopy(full)
            shrink(full, {"out": cut.positions})
            after_forward(layer, _through(full, kept, partial(over, original)))
        elif rule is not None:
            rule.adjust(layer, len(kept))
            if rule.silent_dim is not None:
                after_forward(layer, partial(_silenced, kept, rule.silent_dim))


def _through(smaller: nn.Module, kept: Tensor, dim_of: Callable[[Tensor], int]) -> _Hook:
    """Make a hook that runs a smaller layer on the channels that are left, and gives zeros for the others."""

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        dim, places = dim_of(inputs[0]), kept.to(output.device)
        smaller.train(layer.training)
        value = smaller(inputs[0].index_select(dim, places))
        return torch.zeros_like(output).index_copy(dim, places, value.to(output.dtype))

    return hook


def _silenced(kept: Tensor, dim: int, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output * _column(kept, output, dim)


def _channel_dim(count: int, x: Tensor) -> int:
    if x.dim() > 2 and x.shape[1] == count:
        return 1
    return next((dim for dim in reversed(range(x.dim())) if x.shape[dim] == count), x.dim() - 1)


def _column(kept: Tensor, like: Tensor, dim: int) -> Tensor:
    shape = [1] * like.dim()
    shape[dim] = -1
    return kept_mask(kept, like.shape[dim]).to(like).view(shape)


def kept_mask(kept: Tensor, count: int) -> Tensor:
    """Return a bool vector that is True at the given positions."""
    flags = torch.zeros(count, dtype=torch.bool)
    flags[kept] = True
    return flags


def _rescale(model: nn.Module, outs: list[Cut], modules: dict[str, nn.Module]) -> None:
    """Give attention layers of timm the scale of the head width that is left."""
    heads = attention_heads(model)
    for module in model.modules():
        qkv = module._modules.get("qkv")
        if not isinstance(qkv, nn.Linear) or qkv not in heads or "scale" not in module.__dict__:
            continue
        gone = [cut.positions for cut in outs if modules[cut.target] is qkv]
        if gone:
            width = head_dim_left(qkv.out_features // 3, heads[qkv], torch.cat(gone))
            module.__dict__["scale"] = width**-0.5
