"""Reading torch-pruning's dependency graph safely.

With :mod:`disparse_plugin.torch_pruning_pruner` this is the only place that touches the inside of torch-pruning (1.6),
and where its defects in tracing are worked round. What leaves this file are :class:`ChannelGroup` objects, or the
reason why a layer's channels are left alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import nn

from .channel_groups import ChannelGroup, Follower, Side, channel_parameters, is_depthwise
from .parameters import ParameterKey, qualified_names, unwrap

try:
    import torch_pruning as tp
    from torch_pruning.dependency import graph as tp_graph
    from torch_pruning.dependency import index_mapping as tp_index_mapping
except ImportError as missing:
    raise ImportError(
        "disparse_plugin.structured needs torch-pruning; install it with: pip install 'disparse-plugin[structured]'"
    ) from missing

# What torch-pruning raises on architectures that it cannot map.
TRACE_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

# A sane group visits one side of one layer once per connection. A walk that goes round in circles exceeds these.
MAX_VISITS_PER_LAYER = 96
MAX_ITEMS = 4000
MAX_INDICES = 400_000

ROOT_TYPES = (nn.modules.conv._ConvNd, nn.Linear)


class GroupTooLargeError(RuntimeError):
    """The walk through the dependency graph does not end."""


class UnusableGroupError(ValueError):
    """A group that cannot be removed consistently; the message says why."""


class _BoundedGroup(tp_graph.Group):  # type: ignore[misc]
    """A group that raises where torch-pruning's walk would go round for ever."""

    def __init__(self) -> None:
        super().__init__()
        self._visits: dict[Any, int] = {}
        self._indices = 0
        self.ties: list[tuple[int, int]] = []

    def add_dep(self, dep: Any, idxs: Any) -> None:
        key = (dep.target, dep.handler)
        self._visits[key] = self._visits.get(key, 0) + 1
        self._indices += len(idxs)
        if self._visits[key] > MAX_VISITS_PER_LAYER or len(self) > MAX_ITEMS or self._indices > MAX_INDICES:
            raise GroupTooLargeError("torch-pruning's walk through the graph does not end")
        super().add_dep(dep, idxs)

    def add_and_merge(self, dep: Any, idxs: Any) -> None:
        """Merge as torch-pruning does, and note which channels claim the same position: they can only go together."""
        for other, known in self.items:
            if other.target == dep.target and other.handler == dep.handler:
                owner = {index.idx: index.root_idx for index in known}
                self.ties += [(owner[i.idx], i.root_idx) for i in idxs if owner.get(i.idx, i.root_idx) != i.root_idx]
        super().add_and_merge(dep, idxs)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Make every walk through a dependency graph end, by an error if need be."""
    with mock.patch.object(tp_graph, "Group", _BoundedGroup):
        yield


@contextlib.contextmanager
def _unchanging(graph: Any) -> Iterator[None]:
    """Compute the index maps of a graph once instead of before every group; for as long as nothing is pruned."""
    tp_index_mapping.update_index_mapping(graph)
    with bounded(), mock.patch.object(tp_index_mapping, "update_index_mapping", lambda _: None):
        yield


class SortedLayerNormPruner(tp.function.LayernormPruner):  # type: ignore[misc]
    """Prunes LayerNorm without permuting its weights.

    ``LayernormPruner`` of torch-pruning 1.6.1 keeps the entries in the order in which a Python set happens to iterate
    (it calls ``Tensor.sort`` and drops the result), so outputs are silently wrong.
    """

    def prune_out_channels(self, layer: nn.LayerNorm, idxs: Collection[int]) -> nn.LayerNorm:
        """Remove the given positions of the last dimension."""
        shape = layer.normalized_shape
        gone = set(idxs)
        keep = [position for position in range(shape[-1]) if position not in gone]
        for name in ("weight", "bias"):
            parameter = layer._parameters.get(name)
            if parameter is not None:
                setattr(layer, name, self._prune_parameter_and_grad(parameter, keep, parameter.dim() - 1))
        layer.normalized_shape = (*shape[:-1], len(keep))
        return layer

    prune_in_channels = prune_out_channels


_LAYER_NORM = SortedLayerNormPruner()


def fix_layer_norms(graph: Any) -> None:
    """Replace torch-pruning's pruner of every LayerNorm in a graph, also in dependencies made before."""
    classes = {type(module) for module in graph.model.modules() if isinstance(module, nn.LayerNorm)}
    for cls in classes - set(graph.CUSTOMIZED_PRUNERS):
        graph.register_customized_layer(cls, _LAYER_NORM)
    broken = tp.function.LayernormPruner.prune_out_channels
    for node in graph.module2node.values():
        for dep in node.dependencies:
            if getattr(dep.handler, "__func__", None) is broken:
                dep.handler = _LAYER_NORM.prune_out_channels
            if getattr(dep.trigger, "__func__", None) is broken:
                dep.trigger = _LAYER_NORM.prune_out_channels


