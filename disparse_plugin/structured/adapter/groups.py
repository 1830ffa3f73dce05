"""Reading the groups of torch-pruning's dependency graph, with what it maps wrongly sorted out.

What leaves this file are :class:`ChannelGroup` objects, or the reason why a layer's channels are left alone.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, nn

from ..._support.example_inputs import Inputs
from ...parameters import module_names
from ..attention import attention_heads
from ..copies import copied
from ..groups import ChannelGroup
from ..layer_rule import Side
from ..layers import makes_channels, stores_channels
from .graph import TRACE_ERRORS, one_line, trace
from .observation import Observation, observe
from .private import unchanging
from .reading import UnusableGroupError, block_counts, read_group
from .tied import settle_tied


@dataclasses.dataclass
class Groups:
    """What :func:`channel_groups` found.

    Attributes:
        usable: The groups that can be removed from.
        skipped: Layer name to the reason why its channels are left alone.
        clashing: Bare parameters that do not fit the groups they are in; ignoring them may make more usable.
        idle: Names of convolutions and linear layers that do not run.
        last: Names of those that make the outputs of the forward.
        kept: Names of layers that keep their outputs whatever the groups, and of bare parameters.
    """

    usable: list[ChannelGroup]
    skipped: dict[str, str]
    clashing: list[nn.Parameter]
    idle: set[str] = dataclasses.field(default_factory=set)
    last: tuple[str, ...] = ()
    kept: frozenset[str] = frozenset()


def find_groups(
    original: nn.Module,
    inputs: Inputs,
    losses: Callable[[nn.Module], list[Tensor]] | None,
    kept: Collection[nn.Module | nn.Parameter],
    customized_pruners: Mapping[type[nn.Module], Any] | None,
) -> tuple[Groups, Observation]:
    """Trace a copy of a model; leave out bare parameters that do not fit, as long as that helps.

    Args:
        original: The model; only copies of it run.
        inputs: From :func:`as_inputs`.
        losses: Runs the losses on a batch; None to look at the forward alone.
        kept: Layers and bare parameters of the model that must stay as they are.
        customized_pruners: As in torch-pruning, by class.

    Returns:
        The groups, in terms of ``original``, and what the forward showed, by the layers of the copy.

    Raises:
        ValueError: If the model does not run on the inputs, or cannot be traced.
    """
    seen = observe(model := copied(original), inputs, losses)
    twins: dict[nn.Module | nn.Parameter, nn.Module | nn.Parameter] = {
        **dict(zip(original.modules(), model.modules(), strict=True)),
        **dict(zip(original.parameters(), model.parameters(), strict=True)),
    }
    own = {twins[layer] for layer in kept}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Maximum recursive depth")  # in long sequences; our own tracing follows those
        graph, found = _mapped(model, inputs, losses if seen.only_in_losses else None, own, seen, customized_pruners)
    names = module_names(model)
    found.last = tuple(names[layer] for layer in names if layer in seen.outputs - seen.only_in_losses)
    named: dict[Any, str] = {**names, **{parameter: name for name, parameter in model.named_parameters()}}
    found.kept = frozenset(named[layer] for layer in own | seen.outputs | seen.side_branches | seen.idle)
    found.idle = {names[layer] for layer in seen.idle}
    found.skipped |= {name: "does not run" for name in found.idle if name not in found.skipped}
    back = {twin: layer for layer, twin in twins.items()}
    found.usable = [group.on(back) for group in found.usable]
    settle_tied(
        original, found.usable, found.skipped, {names[module] for module in graph.module2node if module in names}
    )
    return found, seen


def _mapped(
    model: nn.Module,
    inputs: Inputs,
    losses: Callable[[nn.Module], list[Tensor]] | None,
    own: Collection[nn.Module | nn.Parameter],
    seen: Observation,
    customized_pruners: Mapping[type[nn.Module], Any] | None,
) -> tuple[Any, Groups]:
    """Trace a model, and once more without the bare parameters that do not fit, as long as there are any."""
    unfit = list[nn.Parameter]()
    while True:
        try:
            graph = trace(
                model,
                inputs,
                losses=losses,
                side_branches=seen.side_branches,
                ignored_parameters=unfit,
                customized_pruners=customized_pruners,
            )
        except TRACE_ERRORS as error:
            raise ValueError(
                f"model: torch-pruning must be able to trace it, found {type(error).__name__}: {error}; pass "
                "customized_pruners for unusual layers, or mask weights instead (DiSparseStatic)"
            ) from error
        found = channel_groups(graph, ignored_layers=own, seen=seen, heads=attention_heads(model))
        fresh = [p for p in found.clashing if not any(p is known for known in unfit)]
        if not fresh:
            return graph, found
        unfit += fresh


def channel_groups(
    graph: Any,
    *,
    ignored_layers: Collection[nn.Module | nn.Parameter],
    seen: Observation,
    heads: Mapping[nn.Module, int],
) -> Groups:
    """Enumerate all groups of a graph, each layer's outputs in one group at most.

    Args:
        graph: From :func:`trace`.
        ignored_layers: Layers that must keep their outputs, and bare parameters, by wish of the user.
        seen: Which layers make the model's outputs, or run aside.
        heads: Attention heads of each query-key-value layer.

    Returns:
        The groups, in the order of the graph.
    """
    names = module_names(graph.model)
    reasons: dict[nn.Module | nn.Parameter, str] = {}
    reasons |= dict.fromkeys(seen.outputs, "makes an output of the model")
    reasons |= {layer: "excluded" for layer in ignored_layers if layer not in reasons}
    kept = set(reasons)
    found, visited = Groups([], {}, []), set[nn.Module]()
    blocks = block_counts(graph)
    with unchanging(graph):
        layers = list(graph.module2node)
        roots = [*filter(makes_channels, layers), *filter(stores_channels, layers)]
        for module in sorted(roots, key=seen.side_branches.__contains__):  # those last: most follow the others
            if module in visited:
                continue
            if module in seen.side_branches:
                found.skipped[names[module]] = "runs but reaches no output"
                continue
            visited.add(module)
            if module in kept:
                found.skipped[names[module]] = reasons[module]
                continue
            try:
                group, size, count = _full_group(graph, module, heads)
                visited |= {d.target.module for d, _ in group if graph.is_out_channel_pruning_fn(d.handler)}
                inner: dict[tuple[nn.Module, Side], int] = {(group[0].dep.target.module, "in"): count} if count else {}
                found.usable.append(read_group(graph, group, size, names, {**blocks, **inner}, kept, found.clashing))
            except UnusableGroupError as error:
                found.skipped[names[module]] = str(error)
            except TRACE_ERRORS as error:
                found.skipped[names[module]] = f"torch-pruning cannot map it: {one_line(error)}"
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
        dep for dep, _ in group if makes_channels(dep.target.module) and graph.is_in_channel_pruning_fn(dep.handler)
    ]
    if not inner:
        raise UnusableGroupError("an attention without an output layer")
    module, handler = inner[-1].target.module, inner[-1].handler
    size = graph.get_in_channels(module)
    return graph.get_pruning_group(module, handler, list(range(size))), size
