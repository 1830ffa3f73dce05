"""Which of the chosen parameters are scored and pruned: those that ``torch.nn.utils.prune`` can mask."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from .._support.shared_memory import kept_aside
from .._support.user_warning import warn_user
from ..kinds import check_kind
from ..parameters import Exclude, ParameterKey, left_in, prunable_parameters, qualified_names
from .obstacles import Obstacle, obstacles_of, refusal, with_reasons


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
    obstacles = dict(obstacles_of(model, dict(zip(pairs, names, strict=True))))
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
    if refused := {name: obstacle for name, obstacle in obstacles_of(model, names) if not obstacle.passing}:
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
            f"pruning: {with_reasons(skipped)}; leave them out yourself, without this warning, with "
            f"exclude={list(skipped)}"
        )


def warn_of_kept_aside(model: nn.Module, keys: Sequence[ParameterKey]) -> None:
    """Warn of weights that another module keeps in a plain list: what it multiplies with them there has no mask."""
    if kept := kept_aside(model, keys):
        where = ", ".join(f"{name} in {attribute}" for attribute, name in kept.items())
        warn_user(
            f"parameters: every weight must be read from its own layer if it is multiplied with, found {where}, where "
            f"no mask reaches; let the parent read layer.weight after the layer has run, or leave out "
            f"exclude={sorted(set(kept.values()))}"
        )


def _nothing(obstacles: Mapping[str, Obstacle]) -> str:
    rule = "parameters: at least one (module, name) pair is needed, found none"
    if not obstacles:
        return f"{rule}; the model has no Conv*/Linear weight, the list passed is empty, or exclude leaves nothing"
    reasons = {name: obstacle.reason for name, obstacle in obstacles.items()}
    return f"{rule} that can be masked: {with_reasons(reasons)}"


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
