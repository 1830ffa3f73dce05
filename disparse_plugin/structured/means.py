"""Layers with code of their own that take means over their channels, found by trying.

RMSNorm has many classes (Llama, Qwen, T5, Gemma), and so have the norms over responses (ConvNeXt V2) and convolutions
whose weights are standardised (NFNet). Such a layer computes with fewer channels what it should: its means are over
those that are left, as in LayerNorm. It is no name that tells them, but that nothing changes if every channel stands
twice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .cuts import Cut
from .layer_rule import Axis
from .layers import makes_channels, rule_of
from .shrinking import cut as cut_tensor
from .shrinking import kept_of, shrink, tensors_of

# From a layer, its inputs and its output to the output as it is over the channels that are left; None: it stays.
Hook = Callable[[nn.Module, tuple[Any, ...], Any], Tensor | None]
_ERRORS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)


def has_own_code(layer: nn.Module) -> bool:
    """Tell whether a layer, with none inside, has Parameters and a forward that is not torch's.

    Norms and their subclasses are not meant where the table of layers says what they compute.
    """
    torchs = type(layer).forward.__module__.startswith("torch.nn.")
    return not torchs and next(layer.children(), None) is None and (makes_channels(layer) or rule_of(layer) is None)


def over_kept(full: nn.Module, cuts: Sequence[Cut]) -> Hook | None:
    """Make what lets a layer with code of its own compute over the channels that are left.

    Args:
        full: A copy of a layer that has its own code, as it was before.
        cuts: What it loses: sides of the layer, and Parameters in it.

    Returns:
        A forward hook, or None for a layer that keeps some Parameter or none of its inputs.

    Example:
        >>> class Norm(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gain = nn.Parameter(torch.ones(4))
        ...     def forward(self, x):
        ...         return self.gain * x / x.square().mean(-1, keepdim=True).sqrt()
        >>> hook = over_kept(Norm(), [Cut("norm.gain", "parameter", 0, 4, torch.tensor([2, 3]))])
        >>> x = torch.tensor([[3.0, 3.0, 1.0, 1.0]])
        >>> hook(Norm(), (x,), Norm()(x)).tolist()
        [[1.0, 1.0, 0.0, 0.0]]
    """
    return _of_convolution(full, cuts) if makes_channels(full) else _of_same_width(full, cuts)


def _of_same_width(full: nn.Module, cuts: Sequence[Cut]) -> Hook | None:
    """Handle a layer of which every Parameter has an entry for each channel."""
    dims = {cut.target.rpartition(".")[2]: cut.dim for cut in cuts}
    alike = all(c.count == cuts[0].count and torch.equal(c.positions, cuts[0].positions) for c in cuts)
    if not alike or set(dims) != {name for name, parameter in full._parameters.items() if parameter is not None}:
        return None
    count, gone = cuts[0].count, cuts[0].positions
    smaller = _changed(full, dims, lambda dim, tensor: cut_tensor(tensor, Axis("", dim), count, gone))
    twice = _changed(full, dims, lambda dim, tensor: torch.cat([tensor, tensor], dim))
    known: dict[torch.Size, int | None] = {}

    def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
            return None
        if inputs[0].shape not in known:
            known[inputs[0].shape] = _mean_dim(full, twice, inputs[0], count)
        dim = known[inputs[0].shape]
        if dim is None:
            return None
        places = kept_of(count, gone).to(output.device)
        value = smaller.train(layer.training)(inputs[0].index_select(dim, places))
        return torch.zeros_like(output).index_copy(dim, places, value.to(output.dtype))

    return hook


def _changed(full: nn.Module, dims: dict[str, int], change: Callable[[int, Tensor], Tensor]) -> nn.Module:
    other = copy.deepcopy(full)
    for name, dim in dims.items():
        _change(other, name, partial(change, dim))
    return other


def _change(layer: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Put another tensor in the place of a Parameter or buffer."""
    parameter, buffer = layer._parameters.get(name), layer._buffers.get(name)
    if parameter is not None:
        layer._parameters[name] = nn.Parameter(change(parameter.detach()), parameter.requires_grad)
    elif buffer is not None:
        layer._buffers[name] = change(buffer)


def _mean_dim(full: nn.Module, twice: nn.Module, like: Tensor, count: int) -> int | None:
    """Return the dimension of an input in which every channel can stand twice, or None."""
    x = _random(like.shape).to(like)
    for dim in reversed(range(x.dim())):
        if x.shape[dim] == count:
            expected = _tried(full, x)
            found = _tried(twice, torch.cat([x, x], dim))
            if expected is None or found is None or expected.shape != x.shape:
                continue
            if _equal(found, torch.cat([expected, expected], dim)):
                return dim
    return None


def _of_convolution(full: nn.Module, cuts: Sequence[Cut]) -> Hook | None:
    """Handle a convolution, or a linear layer, that changes its weights before it multiplies with them."""
    own = {cut.side: cut for cut in cuts if cut.side != "parameter"}
    extra = {cut.target.rpartition(".")[2]: cut for cut in cuts if cut.side == "parameter"}
    if "in" not in own or getattr(full, "transposed", False):
        return None
    smaller, twice, rule = copy.deepcopy(full), copy.deepcopy(full), rule_of(full)
    assert rule is not None
    shrink(smaller, {side: cut.positions for side, cut in own.items()})
    for name, cut in extra.items():
        _change(smaller, name, partial(_without, cut))
    for owner, name, axis, tensor in list(tensors_of(twice, "in")):
        owner._parameters[name] = nn.Parameter(torch.cat([tensor, tensor], axis.dim).detach())
    rule.resize(twice, {"in": 2 * own["in"].count})
    kept = {side: kept_of(cut.count, cut.positions) for side, cut in own.items()}
    known: list[bool] = []

    def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        dim = rule.channel_dim(full, inputs[0])
        if not known:
            x = _random(inputs[0].shape).to(inputs[0])
            blocks = x.unflatten(dim, (getattr(full, "groups", 1), -1))
            doubled = torch.cat([blocks, blocks], dim + 1).flatten(dim, dim + 1)
            expected, found = _tried(full, x), _tried(twice, doubled / 2)
            known.append(expected is not None and found is not None and _equal(found, expected))
        if not known[0]:
            return None
        value: Tensor = smaller.train(layer.training)(inputs[0].index_select(dim, kept["in"].to(inputs[0].device)))
        if "out" not in kept:
            return value
        return torch.zeros_like(output).index_copy(dim, kept["out"].to(output.device), value)

    return hook


def _without(cut: Cut, tensor: Tensor) -> Tensor:
    return cut_tensor(tensor, Axis("", cut.dim), cut.count, cut.positions)


def _random(shape: Sequence[int]) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _tried(layer: nn.Module, x: Tensor) -> Tensor | None:
    mode = layer.training
    try:
        with torch.no_grad():
            out = layer.eval()(x)
    except _ERRORS:
        return None
    finally:
        layer.train(mode)
    return out if isinstance(out, Tensor) else None


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one.cpu().double(), other.cpu().double(), rtol=1e-2, atol=1e-4)
