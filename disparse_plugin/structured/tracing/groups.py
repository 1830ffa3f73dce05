"""Groups of channels from the labels of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ...parameters import module_names
from ..groups import ChannelGroup, Follower, StoredSize, join
from ..layer_rule import Side
from ..layers import makes_channels, rule_of, stores_channels
from ..shrinking import tensors_of
from .labels import Row
from .run import How, Run, Size, sides, watched


@dataclasses.dataclass(frozen=True)
class _End:
    """One side of a layer, or one dimension of a bare parameter, and the set of each of its positions."""

    target: str
    layer: nn.Module | Tensor
    side: Side
    dim: int
    classes: Row


def traced_groups(
    model: nn.Module,
    calls: Sequence[Callable[[nn.Module], Sequence[Tensor]]],
    kept: Collection[nn.Module | nn.Parameter],
    how: How,
) -> tuple[list[ChannelGroup], frozenset[str]]:
    """Find out which channels go together by running a model once.

    Args:
        model: A copy, which may be disturbed.
        calls: What to run; each returns tensors that keep their shapes.
        kept: Layers that keep their outputs, and bare parameters that keep their shapes.
        how: What happens where dimensions are cut and joined.

    Returns:
        The groups, by the layers of the copy; each position of a layer is in one of them at most. And the operations
        that are not known, through which nothing could be followed.
    """
    run = watched(model, calls, how)
    for layer in kept:
        if isinstance(layer, nn.Parameter):
            run.freeze(layer)
        elif rule_of(layer) is not None:
            run.labels.freeze(*(run.rows(t)[axis.dim] for _, _, axis, t in tensors_of(layer, "out")))
    ends, sizes = list(_ends(model, run)), run.sizes()
    roots = [e for e in ends if e.side == "out" and (makes_channels(e.layer) or stores_channels(e.layer))]
    taken, groups = {0}, list[ChannelGroup]()
    for root in sorted(roots, key=lambda end: -len(np.unique(end.classes))):
        free = ~np.isin(root.classes, list(taken))
        if not free.any():
            continue
        own, units = np.unique(root.classes[free], return_inverse=True)
        taken |= set(own.tolist())
        first = {int(label): int(np.argmax(root.classes[free] == label)) for label in own}
        followers = [_follower(root, free, None)]
        followers += [_follower(end, np.isin(end.classes, own), first) for end in ends if end is not root]
        size = int(free.sum())
        groups.append(
            ChannelGroup(
                root.target,
                size,
                torch.from_numpy(units.reshape(-1)),
                tuple(f for f in followers if len(f.positions)),
                tuple(_stored(size, how, n, first) for n, size in enumerate(sizes) if np.isin(size.classes, own).any()),
            )
        )
    return groups, frozenset(run.unknown)


def _stored(size: Size, how: How, number: int, first: dict[int, int]) -> StoredSize:
    channels = torch.tensor([first.get(int(label), -1) for label in size.classes], dtype=torch.int64)
    return StoredSize(size.module, how, number, size.cut, len(channels), channels)


def _follower(end: _End, mine: npt.NDArray[np.bool_], first: dict[int, int] | None) -> Follower:
    positions = np.flatnonzero(mine)
    channels = range(len(positions)) if first is None else [first[int(label)] for label in end.classes[positions]]
    return Follower(
        end.target, end.layer, end.side, end.dim, len(end.classes), torch.from_numpy(positions),
        torch.tensor(list(channels), dtype=torch.int64),
    )  # fmt: skip


def _ends(model: nn.Module, run: Run) -> Iterator[_End]:
    for module, name in module_names(model).items():
        rule = rule_of(module)
        axes = {id(t) for side in sides(module) for *_, t in tensors_of(module, side)} if rule is not None else set()
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            for dim, row in enumerate(run.rows(tensor) if tensor is not None and id(tensor) not in axes else ()):
                if row is not None and tensor is not None:
                    yield _End(join(name, key), tensor, "parameter", dim, run.labels.classes(row))
        for side in sides(module) if rule is not None else ():
            assert rule is not None
            count = rule.count(module, side)
            for _, _, axis, tensor in tensors_of(module, side):
                row = run.rows(tensor)[axis.dim]
                if count is not None and row is not None:
                    labels = run.labels.classes(row)
                    yield _End(name, module, side, -1, np.tile(labels, axis.blocks)[:count])
                break
