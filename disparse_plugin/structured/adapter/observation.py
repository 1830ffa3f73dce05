"""One forward, watched: what comes out, which layers make it, and how often every weight is used."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..._support.example_inputs import Inputs, run
from ...parameters import keys_by_name, module_names
from ..groups import join
from ..hooks import after_forward
from ..layers import makes_channels, rule_of


@dataclasses.dataclass
class Observation:
    """What one forward showed.

    Attributes:
        outputs: Convolutions and linear layers that make an output, with nothing of their kind after them.
        side_branches: Modules that ran but reach no output.
        only_in_losses: Those that the losses reach and the forward does not run (heads of other tasks, of training).
        idle: Those that ran in neither, and whose weights no other module multiplies with (``F.linear(x, fc.weight)``).
        uses: Parameter name to the number of multiplications per weight, in the mean: output positions times batch.
    """

    outputs: set[nn.Module] = dataclasses.field(default_factory=set)
    side_branches: set[nn.Module] = dataclasses.field(default_factory=set)
    only_in_losses: set[nn.Module] = dataclasses.field(default_factory=set)
    idle: set[nn.Module] = dataclasses.field(default_factory=set)
    uses: dict[str, Fraction | int] = dataclasses.field(default_factory=dict)


def named_tensors(value: Any, name: str = "output") -> list[tuple[str, Tensor]]:
    """Collect the tensors of nested tuples, lists, mappings and dataclasses, in order, with names for messages.

    Example:
        >>> [name for name, _ in named_tensors({"seg": torch.ones(1), "aux": [torch.ones(2)]})]
        ["output['seg']", "output['aux'][0]"]
    """
    if isinstance(value, Tensor):
        return [(name, value)]
    entries: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        entries = [(f"{name}[{key!r}]", entry) for key, entry in value.items()]
    elif isinstance(value, list | tuple):
        entries = [(f"{name}[{number}]", entry) for number, entry in enumerate(value)]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        entries = [(f"{name}.{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value)]
    return [pair for key, entry in entries for pair in named_tensors(entry, key)]


def call(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Run a model and return its output tensors."""
    return [tensor for _, tensor in named_tensors(run(model, inputs))]


