"""Reading torch-pruning's dependency graph safely.

Its defects in tracing are worked round here; its private parts are in
:mod:`.private`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..._support.example_inputs import Inputs
from ...parameters import ParameterKey
from ..groups import channel_parameters
from ..layers import makes_channels, rule_of
from ..shrinking import shrink
from .observation import call
from .private import tp, unchanging

# What torch-pruning raises on architectures that it cannot map.
TRACE_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class _RulePruner(tp.function.BasePruningFunc):  # type: ignore[misc]
    """Cuts a layer by the table of layer types, for those that torch-pruning does not know or cuts wrongly.

    ``LayernormPruner`` of torch-pruning 1.6.1 keeps the entries in the order in which a Python set happens to iterate
    (it calls ``Tensor.sort`` and drops the result), so outputs are silently wrong.
    """

    def prune_out_channels(self, layer: nn.Module, idxs: Collection[int]) -> nn.Module:
        """Remove the given positions of the outputs."""
        shrink(layer, {"out": torch.tensor(sorted(idxs), dtype=torch.int64)})
        return layer

    def get_out_channels(self, layer: nn.Module) -> int | None:
        rule = rule_of(layer)
        return None if rule is None else rule.count(layer, "out")

    prune_in_channels = prune_out_channels
    get_in_channels = get_out_channels


class _TwoSidedRulePruner(_RulePruner):
    """The same for layers with inputs of their own."""

    def prune_in_channels(self, layer: nn.Module, idxs: Collection[int]) -> nn.Module:
        """Remove the given positions of the inputs."""
        shrink(layer, {"in": torch.tensor(sorted(idxs), dtype=torch.int64)})
        return layer

    def get_in_channels(self, layer: nn.Module) -> int | None:
        rule = rule_of(layer)
        return None if rule is None else rule.count(layer, "in")


_ONE_SIDED, _TWO_SIDED = _RulePruner(), _TwoSidedRulePruner()


def _pruners_of_rules(model: nn.Module, *, known: bool) -> dict[type[nn.Module], Any]:
    """Map the classes that are cut by our table to what cuts them; those that torch-pruning knows, or the others."""
    found = {}
    for module in model.modules():
        rule = rule_of(module)
        if rule is not None and rule.ours and (tp.ops.module2type(module) in tp.function.PrunerBox) == known:
            found[type(module)] = _ONE_SIDED if rule.same else _TWO_SIDED
    return found


def fix_layer_norms(graph: Any) -> None:
    """Replace torch-pruning's pruner of every LayerNorm in a graph, also in dependencies made before."""
    for cls, pruner in _pruners_of_rules(graph.model, known=True).items():
        if cls not in graph.CUSTOMIZED_PRUNERS:
            graph.register_customized_layer(cls, pruner)
    broken = tp.function.LayernormPruner.prune_out_channels
    for node in graph.module2node.values():
        for dep in node.dependencies:
            if getattr(dep.handler, "__func__", None) is broken:
                dep.handler = _ONE_SIDED.prune_out_channels
            if getattr(dep.trigger, "__func__", None) is broken:
                dep.trigger = _ONE_SIDED.prune_out_channels


def trace(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    losses: Callable[[nn.Module], list[torch.Tensor]] | None = None,
    side_branches: Collection[nn.Module] = (),
    ignored_parameters: Collection[nn.Parameter] = (),
    customized_pruners: Mapping[type[nn.Module], Any] | None = None,
) -> Any:
    """Build torch-pruning's dependency graph; the model is left in evaluation mode and wants all gradients.

    Args:
        model: A model that may be disturbed (a copy).
        example_inputs: Positional or keyword arguments of one forward.
        losses: Runs the losses too, where they reach layers that the forward does not run.
        side_branches: Layers that run but reach no output; what they read is followed all the same.
        ignored_parameters: Bare parameters that no group may touch.
        customized_pruners: As in torch-pruning, by class.

    Returns:
        The graph.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    ends: list[torch.Tensor] = []
    with torch.enable_grad(), unchanging():
        graph = tp.DependencyGraph().build_dependency(
            model,
            example_inputs=example_inputs,
            forward_fn=lambda model, _: _outputs(model, example_inputs, losses, side_branches, ends),
            customized_pruners={**_pruners_of_rules(model, known=False), **(customized_pruners or {})},
            ignored_params=list(ignored_parameters),
            verbose=False,
        )
    _free(graph, ends)
    fix_layer_norms(graph)
    return graph


def _free(graph: Any, ends: Sequence[torch.Tensor]) -> None:
    """Let what leads to the ends of side branches lose channels: they are no outputs of the model."""
    made = {end.grad_fn for end in ends}
    for node in graph.module2node.values():
        if node.type == tp.ops.OPTYPE.OUTPUT and node.grad_fn in made:
            node.type = tp.ops.OPTYPE.ELEMENTWISE


def one_line(error: BaseException) -> str:
    """Shorten what an exception says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _outputs(
    model: nn.Module,
    inputs: Inputs,
    losses: Callable[[nn.Module], list[torch.Tensor]] | None,
    side_branches: Collection[nn.Module],
    ends: list[torch.Tensor],
) -> list[torch.Tensor]:
    with contextlib.ExitStack() as stack:
        for layer in side_branches:
            stack.callback(layer.register_forward_hook(lambda _, __, out: ends.extend(_first_tensor(out))).remove)
        outputs = call(model, inputs)
    if losses is not None:
        outputs += losses(model)
    return [tensor for tensor in (*outputs, *ends) if tensor.grad_fn is not None]


def _first_tensor(output: Any) -> list[torch.Tensor]:
    """Return the tensor that a layer gives, or the first of several."""
    first = output[0] if isinstance(output, tuple) else output
    return [first] if isinstance(first, torch.Tensor) else []


def traced_parameters(graph: Any) -> list[ParameterKey]:
    """List what to score: not the weights of layers that never run, which a parent may read."""
    traced = set(graph.module2node)
    return [key for key in channel_parameters(graph.model) if key[0] in traced or not makes_channels(key[0])]
