"""Leave a model exactly as it was found, whatever happens in between."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.prune import BasePruningMethod

from ..parameters import ParameterKey, stored
from .kept_graphs import no_graph_kept
from .user_warning import warn_user

# Of a tensor: memory, place in it, shape, strides.
_Layout: TypeAlias = tuple[torch.UntypedStorage, int, torch.Size, tuple[int, ...]]
_ByDevice: TypeAlias = dict[torch.device, Tensor]


@contextlib.contextmanager
def undisturbed(model: nn.Module, parameters: Iterable[ParameterKey]) -> Iterator[None]:
    """Differentiate with respect to the given parameters inside, and restore everything on the way out.

    Inside, gradients are on (also under ``torch.no_grad`` of the caller), the listed parameters require them even if
    frozen, and compiled code runs eagerly, because per-task gradients through a compiled graph are fragile. On the way
    out, also after an exception or an interrupt: ``requires_grad``, train/eval mode, buffers (which there are, their
    identity, shape and contents; BatchNorm statistics), the effective weights of pruned modules, and the random states
    of torch, numpy and Python are as before. So are parameters that the forward replaces, and embeddings that it
    rescales (``max_norm``); to one that it overwrites in another way the user is pointed. Modules keep nothing of a
    graph (:func:`.no_graph_kept`). ``.grad`` is not touched.

    Args:
        model: The model, as the caller has it.
        parameters: The ``(module, name)`` pairs to differentiate with respect to.

    Yields:
        Nothing.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(same_random_states(model))
        stack.enter_context(no_graph_kept(model))
        stack.enter_context(_modes_and_buffers(model))
        stack.enter_context(_values(model))
        stack.enter_context(_differentiable(model, parameters))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if "torch._dynamo" in sys.modules:  # something is compiled: the model, or a copy that the losses run
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@dataclasses.dataclass(frozen=True)
class RandomStates:
    """Where the random numbers of torch, numpy and Python are, on all devices of a model."""

    torch: Tensor
    devices: _ByDevice
    numpy: Any
    python: Any

    @classmethod
    def now(cls, model: nn.Module) -> RandomStates:
        """Return where they are."""
        found = {device: _state_of(device) for device in {p.device for p in model.parameters()}}
        devices = {device: state for device, state in found.items() if state is not None}
        return cls(torch.get_rng_state(), devices, np.random.get_state(), random.getstate())

    def restore(self) -> None:
        """Go back to there."""
        torch.set_rng_state(self.torch)
        for device, state in self.devices.items():
            getattr(torch, device.type).set_rng_state(state, *_which(device))
        np.random.set_state(self.numpy)
        random.setstate(self.python)


def _state_of(device: torch.device) -> Tensor | None:
    """Return where the random numbers of an accelerator are, if it has its own."""
    module: Any = getattr(torch, device.type, None)
    return module.get_rng_state(*_which(device)) if hasattr(module, "get_rng_state") else None


def _which(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # of which there is one, and torch 2.6 cannot be told


@contextlib.contextmanager
def same_random_states(model: nn.Module) -> Iterator[None]:
    """Go back, on the way out, to where the random numbers were."""
    before = RandomStates.now(model)
    try:
        yield
    finally:
        before.restore()


@contextlib.contextmanager
def _modes_and_buffers(model: nn.Module) -> Iterator[None]:
    _refuse_lazy(model)
    modules = list(model.modules())
    modes = [module.training for module in modules]
    tables = [
        (table, table.copy()) for module in modules for table in (module._buffers, module._non_persistent_buffers_set)
    ]
    with contextlib.ExitStack() as stack:  # one that cannot be restored does not keep the others from it
        for module in modules:
            masks = set()
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, BasePruningMethod):
                    masks.add(f"{hook._tensor_name}_mask")
                    if hook._tensor_name in module.__dict__:
                        name = hook._tensor_name
                        stack.callback(module.__dict__.__setitem__, name, module.__dict__[name])
            # Pruning masks are as large as the weights and no forward writes to them: no copy.
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in masks:
                    layout = _layout(buffer)
                    stack.callback(_rewrite, buffer, _compact(buffer, layout).clone(), layout)
        stack.callback(_set_modes, modules, modes)
        stack.callback(_refill, tables)
        yield


def _refuse_lazy(model: nn.Module) -> None:
    for name, buffer in model.named_buffers():
        if is_lazy(buffer):
            raise ValueError(
                f"model: every buffer must have a shape, found {name} lazy; run one batch through the model first"
            )


def _is_plain(parameter: nn.Parameter) -> bool:
    return _layout(parameter.data) is not None and not parameter.is_meta and not parameter.is_inference()


def _set_modes(modules: Sequence[nn.Module], modes: Sequence[bool]) -> None:
    for module, training in zip(modules, modes, strict=True):
        if module.training != training:
            module.training = training


def _refill(tables: Sequence[tuple[Any, Any]]) -> None:
    """Give tables of modules the entries that they had; what was born meanwhile goes."""
    for table, entries in tables:
        table.clear()
        table.update(entries)


def _layout(buffer: Tensor) -> _Layout | None:
    """Return where a tensor lies in memory, or None where that means nothing: sparse ones and tensor subclasses."""
    if type(buffer) is not Tensor or buffer.layout is not torch.strided:
        return None
    return buffer.untyped_storage(), int(buffer.storage_offset()), buffer.shape, buffer.stride()


def _compact(buffer: Tensor, layout: _Layout | None) -> Tensor:
    """Return one entry of each place in memory: an expanded dimension repeats the same."""
    if layout is not None:
        for dim, (size, stride) in enumerate(zip(layout[2], layout[3], strict=True)):
            if stride == 0 and size > 1:
                buffer = buffer.narrow(dim, 0, 1)
    return buffer


def _rewrite(buffer: Tensor, values: Tensor, layout: _Layout | None) -> None:
    """Give a buffer the shape, the memory and the values that it had."""
    with torch.inference_mode(buffer.is_inference()), torch.no_grad():
        now = _layout(buffer)
        if layout is not None and now is not None:
            moved = now[0].data_ptr() != layout[0].data_ptr()
            if moved or now[1:] != layout[1:]:
                buffer.set_(*layout)
        _compact(buffer, layout).copy_(values)


@contextlib.contextmanager
def _values(model: nn.Module) -> Iterator[None]:
    """Give parameters back the values that the forward of some layers changes."""
    plain = {name: p for name, p in model.named_parameters() if _is_plain(p)}
    held = [(parameter, parameter.data, parameter._version) for parameter in plain.values()]
    copies = {
        module.weight: module.weight.detach().clone()
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
    }
    try:
        yield
    finally:
        for parameter, data, _ in held:
            if parameter.data.data_ptr() != data.data_ptr() and parameter.dtype == data.dtype:
                parameter.data = data
        changed = {parameter for parameter, _, version in held if parameter._version != version} - copies.keys()
        with torch.no_grad():
            for weight, values in copies.items():
                weight.copy_(values)
        if written := [name for name, parameter in plain.items() if parameter in changed]:
            warn_user(
                f"model: must not write to its parameters in the forward, found {len(written)} overwritten (first: "
                f"{written[0]}); scoring has changed them: write where the optimizer steps"
            )


@contextlib.contextmanager
def _differentiable(model: nn.Module, parameters: Iterable[ParameterKey]) -> Iterator[None]:
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for module, name in parameters:
            stored(module, name).requires_grad_(True)
        yield
    finally:
        for parameter, required in before:
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)
