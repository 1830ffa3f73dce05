"""What is in the way of a mask on a parameter, and how users are told.

What can be seen without running the model is here. What only a forward shows is in :mod:`disparse_plugin.scoring.uses`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._support.distributed import ranks_in_all
from .._support.shards import is_sharded
from .._support.shared_memory import sharing_memory
from ..parameters import ParameterKey, is_masked, is_masked_by_hook, qualified_names

_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Obstacle:
    """Why one parameter cannot be masked.

    Attributes:
        rule: What it must be or have, as messages say it after "must".
        found: What it is instead, as messages say it after "found".
        cure: What to do about it.
        passing: Whether the cure is for the model as a whole, or a moment of patience: then it is never left out.
    """

    rule: str
    found: str
    cure: str = ""
    passing: bool = False

    @property
    def reason(self) -> str:
        """Why it is left out."""
        return self.found.removeprefix("that ")


def obstacles_of(model: nn.Module, names: Mapping[ParameterKey, str]) -> Iterator[tuple[str, Obstacle]]:
    """Yield what is in the way of each parameter, in their order."""
    tied, bypassed = sharing_memory(model), _never_run(model)
    for key, name in names.items():
        obstacle = _of_tensor(*key)
        if obstacle is None and key in tied:
            both = " and ".join(qualified_names(model, tied[key]))
            cure = "a mask on one would leave the other whole: untie them"
            obstacle = Obstacle("have its memory for itself", f"{both} tied", cure)
        if obstacle is None and key[0] in bypassed:
            obstacle = read_by_parent(key[0], ran=False, stale=is_masked(*key))
        if obstacle is not None:
            yield name, obstacle


def read_by_parent(module: nn.Module, *, ran: bool, stale: bool = False) -> Obstacle:
    """Say that a weight is read by its parent when the pruning hook of its own module has not fired.

    Args:
        module: The module that the weight belongs to.
        ran: Whether the module ran later in the forward, or never.
        stale: Whether the weight came with a mask.
    """
    if ran:
        return Obstacle(
            "be read after its own layer has run",
            "that a parent reads it earlier in the forward, when no pruning hook has masked it yet",
            "run the layer first",
        )
    state = "so that the mask it carries is stale" if stale else "where no pruning hook masks it"
    return Obstacle(
        "be used by its own module's forward",
        f"that a parent reads it directly ({type(module).__name__}.forward never ran, as in nn.MultiheadAttention), "
        f"{state}",
    )


def _never_run(model: nn.Module) -> set[nn.Module]:
    """Return the modules whose weight ``nn.MultiheadAttention`` reads without ever running them."""
    return {
        module.out_proj
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward
    }


def _of_tensor(module: nn.Module, name: str) -> Obstacle | None:
    """Return what is in the way that one tensor shows by itself."""
    parametrizations = module._modules.get("parametrizations")
    if parametrizations is not None and name in parametrizations._modules:
        return Obstacle(
            "be a plain parameter",
            "one computed by a parametrization (weight_norm, spectral_norm, ...)",
            "torch's pruning hook cannot mask it; call torch.nn.utils.parametrize.remove_parametrizations first",
        )
    if (norm := _old_norm(module, name)) is not None:
        return Obstacle(
            "be a plain parameter",
            f"what torch.nn.utils.{norm} makes anew at every forward",
            f"torch's pruning hook cannot mask it; call torch.nn.utils.remove_{norm} first",
        )
    renamed = is_masked_by_hook(module, name)
    tensor = module._parameters.get(f"{name}_orig" if renamed else name)
    if tensor is None:
        known = sorted(k for k, v in module._parameters.items() if v is not None)
        found = type(getattr(module, name, None)).__name__
        return Obstacle(
            "be a parameter", found, f"{type(module).__name__} has the parameters {known}; name one of them"
        )
    if is_lazy(tensor):
        cure = "run one batch through the model first"
        return Obstacle("have a shape", "a lazy parameter", cure, passing=True)
    if is_sharded(tensor) and (obstacle := _of_layout(tensor, masked_before=renamed)) is not None:
        return obstacle
    return _of_values(tensor) or (None if is_masked(module, name) else _of_names(module, name))


def _old_norm(module: nn.Module, name: str) -> str | None:
    """Return which of torch's norms of old computes a tensor, which is no parametrization but a hook."""
    if {f"{name}_g", f"{name}_v"} <= module._parameters.keys():
        return "weight_norm"
    return "spectral_norm" if f"{name}_orig" in module._parameters and f"{name}_u" in module._buffers else None


