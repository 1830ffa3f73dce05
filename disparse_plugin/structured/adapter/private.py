"""All that the library uses of torch-pruning (1.6) beyond its documented names.

Private attributes, and the two functions that are replaced while a graph is walked. When torch-pruning changes, this is
the file to look at; every other file of this package goes through it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

try:
    import torch_pruning  # type: ignore[import-untyped]
    from torch_pruning.dependency import graph as tp_graph  # type: ignore[import-untyped]
    from torch_pruning.dependency import index_mapping as tp_index_mapping
except ImportError as missing:
    raise ImportError(
        "disparse_plugin.structured needs torch-pruning; install it with: pip install 'disparse-plugin[structured]'"
    ) from missing

tp: Any = torch_pruning

# A sane group visits one side of one layer once per connection. A walk that goes round in circles exceeds these.
MAX_VISITS_PER_LAYER = 96
MAX_ITEMS = 4000
MAX_INDICES = 400_000


class GroupTooLargeError(RuntimeError):
    """The walk through the dependency graph does not end."""


class BarrierError(ValueError):
    """A group would pass an operation that torch-pruning cannot map."""


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
    with _swapped(tp_graph, "Group", _BoundedGroup):
        yield


@contextlib.contextmanager
def _swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def unchanging(graph: Any = None) -> Iterator[None]:
    """Compute the index maps of a graph once instead of before every group; for as long as nothing is pruned.

    A node whose map cannot be computed becomes a barrier: groups that would pass it raise, all others are unharmed.
    Without a graph, maps are computed whenever torch-pruning does so.
    """
    if graph is None:
        with bounded(), _swapped(tp_index_mapping, "update_index_mapping", _guarded_update):
            yield
        return
    _guarded_update(graph)
    with bounded(), _swapped(tp_index_mapping, "update_index_mapping", lambda _: None):
        yield


class _Barrier:
    """Stands in for the index map of an operation that has none."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def __call__(self, _: Any) -> Any:
        raise BarrierError(self._reason)


class _BoundedMap:
    """An index map that raises before it spreads a few channels over very many positions."""

    def __init__(self, mapping: Any) -> None:
        self._mapping = mapping

    def __call__(self, indices: Any) -> Any:
        stride = 1 if self._mapping.reverse else self._mapping._stride
        if len(indices) * stride > MAX_INDICES:
            raise BarrierError(f"a reshape spreads {len(indices)} channels over {len(indices) * stride} positions")
        return self._mapping(indices)


def _guarded_update(graph: Any) -> None:
    """Update the index maps node by node, as torch-pruning does for all of them or none."""
    update = {
        tp.ops.OPTYPE.CONCAT: tp_index_mapping.update_concat_index_mapping,
        tp.ops.OPTYPE.SPLIT: tp_index_mapping.update_split_index_mapping,
        tp.ops.OPTYPE.RESHAPE: tp_index_mapping.update_reshape_index_mapping,
        tp.ops.OPTYPE.UNBIND: tp_index_mapping.update_unbind_index_mapping,
        tp.ops.OPTYPE.EXPAND: tp_index_mapping.update_expand_index_mapping,
        tp.ops.OPTYPE.SLICE: tp_index_mapping.update_slice_index_mapping,
    }
    for node in list(graph.module2node.values()):
        if node.type not in update:
            continue
        try:
            update[node.type](graph, node)
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
            _set_maps(node, _constant(_Barrier(f"torch-pruning cannot map {node.name}: {type(e).__name__}: {e}")))
        else:
            _set_maps(node, lambda m: _BoundedMap(m) if isinstance(m, tp_index_mapping._FlattenIndexMapping) else m)


def _constant(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def _set_maps(node: Any, change: Callable[[Any], Any]) -> None:
    """Change the first map of every dependency to and from a node."""
    for dep in node.dependencies:
        dep.index_mapping[0] = change(dep.index_mapping[0])
    for neighbour in {*node.inputs, *node.outputs}:
        for dep in neighbour.dependencies:
            if dep.target is node:
                dep.index_mapping[0] = change(dep.index_mapping[0])


def graph_of(group: Any) -> Any:
    """Return the dependency graph that a group was read from."""
    return group._DG


def group_like(group: Any) -> Any:
    """Make an empty group of the same graph."""
    empty = tp.dependency.Group()
    empty._DG = group._DG
    return empty


def parameter_name(graph: Any, parameter: nn.Parameter) -> str:
    """Return the qualified name of a bare parameter in a graph."""
    return str(graph._param_to_name[parameter])


def module_name(graph: Any, module: nn.Module) -> str:
    """Return the name by which a graph shows a module; operations have one too."""
    return str(graph._module2name[module])


def attention_of(pruner: Any, group: Any) -> list[nn.Module]:
    """Return the query-key-value layers of a group that is an attention; none if it is not."""
    is_attention, layers = pruner._is_atten_group(group)
    return list(layers) if is_attention else []


def attention_root(pruner: Any, group: Any) -> Any:
    """Return an attention's group counted in the inputs of its output layer; None if there is no such layer."""
    return pruner._downstream_node_as_root_if_attention(group)


def fold_count(pruner: Any, group: Any) -> int:
    """Return over how many equal blocks a pruner averages the importance of a group."""
    return int(pruner._get_channel_groups(group))


def is_ranked(pruner: Any, group: Any) -> bool:
    """Tell whether a pruner looks at a group in its present step, or has taken enough of it."""
    return bool(pruner._check_pruning_ratio(group))


def rounded_count(pruner: Any, count: int, channels: int) -> int:
    """Return how many channels a pruner makes of ``count`` so that its ``round_to`` holds."""
    return int(pruner._round_to(count, channels, pruner.round_to))


def user_scope(pruner: Any, group: Any) -> tuple[nn.Module, str] | None:
    """Return the layer of a group that ``pruning_ratio_dict`` lists, with the name of its scope."""
    for dep, _ in group:
        for module, function in ((dep.source.module, dep.trigger), (dep.target.module, dep.handler)):
            if module in pruner._layer_to_scope and pruner.DG.is_out_channel_pruning_fn(function):
                name, members = pruner._layer_to_scope[module]
                if len(members) > 0:
                    return module, str(name)
    return None


def initial_counts(pruner: Any) -> dict[str, float]:
    """Return the sizes that a pruner remembers of its scopes, to be changed in place."""
    counts: dict[str, float] = pruner._scope_initial_channels
    return counts


def known_pruner(layer: nn.Module) -> Any:
    """Return what cuts a layer in torch-pruning, as it comes; None for a type that it does not know."""
    return tp.function.PrunerBox.get(tp.ops.module2type(layer))


@contextlib.contextmanager
def unnormalized(base: Any) -> Iterator[Any]:
    """Take the normalisation away from an importance of torch-pruning for a while, and give it as a function."""
    normalizer, base.normalizer = base.normalizer, None
    try:
        yield lambda values: base._normalize(values, normalizer)
    finally:
        base.normalizer = normalizer
