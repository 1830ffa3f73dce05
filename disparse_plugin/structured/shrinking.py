"""Removing channels from layers: the tensors and numbers that the table of layers names."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .layer_rule import Axis, Side
from .layers import rule_of


def tensors_of(layer: nn.Module, side: Side) -> Iterator[tuple[nn.Module, str, Axis, Tensor]]:
    """Yield the tensors of a layer that shrink with one side: owner, name in the owner, axis, tensor."""
    rule = rule_of(layer)
    for axis in rule.axes(layer, side) if rule is not None else ():
        path, _, name = axis.name.rpartition(".")
        owner = layer.get_submodule(path)
        tensor = owner._parameters.get(name, owner._buffers.get(name))
        if tensor is not None:
            yield owner, name, axis, tensor


def kept_of(count: int, gone: Tensor) -> Tensor:
    """Return the positions that are left, ascending.

    Example:
        >>> kept_of(4, torch.tensor([1, 2])).tolist()
        [0, 3]
    """
    left = torch.ones(count, dtype=torch.bool)
    left[gone] = False
    return left.nonzero().flatten()


def cut(tensor: Tensor, axis: Axis, count: int, gone: Tensor) -> Tensor:
    """Keep the positions of a tensor that a removal leaves, in their order.

    Args:
        tensor: Any shape.
        axis: How the channels lie in it.
        count: How many channels there are.
        gone: int64, those that go.

    Returns:
        A new tensor, on the same device.

    Example:
        >>> cut(torch.arange(6.0).view(2, 3), Axis("weight", 1), 3, torch.tensor([1]))
        tensor([[0., 2.],
                [3., 5.]])
    """
    if axis.blocks == 1:
        kept = torch.cat([kept_of(count, gone) + number * count for number in range(axis.repeats)])
        return tensor.index_select(axis.dim, kept.to(tensor.device))
    width = count // axis.blocks
    assert tensor.shape[0] % axis.blocks == 0
    parts = []
    for number, part in enumerate(tensor.chunk(axis.blocks, 0)):
        own = gone[(gone >= number * width) & (gone < (number + 1) * width)] - number * width
        parts.append(part.index_select(axis.dim, kept_of(width, own).to(tensor.device)))
    return torch.cat(parts)


def replace(owner: nn.Module, name: str, tensor: Tensor, grad: Tensor | None = None) -> None:
    """Put a smaller tensor in the place of a parameter or buffer.

    Whether it wants gradients stays, its memory format, and what others have written on it (``_no_weight_decay``, ...).
    """
    old = owner._parameters.get(name)
    tensor = _in_format_of(old, tensor)
    if old is None:
        owner._buffers[name] = tensor
        return
    smaller = nn.Parameter(tensor, requires_grad=old.requires_grad)
    smaller.grad = grad
    vars(smaller).update(vars(old))
    owner._parameters[name] = smaller


def _in_format_of(old: Tensor | None, tensor: Tensor) -> Tensor:
    """Return the tensor as channels_last where the old one is that and nothing else."""
    last = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
    if old is None or tensor.dim() not in (4, 5) or old.is_contiguous() or not old.is_contiguous(memory_format=last):
        return tensor
    return tensor.contiguous(memory_format=last)


def shrink(layer: nn.Module, side: Side, gone: Tensor) -> None:
    """Remove channels from one side of a layer whose type is in the table, in place.

    Args:
        layer: The layer; its parameters become new objects.
        side: ``"out"`` or ``"in"``.
        gone: int64, positions that go.

    Example:
        >>> norm = nn.LayerNorm(4)
        >>> shrink(norm, "out", torch.tensor([0]))
        >>> norm.normalized_shape, norm.weight.shape
        ((3,), torch.Size([3]))
    """
    rule = rule_of(layer)
    assert rule is not None
    count = rule.count(layer, side)
    assert count is not None
    with torch.no_grad():
        for owner, name, axis, _ in list(tensors_of(layer, side)):
            tensor = owner._parameters.get(name, owner._buffers.get(name))  # as cut along another axis before
            assert tensor is not None
            grad = None if tensor.grad is None else cut(tensor.grad, axis, count, gone)
            replace(owner, name, cut(tensor, axis, count, gone), grad)
    rule.resize(layer, side, count - len(gone))
