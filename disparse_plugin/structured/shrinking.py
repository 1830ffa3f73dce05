"""Removing channels from layers: the tensors and numbers that the table of layers names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .._support.stand_in import stand_in
from .layer_rule import Axis, Side
from .layers import rule_of


def tensors_of(layer: nn.Module, side: Side) -> Iterator[tuple[nn.Module, str, Axis, Tensor]]:
    """Yield the tensors of a layer that shrink with one side: owner, name in the owner, axis, tensor."""
    for owner, name, axis in _axes_of(layer, side):
        tensor = owner._parameters.get(name, owner._buffers.get(name))
        if tensor is not None:
            yield owner, name, axis, tensor


def made_tensors(layer: nn.Module, side: Side) -> list[str]:
    """Name the tensors that would shrink with one side, but that the layer makes (masks, parametrizations)."""
    return [
        name
        for owner, name, _ in _axes_of(layer, side)
        if name not in owner._parameters
        and name not in owner._buffers
        and (is_parametrized(owner, name) or isinstance(vars(owner).get(name), Tensor))
    ]


def _axes_of(layer: nn.Module, side: Side) -> Iterator[tuple[nn.Module, str, Axis]]:
    rule = rule_of(layer)
    for axis in rule.axes(layer, side) if rule is not None else ():
        path, _, name = axis.name.rpartition(".")
        yield layer.get_submodule(path), name, axis


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
    return cut_along(tensor, [Loss(axis, count, gone)])


@dataclasses.dataclass(frozen=True)
class Loss:
    """What a tensor loses along one axis: of how many channels which ones (int64)."""

    axis: Axis
    count: int
    gone: Tensor


def cut_along(tensor: Tensor, losses: Sequence[Loss]) -> Tensor:
    """Keep what a tensor is left with after all that it loses, along several axes at once.

    Args:
        tensor: Any shape.
        losses: At most one of them in blocks of dimension 0. A block of which everything goes goes as a whole.

    Returns:
        A new tensor, on the same device.

    Raises:
        ValueError: As :func:`check_blocks`.
    """
    check_blocks(tensor, losses)
    for loss in losses:
        if loss.axis.blocks == 1 and not _rows_of_blocks(tensor, loss, losses):
            kept = torch.cat([kept_of(loss.count, loss.gone) + n * loss.count for n in range(loss.axis.repeats)])
            tensor = tensor.index_select(loss.axis.dim, kept.to(tensor.device))
    for loss in losses:
        if loss.axis.blocks > 1:
            parts = [
                part.index_select(0, rows.to(tensor.device)).index_select(loss.axis.dim, columns.to(tensor.device))
                for part, rows, columns in zip(
                    tensor.chunk(loss.axis.blocks, 0), *_kept_in_blocks(tensor, loss, losses), strict=True
                )
                if len(rows)
            ]
            tensor = torch.cat(parts)
    return tensor


def check_blocks(tensor: Tensor, losses: Sequence[Loss]) -> None:
    """Check that the blocks of a tensor (the groups of a convolution) that are left are of one size.

    Raises:
        ValueError: If they are not.
    """
    for loss in losses:
        if loss.axis.blocks > 1:
            kept = zip(*_kept_in_blocks(tensor, loss, losses), strict=True)
            sizes = {(len(rows), len(columns)) for rows, columns in kept} - {(0, 0)}
            if len(sizes) != 1 or 0 in next(iter(sizes)):
                raise ValueError(
                    f"model: the {loss.axis.blocks} groups of a convolution must be left with equally many channels, "
                    f"or lose all, found (outputs, inputs) left in them {sorted(sizes)}; remove alike from each"
                )


def _rows_of_blocks(tensor: Tensor, loss: Loss, losses: Sequence[Loss]) -> bool:
    """Tell whether a loss is of the rows that another one cuts in blocks."""
    return loss.axis.dim % tensor.dim() == 0 and any(other.axis.blocks > 1 for other in losses)


def _kept_in_blocks(tensor: Tensor, loss: Loss, losses: Sequence[Loss]) -> tuple[list[Tensor], list[Tensor]]:
    """Return which rows and which columns of each block stay."""
    rows = torch.arange(tensor.shape[0])
    for other in losses:
        if other.axis.blocks == 1 and _rows_of_blocks(tensor, other, losses):
            rows = kept_of(other.count, other.gone)
    columns = kept_of(loss.count, loss.gone)
    return _by_block(rows, tensor.shape[0], loss.axis.blocks), _by_block(columns, loss.count, loss.axis.blocks)


def _by_block(positions: Tensor, count: int, blocks: int) -> list[Tensor]:
    width = count // blocks
    return [positions[positions // width == number] - number * width for number in range(blocks)]


def replace(owner: nn.Module, name: str, tensor: Tensor, grad: Tensor | None = None) -> None:
    """Put a smaller tensor in the place of a parameter or buffer.

    Whether it wants gradients stays, its memory format, and what others have written on it (``_no_weight_decay``, ...).
    """
    old = owner._parameters.get(name)
    if old is None:
        owner._buffers[name] = tensor
        return
    smaller = stand_in(old, tensor)
    assert isinstance(smaller, nn.Parameter)
    smaller.grad = grad
    owner._parameters[name] = smaller


def shrink(layer: nn.Module, gone: Mapping[Side, Tensor]) -> None:
    """Remove channels from a layer whose type is in the table, in place.

    Args:
        layer: The layer; its parameters become new objects.
        gone: For each side that loses some, ``"out"`` or ``"in"``, which positions go (int64).

    Raises:
        ValueError: As :func:`check_blocks`; the layer is as before.

    Example:
        >>> norm = nn.LayerNorm(4)
        >>> shrink(norm, {"out": torch.tensor([0])})
        >>> norm.normalized_shape, norm.weight.shape
        ((3,), torch.Size([3]))
    """
    rule = rule_of(layer)
    assert rule is not None
    by_tensor: dict[tuple[nn.Module, str], list[Loss]] = {}
    left: dict[Side, int] = {}
    for side, positions in gone.items():
        count = rule.count(layer, side)
        assert count is not None
        left[side] = count - len(positions)
        for owner, name, axis, _ in tensors_of(layer, side):
            by_tensor.setdefault((owner, name), []).append(Loss(axis, count, positions))
    smaller = []
    with torch.no_grad():
        for (owner, name), losses in by_tensor.items():
            tensor = owner._parameters.get(name, owner._buffers.get(name))
            assert tensor is not None
            grad = None if tensor.grad is None else cut_along(tensor.grad, losses)
            smaller.append((owner, name, cut_along(tensor, losses), grad))
        for entry in smaller:
            replace(*entry)
    rule.resize(layer, left)