def trace(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | dict[str, Any],
    *,
    ignored_parameters: Collection[nn.Parameter] = (),
    customized_pruners: Mapping[type[nn.Module], Any] | None = None,
) -> Any:
    """Build torch-pruning's dependency graph; the model is left in evaluation mode and wants all gradients.

    Args:
        model: A model that may be disturbed (a copy).
        example_inputs: Positional or keyword arguments of one forward.
        ignored_parameters: Bare parameters that no group may touch.
        customized_pruners: As in torch-pruning, by class.

    Returns:
        The graph.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    with torch.enable_grad(), bounded():
        graph = tp.DependencyGraph().build_dependency(
            model,
            example_inputs=example_inputs,
            output_transform=lambda outputs: [t for t in tensors_in(outputs) if t.grad_fn is not None],
            customized_pruners=dict(customized_pruners or {}),
            ignored_params=list(ignored_parameters),
            verbose=False,
        )
    fix_layer_norms(graph)
    return graph


def tensors_in(outputs: Any) -> list[torch.Tensor]:
    """Collect the tensors of nested tuples, lists, mappings and dataclasses, in order."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    if isinstance(outputs, Mapping):
        return [tensor for value in outputs.values() for tensor in tensors_in(value)]
    if isinstance(outputs, list | tuple):
        return [tensor for value in outputs for tensor in tensors_in(value)]
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        return [tensor for field in dataclasses.fields(outputs) for tensor in tensors_in(getattr(outputs, field.name))]
    return []


@dataclasses.dataclass
class Groups:
    """What :func:`channel_groups` found.

    Attributes:
        usable: The groups that can be removed from.
        skipped: Layer name to the reason why its channels are left alone.
        clashing: Bare parameters that do not fit the groups they are in; ignoring them may make more usable.
        idle: Names of convolutions and linear layers that do not run.
    """

    usable: list[ChannelGroup]
    skipped: dict[str, str]
    clashing: list[nn.Parameter]
    idle: set[str] = dataclasses.field(default_factory=set)


def channel_groups(
    graph: Any, *, ignored_layers: Collection[nn.Module], outputs: Collection[nn.Module], heads: Mapping[nn.Module, int]
) -> Groups:
    """Enumerate all groups of a graph, each layer's outputs in one group at most.

    Args:
        graph: From :func:`trace`.
        ignored_layers: Layers that must keep their outputs, by wish of the user.
        outputs: Layers that must keep theirs because they make the model's outputs.
        heads: Attention heads of each query-key-value layer.

    Returns:
        The groups, in the order of the graph.
    """
    names = module_names(graph.model)
    kept = set(ignored_layers) | set(outputs)
    found, visited = Groups([], {}, []), set[nn.Module]()
    blocks = block_counts(graph)
    with _unchanging(graph):
        for module in list(graph.module2node):
            if not isinstance(module, ROOT_TYPES) or module in visited:
                continue
            visited.add(module)
            if module in kept:
                reason = "makes an output of the model" if module in outputs else "in ignored_layers"
                found.skipped[names[module]] = reason
                continue
            try:
                group, size, count = _full_group(graph, module, heads)
                visited |= {d.target.module for d, _ in group if graph.is_out_channel_pruning_fn(d.handler)}
                inner: dict[tuple[nn.Module, Side], int] = {(group[0].dep.target.module, "in"): count} if count else {}
                found.usable.append(read_group(graph, group, size, names, {**blocks, **inner}, kept, found.clashing))
            except UnusableGroupError as error:
                found.skipped[names[module]] = str(error)
            except TRACE_ERRORS as error:
                found.skipped[names[module]] = f"torch-pruning cannot map it: {_one_line(error)}"
    return found


def _full_group(graph: Any, module: nn.Module, heads: Mapping[nn.Module, int]) -> tuple[Any, int, int]:
    """Return the group of all outputs of a layer, its number of channels, and its number of attention heads or 0."""
    pruner = graph.get_pruner_of_module(module)
    size = pruner.get_out_channels(module)
    group = graph.get_pruning_group(module, pruner.prune_out_channels, list(range(size)))
    counts = {
        heads[dep.target.module]
        for dep, _ in group
        if dep.target.module in heads and graph.is_out_channel_pruning_fn(dep.handler)
    }
    if len(counts) > 1:
        raise UnusableGroupError("attentions with different numbers of heads go together")
    return (*_reroot_attention(graph, group), counts.pop()) if counts else (group, size, 0)


