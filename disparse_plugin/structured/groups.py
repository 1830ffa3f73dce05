"""What is removed together: channel groups.

A channel of a convolution cannot go alone. The next layer's input slice, the BatchNorm entry and the channels added to
it go with it. A :class:`ChannelGroup` lists them all as :class:`Follower`, in plain torch terms; where the list comes
from is the business of :mod:`disparse_plugin.structured.adapter.graph`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..kinds import check_flag
from ..parameters import ParameterKey, unwrap
from .layer_rule import Side
from .layers import rule_of
from .shrinking import tensors_of

FIXED = "meets a size that is fixed"
# Why a layer keeps its channels where it has none to lose.
SETTLED = (
    "makes an output of the model",
    "excluded",
    "runs but reaches no output",
    "does not run",
    "has one channel",
    FIXED,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Follower:
    """One dimension of a layer (or of a bare parameter) that loses positions with the channels of a group.

    Attributes:
        target: Qualified name of the module, or of the parameter if ``side`` is ``"parameter"``.
        layer: That module, parameter or buffer.
        side: Whether the layer loses outputs or inputs. Layers that have as many outputs as inputs by construction
            (norms, depthwise convolutions) are ``"out"``.
        dim: Dimension of a bare parameter; -1 elsewhere.
        count: How many positions that side has.
        positions: int64, the positions lost, in the layer's own numbering of its channels.
        channels: int64, same length: the channel of the group that takes each position with it.
    """

    target: str
    layer: nn.Module | Tensor
    side: Side
    dim: int
    count: int
    positions: Tensor
    channels: Tensor


@dataclasses.dataclass(frozen=True)
class ParameterSlice:
    """How a follower's positions lie in one of its parameters.

    Attributes:
        name: Qualified parameter name.
        shape: The parameter's present shape.
        dim: The dimension that the positions index.
        blocks: In how many blocks of dimension 0 the positions are spread out (grouped convolutions); 1 elsewhere.
        positions: int64, positions among ``blocks * shape[dim]``.
        channels: int64, same length: the channel of the group.
    """

    name: str
    shape: torch.Size
    dim: int
    blocks: int
    positions: Tensor
    channels: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class StoredSize:
    """A size that a tensor has while a module runs, which the module may hold as a number.

    Attributes:
        module: Name of the module.
        way: In which of several runs it was met (:data:`~disparse_plugin.structured.tracing.How`).
        number: Sizes that were met earlier in that run have a lower one.
        cut: Whether the module made it, by cutting a dimension of another size.
        size: The size.
        channels: int64, the channel of the group that each position follows; -1 for none.
    """

    module: str
    way: str
    number: int
    cut: bool
    size: int
    channels: Tensor


@dataclasses.dataclass(frozen=True)
class ChannelGroup:
    """Channels of one layer and all that follows them.

    Attributes:
        name: Qualified name of the layer that the channels are counted in.
        size: Number of channels.
        units: int64 of length ``size``: which channels can only go together (those in the same place of each group of
            a grouped convolution, GroupNorm or attention head; those that a concatenation ties). Values ``0..n-1``.
        followers: All that loses positions, the counting layer first.
        sizes: Sizes inside modules that shrink with it, where they are known.
    """

    name: str
    size: int
    units: Tensor
    followers: tuple[Follower, ...]
    sizes: tuple[StoredSize, ...] = ()

    @property
    def root(self) -> tuple[str, Side]:
        """The layer that the channels are counted in, and the side."""
        first = self.followers[0]
        return first.target, first.side

    @property
    def kind(self) -> tuple[tuple[str, str], ...]:
        """The types of the layers that follow, with the side that they lose: alike for groups of one shape."""
        return tuple(sorted((type(f.layer).__name__, f.side) for f in self.followers))

    @property
    def num_units(self) -> int:
        """Number of units, the smallest things that can be removed."""
        return int(self.units.max()) + 1 if self.size else 0

    def unit_sizes(self) -> Tensor:
        """Return the number of channels in each unit (int64, one entry per unit)."""
        return torch.bincount(self.units, minlength=self.num_units)

    def per_unit(self, values: Tensor) -> Tensor:
        """Average values of channels over their unit.

        Args:
            values: 1-D, one per channel.

        Returns:
            float64, one per unit.
        """
        total = torch.zeros(self.num_units, dtype=torch.float64).index_add_(0, self.units, values.double())
        return total / self.unit_sizes()

    def on(self, layers: Mapping[Any, Any]) -> ChannelGroup:
        """Return the group with the layers of the model in the place of those of a traced copy, which can then go.

        Args:
            layers: From each layer or parameter of the copy to that of the model.
        """
        followers = (dataclasses.replace(follower, layer=layers[follower.layer]) for follower in self.followers)
        return dataclasses.replace(self, followers=tuple(followers))

    def slices(self) -> Iterator[ParameterSlice]:
        """Yield how each parameter of each follower is sliced."""
        for follower in self.followers:
            yield from parameter_slices(follower)


def parameter_slices(follower: Follower) -> Iterator[ParameterSlice]:
    """Yield the parameters of a follower that shrink with it, and how.

    Layers of a type that is not in the table yield nothing: they may be pruned, but give no score.
    """
    layer, places, channels = follower.layer, follower.positions, follower.channels
    if isinstance(layer, Tensor) and not isinstance(layer, nn.Parameter):
        return  # a buffer is cut, and gives no score
    if isinstance(layer, nn.Parameter):
        yield ParameterSlice(follower.target, layer.shape, follower.dim % layer.dim(), 1, places, channels)
        return
    for owner, name, axis, tensor in tensors_of(layer, follower.side):
        if name in owner._parameters:
            positions = torch.cat([places + number * follower.count for number in range(axis.repeats)])
            path = join(follower.target, axis.name)
            dim = axis.dim % tensor.dim()
            yield ParameterSlice(path, tensor.shape, dim, axis.blocks, positions, channels.repeat(axis.repeats))


def channel_parameters(model: nn.Module, *, bias: bool = False) -> list[ParameterKey]:
    """List the parameters whose scores make up channel scores.

    Weights of convolutions, linear and recurrent layers, embeddings, PReLU and normalisation layers. What
    ``nn.MultiheadAttention`` reads of its output layer is left out, because that layer never runs itself.

    Args:
        model: Any module; wrappers are looked through.
        bias: Take the biases too.

    Returns:
        ``(module, name)`` pairs in module order, ready for ``score_tasks(parameters=...)``.

    Raises:
        TypeError: If ``model`` is no module, or ``bias`` no bool.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> [(type(module).__name__, name) for module, name in channel_parameters(net)]
        [('Conv2d', 'weight'), ('BatchNorm2d', 'weight')]
    """
    check_flag("bias", bias)
    root = unwrap(model)
    inner = {m for parent in root.modules() if isinstance(parent, nn.MultiheadAttention) for m in parent.children()}
    wanted = ("weight", "in_proj_weight", *(("bias",) if bias else ()))
    keys: list[ParameterKey] = []
    for module in root.modules():
        if rule_of(module) is None or module in inner:
            continue
        for name in (*wanted, *(name for name in module._parameters if name.startswith("weight_"))):
            parameter = module._parameters.get(name)
            if parameter is not None and not is_lazy(parameter):
                keys.append((module, name))
    return keys


def join(path: str, name: str) -> str:
    """Join a module path and a parameter name; the path of the model itself is empty."""
    return f"{path}.{name}" if path else name