def observe(model: nn.Module, inputs: Inputs, losses: Callable[[nn.Module], list[Tensor]] | None = None) -> Observation:
    """Run a model once in evaluation mode, with gradients, and watch.

    Args:
        model: A model that may be disturbed (a copy).
        inputs: From :func:`as_inputs`.
        losses: Runs the user's losses on a batch; what runs there and not in the forward is noted too.

    Raises:
        ValueError: If the model cannot run on the inputs, returns no tensor, or none that depends on a parameter.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    seen, made_by = Observation(), dict[Any, nn.Module]()
    with torch.enable_grad(), _watching(model, seen, made_by):
        model.eval()
        try:
            outputs = call(model, inputs)
        except (RuntimeError, TypeError, ValueError, LookupError, AssertionError, AttributeError) as error:
            raise ValueError(
                f"example_inputs: the model must run on them, found {type(error).__name__}: {error}; pass a tensor, a "
                "tuple of positional or a dict of keyword arguments of one forward"
            ) from error
    if not any(tensor.grad_fn is not None for tensor in outputs):
        raise ValueError("model: an output must depend on a parameter, found none that does; return the heads' outputs")
    reached = _reached([tensor.grad_fn for tensor in outputs], made_by, seen.outputs)
    ran = set(made_by.values())
    if losses is not None:
        _observe_losses(model, losses, seen, ran)
    seen.side_branches = ran - reached
    ran |= seen.only_in_losses
    seen.idle = {layer for layer in _layers(model) if layer not in ran} - _read_by_others(model, outputs)
    return seen


def _read_by_others(model: nn.Module, outputs: list[Tensor]) -> set[nn.Module]:
    """Return layers with a weight that outputs depend on."""
    front, seen, read = [tensor.grad_fn for tensor in outputs], set[Any](), set[int]()
    while front:
        node = front.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        read |= {id(node.variable)} if hasattr(node, "variable") else set()
        front += [following for following, _ in node.next_functions]
    return {layer for layer in _layers(model) if id(layer._parameters.get("weight")) in read}


def _layers(model: nn.Module) -> list[nn.Module]:
    """List what makes channels; not what is inside a layer whose rule covers it, as in an attention."""
    inside = {child for module in model.modules() if rule_of(module) is not None for child in module.children()}
    return [module for module in model.modules() if makes_channels(module) and module not in inside]


def _observe_losses(
    model: nn.Module, losses: Callable[[nn.Module], list[Tensor]], seen: Observation, ran: set[nn.Module]
) -> None:
    also, made_by, last = Observation(), dict[Any, nn.Module](), set[nn.Module]()
    with torch.enable_grad(), _watching(model, also, made_by):
        values = losses(model)
    reached = _reached([value.grad_fn for value in values], made_by, last)
    seen.only_in_losses = {layer for layer in reached - ran if makes_channels(layer)}
    seen.outputs |= last & seen.only_in_losses


@contextlib.contextmanager
def _watching(model: nn.Module, seen: Observation, made_by: dict[Any, nn.Module]) -> Iterator[None]:
    names = module_names(model)
    by_hand = _ByHand()

    def count(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        rule, out = rule_of(layer), output[0] if isinstance(output, tuple) else output
        for weight, uses in rule.uses(layer, inputs, out).items() if rule is not None and inputs else ():
            name = join(names[layer], weight)
            seen.uses[name] = seen.uses.get(name, 0) + uses
        if isinstance(out, Tensor) and out.grad_fn is not None:
            made_by.setdefault(out.grad_fn, layer)  # a module that returns what the last one inside made adds nothing

    with contextlib.ExitStack() as stack:
        for module in names:
            stack.callback(after_forward(module, count).remove)
        with by_hand:
            yield
    for name, uses in by_hand.beyond(model, seen.uses).items():
        seen.uses[name] = seen.uses.get(name, 0) + uses


# From what a function was given and returned to the multiplications per entry of its weight.
_ROWS: Mapping[Any, Callable[[Tensor, Tensor, Tensor], int]] = {
    F.linear: lambda x, _, __: x.numel() // max(1, x.shape[-1]),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), lambda _, weight, out: out.numel() // len(weight)),
    **dict.fromkeys(
        (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), lambda x, weight, _: x.numel() // len(weight)
    ),
}


class _ByHand(TorchFunctionMode):
    """Counts uses of Parameters that ``F.linear`` and ``F.conv*d`` are given as they are, in whatever module."""

    def __init__(self) -> None:
        super().__init__()
        self._uses: dict[int, int] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        out = func(*args, **named)
        if (rows := _ROWS.get(func)) is not None:
            x, weight = (*args, *(named[name] for name in ("input", "weight") if name in named))[:2]
            self._uses[id(weight)] = self._uses.get(id(weight), 0) + rows(x, weight, out)
        return out

    def beyond(self, model: nn.Module, known: Mapping[str, Fraction | int]) -> dict[str, Fraction | int]:
        """Return what the layers' own forwards do not account for: uses by parents, and of bare Parameters."""
        names: dict[int, list[str]] = {}
        for name, (module, key) in keys_by_name(model).items():
            names.setdefault(id(module._parameters[key]), []).append(name)
        extra: dict[str, Fraction | int] = {}
        for number, own in names.items():  # all names of one that layers share
            extra[own[0]] = self._uses.get(number, 0) - sum(known.get(name, 0) for name in own)
        return {name: uses for name, uses in extra.items() if uses > 0}


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
            if is_last and makes_channels(made_by[node]):
                first.add(made_by[node])
                is_last = False
        front += [(n, is_last) for n, _ in node.next_functions if n is not None]
    return reached
