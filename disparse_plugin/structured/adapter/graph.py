"""Reading torch-pruning's dependency graph safely.

Its defects in tracing are worked round here; its private parts are in
:mod:`.private`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from ...parameters import ParameterKey
from ..groups import channel_parameters
from .observation import tensors_in
from .private import bounded, cut_parameter, tp

# What torch-pruning raises on architectures that it cannot map.
TRACE_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

ROOT_TYPES = (nn.modules.conv._ConvNd, nn.Linear)


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
                setattr(layer, name, cut_parameter(self, parameter, keep, parameter.dim() - 1))
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


def one_line(error: BaseException) -> str:
    """Shorten what an exception says."""
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