def _of_values(tensor: Tensor) -> Obstacle | None:
    """Return what is in the way in the values that a parameter holds."""
    if hasattr(tensor, "__tensor_flatten__") and not is_sharded(tensor):  # torch's protocol of tensors that wrap others
        cure = "score and prune before the weights are quantised"
        return Obstacle("be a plain tensor", type(tensor.data).__name__, cure)
    if tensor.is_meta:
        return Obstacle("hold values", "the meta device", "materialise the model first", passing=True)
    if tensor.is_inference():
        cure = "make the model, or load it, outside of inference mode"
        return Obstacle("be a normal tensor", "one made in torch.inference_mode", cure, passing=True)
    if not tensor.is_floating_point():
        return Obstacle("be of a floating point type", f"{tensor.dtype}")
    if tensor.numel() == 0:
        return Obstacle("hold at least one entry", f"shape {tuple(tensor.shape)}")
    return None


def _of_names(module: nn.Module, name: str) -> Obstacle | None:
    """Return what stands where torch's pruning puts a mask and the original weight."""
    for wanted in (f"{name}_mask", f"{name}_orig"):
        if hasattr(module, wanted):
            cure = "pruning would take its place: rename it in the layer"
            return Obstacle(
                f"leave the name {wanted} free", f"{type(module).__name__} with a {wanted} of its own", cure
            )
    return None


def _of_layout(tensor: Any, *, masked_before: bool) -> Obstacle | None:
    """Return what is in the way of a DTensor; all of it concerns the model as a whole."""
    if masked_before:
        cure = "save_masks and fold the model before fully_shard, load_masks after it"
        return Obstacle("be sharded without a mask", "a mask that was there before fully_shard", cure, passing=True)
    if any(placement.is_partial() for placement in tensor.placements):
        return Obstacle("be sharded or replicated", "a DTensor of partial sums", "redistribute it", passing=True)
    if tensor.device_mesh.get_coordinate() is None or ranks_in_all() % tensor.device_mesh.size():
        found = f"a mesh of {tensor.device_mesh.size()} ranks with {ranks_in_all()} in the process group"
        cure = "every rank must hold a part of it; pipelines are not supported"
        return Obstacle("be spread over all ranks", found, cure, passing=True)
    if not tensor.requires_grad:
        cure = "call requires_grad_(True) on it before scoring"
        return Obstacle("require a gradient where weights are sharded", "that it is frozen", cure)
    return None


def with_reasons(skipped: Mapping[str, str]) -> str:
    """List names with their reasons, each reason once."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        by_reason.setdefault(reason, []).append(name)
    return "; ".join(
        f"{', '.join(names[:_SHOWN])}{f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''} ({reason})"
        for reason, names in by_reason.items()
    )


def refusal(obstacles: Mapping[str, Obstacle], *, pasteable: bool) -> ValueError:
    """Make the error for listed parameters that cannot be masked.

    Args:
        obstacles: What is in the way, by qualified name.
        pasteable: Whether the caller has an ``exclude`` argument to paste the names into.
    """
    name, first = next(iter(obstacles.items()))
    others = [other for other in obstacles if other != name]
    more = f" (and so for {', '.join(others[:_SHOWN])}{' ...' if len(others) > _SHOWN else ''})" if others else ""
    out = f"leave {'them' if others else 'it'} out" + (f": exclude={list(obstacles)}" if pasteable else "")
    cure = f"{first.cure}, or {out}" if first.cure and not first.passing else first.cure or out
    return ValueError(f"parameters: {name} must {first.rule}, found {first.found}{more}; {cure}")
