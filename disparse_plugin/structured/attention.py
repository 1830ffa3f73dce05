"""Attention layers that hold numbers about their own width: how many heads, how wide, which scale."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..kinds import check_kind


def attention_heads(model: nn.Module) -> dict[nn.Module, int]:
    """Find attention layers that make query, key and value in one Linear, as those of timm.

    Args:
        model: Any module.

    Returns:
        The ``qkv`` layer of each module that has one beside an integer ``num_heads``, to the number of heads. Layers
        whose queries, keys and values are of unlike width (EfficientFormer) are not among them.

    Raises:
        TypeError: If ``model`` is no module.
    """
    check_kind("model", model, nn.Module, "a torch.nn.Module")
    found: dict[nn.Module, int] = {}
    for module in model.modules():
        qkv, heads = module._modules.get("qkv"), getattr(module, "num_heads", None)
        if isinstance(qkv, nn.Linear) and isinstance(heads, int) and qkv.out_features % (3 * heads) == 0:
            told = {getattr(module, name, None) for name in ("head_dim", "key_dim")} - {None}
            if told <= {qkv.out_features // (3 * heads)}:
                found[qkv] = heads
    return found


def sync_attention(heads: Mapping[nn.Module, int], model: nn.Module) -> None:
    """Bring the attributes of attention layers into line with the shape of their query-key-value layer.

    timm's attention reads ``num_heads``, ``head_dim`` and ``scale`` in its forward. The scale becomes
    ``head_dim ** -0.5``, which is what ``scaled_dot_product_attention`` uses, so fused and plain attention agree.

    Args:
        heads: The heads that the query-key-value layers now have, for those that were pruned:
            ``pruner.num_heads``, or what :func:`~disparse_plugin.structured.attention_heads` found before.
        model: The model.

    Raises:
        TypeError: If an argument is of the wrong type.
    """
    check_kind("heads", heads, Mapping, "a mapping of query-key-value layers to numbers of heads")
    check_kind("model", model, nn.Module, "a torch.nn.Module")
    for module in model.modules():
        qkv = module._modules.get("qkv")
        if not isinstance(qkv, nn.Linear) or qkv not in heads:
            continue
        width = qkv.out_features // 3
        head_dim = width // heads[qkv]
        for name, value in {
            "num_heads": heads[qkv],
            "head_dim": head_dim,
            "attn_dim": width,
            "scale": head_dim**-0.5,
        }.items():
            if isinstance(module.__dict__.get(name), int | float):
                setattr(module, name, value)


def head_dim_left(width: int, heads: int, gone: Tensor) -> int:
    """Return how wide the heads are that are left, where some lose channels and some go as a whole."""
    left = torch.ones(width, dtype=torch.bool)
    left[gone[gone < width]] = False  # the rows of the queries; keys and values lose the same
    return int(left.view(heads, -1).sum(1).max())


class ScaleOfKept(TorchFunctionMode):
    """Lets torch's attention take its scale, where it chooses that itself, from the channels that are not all zero."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function of torch; give the attention a scale if it has none."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and len(args) < 8 and kwargs.get("scale") is None:
            query, key = (args[n] if len(args) > n else kwargs[name] for n, name in enumerate(("query", "key")))
            width = int(((query != 0).flatten(0, -2).any(0) | (key != 0).flatten(0, -2).any(0)).sum())
            kwargs = {**kwargs, "scale": max(1, width) ** -0.5}
        return func(*args, **kwargs)


def scale_by_kept(module: nn.Module) -> None:
    """Let a module run under :class:`ScaleOfKept` from now on."""
    entered: list[contextlib.ExitStack] = []

    def enter(_: nn.Module, __: Any) -> None:
        entered.append(contextlib.ExitStack())
        entered[-1].enter_context(ScaleOfKept())

    def leave(_: nn.Module, __: Any, ___: Any) -> None:
        if entered:
            entered.pop().close()

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)