def _reroot_attention(graph: Any, group: Any) -> tuple[Any, int]:
    """Count an attention's channels in the inputs of its output layer: one for query, key and value together.

    Raises:
        UnusableGroupError: If no layer follows.
    """
    inner = [
        dep
        for dep, _ in group
        if isinstance(dep.target.module, ROOT_TYPES) and graph.is_in_channel_pruning_fn(dep.handler)
    ]
    if not inner:
        raise UnusableGroupError("an attention without an output layer")
    module, handler = inner[-1].target.module, inner[-1].handler
    size = graph.get_in_channels(module)
    return graph.get_pruning_group(module, handler, list(range(size))), size


def read_group(
    graph: Any,
    group: Any,
    size: int,
    names: Mapping[nn.Module, str],
    blocks: Mapping[tuple[nn.Module, Side], int],
    kept: Collection[nn.Module] = (),
    clashing: list[nn.Parameter] | None = None,
    folds: int | None = None,
) -> ChannelGroup:
    """Translate a full group of torch-pruning, or say why it cannot be removed from.

    Args:
        graph: The graph it comes from.
        group: A group over all channels of its root.
        size: How many those are.
        names: Module names.
        blocks: In how many equal blocks each side of a layer must be pruned alike.
        kept: Layers that must keep their outputs.
        clashing: Collects bare parameters that do not fit.
        folds: The number of blocks, where the caller (a pruner) has decided.

    Raises:
        UnusableGroupError: If positions do not fit a layer, a channel count is not divisible, or an output changes.
    """
    followers, clashes = [], list[str]()
    for item in group.items:
        node = item.dep.target
        if node.type == tp.ops.OPTYPE.OUTPUT:
            raise UnusableGroupError("changes an output of the model")
        if isinstance(graph.get_pruner_of_module(node.module), tp.ops.DummyPruner):
            continue
        follower = _follower(graph, item, names)
        if follower.layer in kept and follower.side == "out":
            raise UnusableGroupError(f"goes together with {follower.target}, which must keep its outputs")
        error = _misfit(follower, size)
        if error is None:
            followers.append(follower)
        elif isinstance(node.module, nn.Parameter) and clashing is not None:
            clashing.append(node.module)
            clashes.append(error)
        else:
            clashes.append(error)
    if clashes:
        raise UnusableGroupError(clashes[0])
    counts = {f: blocks[f.layer, f.side] for f in followers if (f.layer, f.side) in blocks} if folds is None else {}
    folds = max(counts.values(), default=1) if folds is None else folds
    if size % folds or any(folds % count for count in counts.values()):
        raise UnusableGroupError(f"{size} channels do not split evenly into {folds} groups of channels")
    units = _merged(torch.arange(size) % (size // folds), _ties(group, followers))
    result = ChannelGroup(followers[0].target, size, units, tuple(followers))
    for follower, count in counts.items():
        _check_alike(result, follower, count)
    return result


def _follower(graph: Any, item: Any, names: Mapping[nn.Module, str]) -> Follower:
    node, positions, channels = item.dep.target, item.idxs, item.root_idxs
    side: Side
    if None in channels:
        raise UnusableGroupError("its channels are repeated (grouped-query attention)")
    if isinstance(node.module, nn.Parameter):
        name, side, dim = graph._param_to_name[node.module], "parameter", node.pruning_dim
    else:
        name, dim = names[node.module], -1
        side = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
    count = graph.get_in_channels(node) if side == "in" else graph.get_out_channels(node)
    if count is None:  # PReLU with one slope for all channels
        count = max(positions, default=0) + 1
    positions, channels = torch.tensor(positions, dtype=torch.int64), torch.tensor(channels, dtype=torch.int64)
    return Follower(name, node.module, side, dim, count, positions, channels)


def _misfit(follower: Follower, size: int) -> str | None:
    """Say why torch-pruning's positions cannot be those of the layer, or return None."""
    layer, count, what = follower.layer, follower.count, f"{follower.target} ({follower.side})"
    if isinstance(layer, nn.LSTM):
        return f"{what} is an LSTM, which torch-pruning cuts wrongly"
    if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) > 1:
        return f"{what} normalises over {len(layer.normalized_shape)} dimensions"
    if isinstance(layer, nn.modules.conv._ConvNd):
        if layer.transposed and layer.groups > 1 and not is_depthwise(layer):
            return f"{what} is a grouped transposed convolution"
        if is_depthwise(layer) and layer.in_channels != layer.out_channels:
            return f"{what} merges input channels group by group"
    if follower.positions.numel() and not 0 <= int(follower.positions.min()) <= int(follower.positions.max()) < count:
        return f"{what} has {count} positions, found {int(follower.positions.max())}: a mapping that cannot be right"
    if follower.channels.numel() and int(follower.channels.max()) >= size:
        return f"{what} is mapped to {int(follower.channels.max()) + 1} channels of {size}"
    return None


def _ties(group: Any, followers: Collection[Follower]) -> list[tuple[int, int]]:
    """List pairs of channels that claim one position."""
    ties = list(getattr(group, "ties", ()))
    for follower in followers:
        if follower.positions.unique().numel() < follower.positions.numel():
            owner: dict[int, int] = {}
            for position, channel in zip(follower.positions.tolist(), follower.channels.tolist(), strict=True):
                ties.append((owner.setdefault(position, channel), channel))
    return [(first, second) for first, second in ties if first != second]


def _merged(units: torch.Tensor, ties: list[tuple[int, int]]) -> torch.Tensor:
    """Join the units of tied channels, and number what remains from zero."""
    if not ties:
        return units
    parent = list(range(int(units.max()) + 1))

    def find(unit: int) -> int:
        while parent[unit] != unit:
            parent[unit] = unit = parent[parent[unit]]
        return unit

    for first, second in ties:
        one, other = find(int(units[first])), find(int(units[second]))
        parent[max(one, other)] = min(one, other)
    return torch.tensor([find(unit) for unit in units.tolist()]).unique(return_inverse=True)[1]


def _check_alike(group: ChannelGroup, follower: Follower, blocks: int) -> None:
    """Check that removing a unit takes the same places from every block of a grouped layer."""
    width = follower.count // blocks
    unit = group.units[follower.channels]
    local, block = follower.positions % width, follower.positions // width
    seen: dict[tuple[int, int], set[int]] = {}
    for key in zip(unit.tolist(), local.tolist(), block.tolist(), strict=True):
        seen.setdefault(key[:2], set()).add(key[2])
    if any(len(found) != blocks for found in seen.values()):
        raise UnusableGroupError(f"{follower.target} has {blocks} groups of channels, which would lose different ones")


def block_counts(graph: Any) -> dict[tuple[nn.Module, Side], int]:
    """Return in how many equal blocks each side of a layer must be pruned alike, where more than one."""
    counts: dict[tuple[nn.Module, Side], int] = {}
    for module in graph.model.modules():
        pruner = graph.get_pruner_of_module(module)
        if pruner is None or is_depthwise(module):
            continue
        own = module.num_heads if isinstance(module, nn.MultiheadAttention) else 1
        counts[module, "out"] = max(pruner.get_out_channel_groups(module), own)
        counts[module, "in"] = max(pruner.get_in_channel_groups(module), own)
    return {key: count for key, count in counts.items() if count > 1}


def attention_heads(model: nn.Module) -> dict[nn.Module, int]:
    """Find attention layers that make query, key and value in one Linear, as those of timm.

    Returns:
        The ``qkv`` layer of each module that has one beside an integer ``num_heads``, to the number of heads.
    """
    found: dict[nn.Module, int] = {}
    for module in model.modules():
        qkv, heads = module._modules.get("qkv"), getattr(module, "num_heads", None)
        if isinstance(qkv, nn.Linear) and isinstance(heads, int) and qkv.out_features % (3 * heads) == 0:
            found[qkv] = heads
    return found


def module_names(model: nn.Module) -> dict[nn.Module, str]:
    """Name every module as in the qualified names of its parameters, without wrappers."""
    modules = list(dict.fromkeys(unwrap(model).modules()))
    names = qualified_names(model, [(module, "") for module in modules])
    return {module: name.removesuffix(".") for module, name in zip(modules, names, strict=True)}


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"



def pruner_of(layer: nn.Module | nn.Parameter, customized_pruners: Mapping[type[nn.Module], Any] | None = None) -> Any:
    """Return the object of torch-pruning that cuts a layer, with the repaired one for LayerNorm."""
    if isinstance(layer, nn.Module) and customized_pruners and type(layer) in customized_pruners:
        return customized_pruners[type(layer)]
    if isinstance(layer, nn.LayerNorm):
        return _LAYER_NORM
    return tp.function.PrunerBox[tp.ops.module2type(layer)]


def traced_parameters(graph: Any) -> list[ParameterKey]:
    """List what to score: not the weights of layers that never run, which a parent may read."""
    traced = set(graph.module2node)
    return [key for key in channel_parameters(graph.model) if key[0] in traced or not isinstance(key[0], ROOT_TYPES)]
