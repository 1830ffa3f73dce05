"""Leave a model exactly as it was found, whatever happens in between."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod

from ..parameters import ParameterKey, stored


@contextlib.contextmanager
def undisturbed(model: nn.Module, parameters: Iterable[ParameterKey]) -> Iterator[None]:
    """Differentiate with respect to the given parameters inside, and restore everything on the way out.

    Inside, gradients are on (also under ``torch.no_grad`` of the caller), the listed parameters require them even if
    frozen, and compiled code runs eagerly, because per-task gradients through a compiled graph are fragile. On the way
    out, also after an exception or an interrupt: ``requires_grad``, train/eval mode, buffers (identity and contents;
    BatchNorm statistics), the effective weights of pruned modules, and the random states of torch, numpy and Python
    are as before. Parameters and ``.grad`` are not touched at all.

    Args:
        model: The model, as the caller has it: compiled wrappers are recognised.
        parameters: The ``(module, name)`` pairs to differentiate with respect to.

    Yields:
        Nothing.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_random_states(model))
        stack.enter_context(_modes_and_buffers(model))
        stack.enter_context(_differentiable(parameters))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if _is_compiled(model):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextlib.contextmanager
def _random_states(model: nn.Module) -> Iterator[None]:
    cuda = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=sorted(cuda)):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextlib.contextmanager
def _modes_and_buffers(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    effective, buffers = [], []
    for module in model.modules():
        masks = set()
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):
                masks.add(f"{hook._tensor_name}_mask")
                if hook._tensor_name in module.__dict__:
                    effective.append((module, hook._tensor_name, module.__dict__[hook._tensor_name]))
        # Pruning masks are as large as the weights and no forward writes to them: no copy.
        buffers += [
            (module, name, buffer, buffer.clone())
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in masks
        ]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, name, tensor in effective:
            module.__dict__[name] = tensor
        with torch.no_grad():
            for module, name, buffer, copy in buffers:
                buffer.copy_(copy)
                module._buffers[name] = buffer


@contextlib.contextmanager
def _differentiable(parameters: Iterable[ParameterKey]) -> Iterator[None]:
    frozen = [p for p in (stored(module, name) for module, name in parameters) if not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _is_compiled(model: nn.Module) -> bool:
    return any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in model.modules())
