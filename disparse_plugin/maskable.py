"""Which of the chosen parameters ``torch.nn.utils.prune`` can mask, and what is in the way of the others.

What can be seen without running the model is here. What only a forward shows is in :mod:`disparse_plugin.scoring.uses`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ._support.distributed import ranks_in_all
from ._support.shards import is_sharded
from ._support.shared_memory import sharing_memory
from ._support.user_warning import warn_user
from .kinds import check_kind
from .parameters import (
    Exclude,
    ParameterKey,
    is_masked,
    is_masked_in_place,
    left_in,
    prunable_parameters,
    qualified_names,
)

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


@dataclasses.dataclass(frozen=True)
class Selection:
    """The parameters that are scored and pruned.

    Attributes:
        keys: The ``(module, name)`` pairs.
        names: Their qualified names.
        skipped: What is left out because it cannot be masked: qualified name to reason. Empty if the user listed the
            parameters.
        listed: Whether the user listed them, so that nothing may be left out.
    """

    keys: tuple[ParameterKey, ...]
    names: tuple[str, ...]
    skipped: Mapping[str, str]
    listed: bool


def select(model: nn.Module, parameters: Iterable[ParameterKey] | None, exclude: Exclude | None = None) -> Selection:
    """Choose what is pruned, before anything is scored or changed.

    Args:
        model: The model, unwrapped.
        parameters: ``(module, name)`` pairs; or None for those of :func:`~disparse_plugin.prunable_parameters` that can
            be masked.
        exclude: What to leave out, as in :func:`~disparse_plugin.prunable_parameters`; None if the caller has no such
            argument to speak of.

    Raises:
        TypeError: If ``parameters`` is not a list of ``(module, str)`` pairs.
        ValueError: If the model is one of FSDP1 or a pipeline; if there is no parameter, one is repeated or not of the
            model; or one cannot be masked and was listed, or could be after a step that its message names (lazy, meta).

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
        >>> selection = select(net, None)
        >>> selection.names, selection.skipped
        (('0.weight',), {'1.weight': 'one computed by a parametrization (weight_norm, spectral_norm, ...)'})
    """
    _check_engine(model)
    listed = parameters is not None
    pairs = prunable_parameters(model) if parameters is None else checked_pairs(parameters)
    pairs = left_in(model, pairs, () if exclude is None else exclude)
    names = qualified_names(model, pairs)
    _check_once(names)
    obstacles = dict(_obstacles(model, dict(zip(pairs, names, strict=True))))
    refused = obstacles if listed else {name: found for name, found in obstacles.items() if found.passing}
    if refused:
        raise refusal(refused, pasteable=exclude is not None)
    left = [(key, name) for key, name in zip(pairs, names, strict=True) if name not in obstacles]
    if not left:
        raise ValueError(_nothing(obstacles))
    skipped = {name: obstacle.reason for name, obstacle in obstacles.items()}
    return Selection(tuple(key for key, _ in left), tuple(name for _, name in left), skipped, listed)


def check_takes_masks(model: nn.Module, parameters: Sequence[ParameterKey]) -> None:
    """Check that masks can be put on parameters, which need no values for that: they may be on the meta device.

    Raises:
        ValueError: If something is in the way of one.
    """
    names = dict(zip(parameters, qualified_names(model, parameters), strict=True))
    if refused := {name: obstacle for name, obstacle in _obstacles(model, names) if not obstacle.passing}:
        raise refusal(refused, pasteable=False)


def check_tensor(module: nn.Module, name: str) -> None:
    """Check that one tensor of a module can be masked.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If there is no such tensor, or it cannot be masked.
    """
    check_kind("module", module, nn.Module, "a torch.nn.Module")
    check_kind("name", name, str, "the name of one of its tensors")
    check_parameters(module, [(module, name)])


def _check_engine(model: nn.Module) -> None:
    """Refuse what spreads a model over ranks in another way than DTensors do.

    Raises:
        ValueError: If the model is, or holds, such a wrapper.
    """
    for kind in {base for module in model.modules() for base in type(module).__mro__}:
        if kind.__name__ == "FullyShardedDataParallel" and kind.__module__.startswith("torch."):
            raise ValueError(
                "model: must be sharded by torch.distributed.fsdp.fully_shard (FSDP2) if it is, found "
                "FullyShardedDataParallel (FSDP1), which joins weights to flat ones; use fully_shard, or prune before"
            )
        if kind.__module__.startswith("torch.distributed.pipelining"):
            raise ValueError(
                f"model: must run on every rank, found {kind.__name__} of torch.distributed.pipelining; no rank has a "
                "gradient of one loss for all layers then: prune before the model is split"
            )


def check_parameters(
    model: nn.Module, parameters: Iterable[ParameterKey] | None, exclude: Exclude | None = None
) -> tuple[ParameterKey, ...]:
    """Choose as :func:`select` does, and warn of what is left out.

    Args:
        model: As :func:`select`.
        parameters: As :func:`select`.
        exclude: As :func:`select`.

    Returns:
        The pairs.

    Raises:
        TypeError: As :func:`select`.
        ValueError: As :func:`select`.

    Warns:
        UserWarning: If something that cannot be masked is left out.
    """
    selection = select(model, parameters, exclude)
    warn_of_skipped(selection.skipped, len(selection.keys))
    return selection.keys


def warn_of_skipped(skipped: Mapping[str, str], left: int) -> None:
    """Warn, at the user's line, of parameters that are left out; once for all of them.

    Args:
        skipped: Reason by qualified name.
        left: How many are left.
    """
    if skipped:
        warn_user(
            f"parameters: {len(skipped)} of {len(skipped) + left} cannot be masked and are left out of scoring and "
            f"pruning: {_with_reasons(skipped)}; leave them out yourself, without this warning, with "
            f"exclude={list(skipped)}"
        )


def _with_reasons(skipped: Mapping[str, str]) -> str:
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


def _nothing(obstacles: Mapping[str, Obstacle]) -> str:
    rule = "parameters: at least one (module, name) pair is needed, found none"
    if not obstacles:
        return f"{rule}; the model has no Conv*/Linear weight, the list passed is empty, or exclude leaves nothing"
    reasons = {name: obstacle.reason for name, obstacle in obstacles.items()}
    return f"{rule} that can be masked: {_with_reasons(reasons)}"


def checked_pairs(parameters: object) -> list[ParameterKey]:
    """Return a list of pairs, if it is one.

    Raises:
        TypeError: If not.
    """
    advice = "use prunable_parameters(model) or e.g. [(model.conv1, 'weight')]"
    if isinstance(parameters, str | nn.Module | Tensor | Mapping) or not isinstance(parameters, Iterable):
        raise TypeError(
            f"parameters: must be a list of (module, name) pairs, found {type(parameters).__name__}; {advice}"
        )
    pairs = list(parameters)
    for pair in pairs:
        if not (
            isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], nn.Module) and isinstance(pair[1], str)
        ):
            raise TypeError(
                f"parameters: every entry must be a (module, name) pair, found {_described(pair)}; {advice}"
            )
    return pairs


def _described(pair: object) -> str:
    """Describe what is no pair; a tensor, as from ``model.parameters()``, by its shape."""
    if isinstance(pair, Tensor):
        return f"a {type(pair).__name__} of shape {tuple(pair.shape)} (model.parameters() does not say whose it is)"
    if isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Tensor):
        return f"({pair[0]!r}, a {type(pair[1]).__name__}), as of model.named_parameters()"
    return f"{type(pair).__name__} {pair!r}" if isinstance(pair, str | int | float) else f"a {type(pair).__name__}"


def _check_once(names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"parameters: every pair may stand once, found {', '.join(twice)} more than once")


def _obstacles(model: nn.Module, names: Mapping[ParameterKey, str]) -> Iterator[tuple[str, Obstacle]]:
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
    renamed = is_masked(module, name) and not is_masked_in_place(module, name)
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


def _of_values(tensor: Tensor) -> Obstacle | None:
    """Return what is in the way in the values that a parameter holds."""
    if hasattr(tensor, "__tensor_flatten__") and not is_sharded(tensor):  # torch's protocol of tensors that wrap others
        cure = "score and prune before the weights are quantised"
        return Obstacle("be a plain tensor", type(tensor.data).__name__, cure)
    if tensor.is_meta:
        return Obstacle("hold values", "the meta device", "materialise the model first", passing=True)
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
