"""One forward, watched: what comes out, which layers make it, and how often every weight is used."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...parameters import module_names
from ..groups import join
from ..layers import makes_channels, rule_of

Inputs = tuple[Any, ...] | dict[str, Any]


@dataclasses.dataclass
class Observation:
    """What one forward showed.

    Attributes:
        shapes: Shapes of all output tensors.
        outputs: Convolutions and linear layers that make an output, with nothing of their kind after them.
        untraced: Convolutions and linear layers that ran but reach no output.
        idle: Convolutions and linear layers that did not run.
        uses: Parameter name to the number of multiplications per weight: output positions times batch.
    """

    shapes: list[torch.Size] = dataclasses.field(default_factory=list)
    outputs: set[nn.Module] = dataclasses.field(default_factory=set)
    untraced: set[nn.Module] = dataclasses.field(default_factory=set)
    idle: set[nn.Module] = dataclasses.field(default_factory=set)
    uses: dict[str, int] = dataclasses.field(default_factory=dict)


def as_inputs(example_inputs: Any) -> Inputs:
    """Make positional arguments of what a user passes: a tensor is one argument, never a sequence of images."""
    if isinstance(example_inputs, dict):
        return example_inputs
    return tuple(example_inputs) if isinstance(example_inputs, list | tuple) else (example_inputs,)


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


def call(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Run a model and return its output tensors."""
    return tensors_in(model(**inputs) if isinstance(inputs, dict) else model(*inputs))


def observe(model: nn.Module, inputs: Inputs) -> Observation:
    """Run a model once in evaluation mode, with gradients, and watch.

    Args:
        model: A model that may be disturbed (a copy).
        inputs: From :func:`as_inputs`.

    Raises:
        ValueError: If the model cannot run on the inputs, returns no tensor, or none that depends on a parameter.
    """
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    seen, made_by = Observation(), dict[Any, nn.Module]()
    with torch.enable_grad(), _watching(model, seen, made_by):
        try:
            outputs = call(model, inputs)
        except (RuntimeError, TypeError, ValueError, LookupError, AssertionError) as error:
            raise ValueError(
                f"example_inputs: the model must run on them, found {type(error).__name__}: {error}; pass a tensor, a "
                "tuple of positional or a dict of keyword arguments of one forward"
            ) from error
    seen.shapes = [tensor.shape for tensor in outputs]
    if not any(tensor.grad_fn is not None for tensor in outputs):
        raise ValueError("model: an output must depend on a parameter, found none that does; return the heads' outputs")
    reached = _reached([tensor.grad_fn for tensor in outputs], made_by, seen.outputs)
    ran = set(made_by.values())
    seen.untraced = ran - reached
    seen.idle = {module for module in model.modules() if makes_channels(module) and module not in ran}
    return seen


@contextlib.contextmanager
def _watching(model: nn.Module, seen: Observation, made_by: dict[Any, nn.Module]) -> Iterator[None]:
    names = module_names(model)

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        rule, out = rule_of(layer), output[0] if isinstance(output, tuple) else output
        assert rule is not None
        for weight, uses in rule.uses(layer, inputs[0], out).items() if inputs else ():
            name = join(names[layer], weight)
            seen.uses[name] = seen.uses.get(name, 0) + uses
        if makes_channels(layer):
            made_by[out.grad_fn] = layer

    with contextlib.ExitStack() as stack:
        for module in names:
            if rule_of(module) is not None:
                stack.callback(module.register_forward_hook(count).remove)
        yield


def _reached(starts: list[Any], made_by: dict[Any, nn.Module], first: set[nn.Module]) -> set[nn.Module]:
    """Walk the autograd graph back from the outputs; collect the layers met, and those met first on a path."""
    reached: set[nn.Module] = set()
    front, seen = [(node, True) for node in starts if node is not None], set[tuple[Any, bool]]()
    while front:
        node, is_last = front.pop()
        if (node, is_last) in seen:
            continue
        seen.add((node, is_last))
        if node in made_by:
            reached.add(made_by[node])
            if is_last:
                first.add(made_by[node])
        front += [(n, is_last and node not in made_by) for n, _ in node.next_functions if n is not None]
    return reached
