"""Before channels are removed: checks, a copy to work on, and the groups that there are."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..agreement.amounts import check_amount
from ..parameters import ParameterKey, is_masked, module_names
from .adapter.graph import TRACE_ERRORS, trace
from .adapter.groups import Groups, channel_groups
from .adapter.observation import Inputs, Observation, observe
from .attention import attention_heads
from .budget import QUANTITIES
from .groups import NORMALIZERS, REDUCTIONS, channel_parameters


def check_options(
    amount: float, of: str, reduction: str, normalizer: str | None, max_pruning_ratio: float, round_to: int | None
) -> None:
    """Check the options of a removal as far as that is possible without the model.

    Raises:
        TypeError: If ``amount`` is no number.
        ValueError: If an option is unknown or out of range.
    """
    check_amount(amount)
    if of not in QUANTITIES:
        raise ValueError(f"of: must be one of {', '.join(QUANTITIES)}, found {of!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: must be one of {', '.join(REDUCTIONS)}, found {reduction!r}")
    if normalizer is not None and normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer: must be None or one of {', '.join(NORMALIZERS)}, found {normalizer!r}")
    if not 0 <= max_pruning_ratio <= 1:
        raise ValueError(f"max_pruning_ratio: must be in [0, 1], found {max_pruning_ratio}")
    if round_to is not None and (not isinstance(round_to, int) or round_to < 1):
        raise ValueError(f"round_to: must be a positive int or None, found {round_to!r}")


def check_plain(root: nn.Module) -> None:
    """Check that a model's weights are plain trainable parameters.

    Raises:
        ValueError: If there is a mask, a parametrization, or nothing that wants gradients.
    """
    for module in root.modules():
        for name in list(module._parameters):
            if is_masked(module, name.removesuffix("_orig")) and name.endswith("_orig"):
                raise ValueError(
                    f"model: must carry no masks, found one on {type(module).__name__}.{name.removesuffix('_orig')}; "
                    "make them permanent first with torch.nn.utils.prune.remove(module, name), or remove channels "
                    "before pruning weights"
                )
        if parametrize.is_parametrized(module) or any(
            type(hook).__name__ in ("WeightNorm", "SpectralNorm") for hook in module._forward_pre_hooks.values()
        ):
            raise ValueError(
                f"model: weights must be plain parameters, found a parametrization on {type(module).__name__}; call "
                "torch.nn.utils.parametrize.remove_parametrizations first"
            )
    if not any(parameter.requires_grad for parameter in root.parameters()):
        raise ValueError(
            "model: at least one parameter must require gradients, found all frozen; unfreeze what is used"
        )


def tolerance_of(model: nn.Module) -> float:
    """Return how large rounding errors may become, relative to the output, in the model's precision."""
    return max((1e-3 if p.dtype in (torch.float32, torch.float64) else 0.1) for p in model.parameters())


def scored_parameters(root: nn.Module, idle: Collection[str]) -> list[ParameterKey]:
    """List what to score: not the layers that never run, whose weights a parent may read."""
    names = module_names(root)
    return [(module, name) for module, name in channel_parameters(root) if names[module] not in idle]


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy of a model."""
    try:
        return copy.deepcopy(model)
    except RuntimeError:
        # Some models cache tensors of a graph in their evaluation mode; a change of mode drops them.
        modes = [(module, module.training) for module in model.modules()]
        model.train(not model.training)
        model.train(not model.training)
        for module, mode in modes:
            module.training = mode
        return copy.deepcopy(model)


def find_groups(
    model: nn.Module,
    inputs: Inputs,
    original: nn.Module,
    ignored_layers: Collection[nn.Module],
    customized_pruners: Mapping[type[nn.Module], Any] | None,
) -> tuple[Groups, Observation]:
    """Trace a copy (``model``) of the original; leave out bare parameters that do not fit, as long as that helps."""
    twins = dict(zip(original.modules(), model.modules(), strict=True))
    for layer in ignored_layers:
        if layer not in twins:
            raise ValueError(f"ignored_layers: must be modules of the model, found {type(layer).__name__} that is not")
    ignored = {inner for layer in ignored_layers for inner in twins[layer].modules()}
    seen, unfit = observe(model, inputs), list[nn.Parameter]()
    while True:
        try:
            graph = trace(model, inputs, ignored_parameters=unfit, customized_pruners=customized_pruners)
        except TRACE_ERRORS as error:
            raise ValueError(
                f"model: torch-pruning must be able to trace it, found {type(error).__name__}: {error}; pass "
                "customized_pruners for unusual layers, or mask weights instead (DiSparseStatic)"
            ) from error
        found = channel_groups(graph, ignored_layers=ignored, outputs=seen.outputs, heads=attention_heads(model))
        fresh = [p for p in found.clashing if not any(p is known for known in unfit)]
        if not fresh:
            break
        unfit += fresh
    names = module_names(model)
    found.skipped |= {names[layer]: "runs but reaches no output" for layer in seen.untraced}
    found.idle = {names[layer] for layer in seen.idle}
    found.skipped |= {name: "does not run" for name in found.idle if name not in found.skipped}
    return found, seen
