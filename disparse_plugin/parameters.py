"""Which tensors are pruned: finding and naming ``(module, name)`` pairs, and reading what is stored behind them."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from .errors import did_you_mean

ParameterKey: TypeAlias = tuple[nn.Module, str]
# What can be left out: modules with everything inside them, qualified names, glob patterns of names.
Exclude: TypeAlias = Iterable[nn.Module | str]

_PRUNABLE = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)

# Path components that wrappers of PyTorch put into names; they come and go with the wrapper, so no key may hold them.
_WRAPPER_COMPONENTS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def prunable_parameters(model: nn.Module, *, exclude: Exclude = ()) -> list[ParameterKey]:
    """List every convolution and linear weight of a model, as ``torch.nn.utils.prune`` wants them.

    These are the weights that DiSparse scores: biases and normalisation layers are never pruned or counted
    (Sun et al., CVPR 2022, section 3).

    Args:
        model: Any module. Wrappers (``DistributedDataParallel``, ``torch.compile``) are looked through.
        exclude: What to leave out: modules (with everything inside them), qualified names of modules or parameters
            (``"encoder.stem"``, ``"head.weight"``), or glob patterns of such names (``"*.attn.*"``).

    Returns:
        ``(module, "weight")`` pairs in the order of ``model.modules()``, each module once.

    Raises:
        TypeError: If ``model`` is no module, or an entry of ``exclude`` is neither a module nor a string.
        ValueError: If an entry of ``exclude`` is nothing of ``model``.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
        >>> [(type(module).__name__, name) for module, name in prunable_parameters(net)]
        [('Conv2d', 'weight'), ('Linear', 'weight')]
        >>> len(prunable_parameters(net, exclude=[net[3]])), len(prunable_parameters(net, exclude=["0.*"]))
        (1, 1)
    """
    return left_in(model, [(m, "weight") for m in unwrap(model).modules() if isinstance(m, _PRUNABLE)], exclude)


def left_in(
    model: nn.Module, parameters: Iterable[ParameterKey], exclude: Exclude, argument: str = "exclude"
) -> list[ParameterKey]:
    """Leave out what a user excludes; the one meaning of ``exclude`` everywhere.

    Args:
        model: The model.
        parameters: ``(module, name)`` pairs of it.
        exclude: As in :func:`prunable_parameters`.
        argument: What messages call it.

    Returns:
        The pairs that are left, in their order.

    Raises:
        TypeError: If an entry is neither a module nor a string, or all is one string.
        ValueError: If an entry is nothing of the model.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> [module is net[1] for module, _ in left_in(net, prunable_parameters(net), ["0.weight"])]
        [True]
    """
    pairs = list(parameters)
    if not (entries := listed(argument, exclude)):
        return pairs
    # A weight that is computed by a parametrization is in the list under a name that no Parameter has.
    named = {**keys_by_name(model), **dict(zip(qualified_names(model, pairs), pairs, strict=True))}
    paths = {path: module for module, path in module_names(model).items() if path}
    gone: set[ParameterKey] = set()
    for entry in entries:
        gone |= _matching(entry, named, paths, model, argument)
    return [pair for pair in pairs if pair not in gone]


def listed(argument: str, entries: object) -> list[Any]:
    """Return modules and names as a list.

    Raises:
        TypeError: If it is one of them, or nothing that holds any.

    Example:
        >>> listed("exclude", "head.*")
        Traceback (most recent call last):
        TypeError: exclude: must be a list, found str; write ['head.*']
    """
    if isinstance(entries, str | nn.Module):
        raise TypeError(f"{argument}: must be a list, found {type(entries).__name__}; write [{_shown(entries)}]")
    if not isinstance(entries, Iterable):
        raise TypeError(f"{argument}: must be a list of modules, names or patterns, found {type(entries).__name__}")
    return list(entries)


def _matching(
    entry: object,
    named: dict[str, ParameterKey],
    paths: dict[str, nn.Module],
    model: nn.Module,
    argument: str,
) -> set[ParameterKey]:
    """Return the parameters that one entry of ``exclude`` means."""
    if isinstance(entry, nn.Module):
        found = [entry] if entry in set(unwrap(model).modules()) else []
        names = []
    elif isinstance(entry, str):
        found = [module for path, module in paths.items() if fnmatch.fnmatchcase(path, entry)]
        names = [key for name, key in named.items() if fnmatch.fnmatchcase(name, entry)]
    else:
        raise TypeError(
            f"{argument}: every entry must be a module, a name or a glob pattern, found {type(entry).__name__}: "
            f"{entry!r}"
        )
    if not found and not names:
        hint = did_you_mean(entry, [*paths, *named]) if isinstance(entry, str) else "; take it from the same model"
        raise ValueError(
            f"{argument}: every entry must be a module of the model, or the name or glob pattern of one or of a "
            f"parameter, found {_shown(entry)}{hint}"
        )
    inside = {inner for module in found for inner in module.modules()}
    return {*names, *(key for key in named.values() if key[0] in inside)}


def _shown(entry: object) -> str:
    return repr(entry) if isinstance(entry, str) else f"a {type(entry).__name__}"


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile`` wrappers.

    Raises:
        TypeError: If it is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: must be a torch.nn.Module, found {type(model).__name__}")
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def check_not_synced(model: nn.Module) -> None:
    """Refuse ``DistributedDataParallel``, around a model or inside it, where Parameters are about to be replaced.

    It syncs the gradients of the Parameters that it found when it was made, and of no others: the ranks would drift
    apart without a word. Masks replace none.

    Raises:
        ValueError: If there is one.
    """
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "model: must not be in DistributedDataParallel when tensors become smaller, found that it is, which would "
            "not sync the new Parameters; do it before wrapping, or pass the module inside and wrap that anew after it"
        )


def qualified_names(model: nn.Module, parameters: Iterable[ParameterKey]) -> tuple[str, ...]:
    """Return the fully qualified name of each parameter, without the components that wrappers add.

    A pruned parameter keeps the name it had before pruning (``conv1.weight``, not ``conv1.weight_orig``).

    Raises:
        ValueError: If a module is not part of ``model``.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
        >>> qualified_names(net, prunable_parameters(net))
        ('0.weight', '1.0.weight')
    """
    paths = {module: path for path, module in reversed(list(unwrap(model).named_modules()))}
    names = []
    for module, name in parameters:
        if module not in paths:
            raise ValueError(
                f"parameters: every module must be part of the model, found {type(module).__name__} (tensor {name!r}) "
                "which is not in it; take the pairs from prunable_parameters(model) of the same model object"
            )
        parts = [part for part in paths[module].split(".") if part and part not in _WRAPPER_COMPONENTS]
        names.append(".".join([*parts, name]))
    return tuple(names)


def without_wrappers(name: str) -> str:
    """Return a name without the components that wrappers add.

    Example:
        >>> without_wrappers("encoder._orig_mod.0.weight")
        'encoder.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_COMPONENTS)


def module_names(model: nn.Module) -> dict[nn.Module, str]:
    """Name every module as in the qualified names of its parameters, without wrappers.

    Example:
        >>> list(module_names(nn.Sequential(nn.Linear(2, 2), nn.ReLU())).values())
        ['', '0', '1']
    """
    modules = list(dict.fromkeys(unwrap(model).modules()))
    names = qualified_names(model, [(module, "") for module in modules])
    return {module: name.removesuffix(".") for module, name in zip(modules, names, strict=True)}


def keys_by_name(model: nn.Module) -> dict[str, ParameterKey]:
    """Find every parameter of a model by the name that :func:`qualified_names` gives it.

    Example:
        >>> sorted(keys_by_name(nn.Sequential(nn.Linear(2, 2))))
        ['0.bias', '0.weight']
    """
    keys = [
        (module, plain if is_masked(module, plain := name.removesuffix("_orig")) else name)
        for module in unwrap(model).modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    return dict(zip(qualified_names(model, keys), keys, strict=True))


def stored(module: nn.Module, name: str) -> nn.Parameter:
    """Return the trainable Parameter behind ``module.name``: ``name_orig`` once pruned, ``name`` before.

    Raises:
        ValueError: If there is none.
    """
    parameter = module._parameters.get(f"{name}_orig")
    if parameter is None:
        parameter = module._parameters.get(name)
    if parameter is None:
        raise ValueError(
            f"parameters: {name} of {type(module).__name__} must still be a parameter, found that it is none (was it "
            "parametrized or taken away after scoring?); undo that, or score the model as it is now"
        )
    return parameter


def is_masked(module: nn.Module, name: str) -> bool:
    """Tell whether ``module.name`` carries a mask of ``torch.nn.utils.prune``, or one in the weight itself."""
    if module._buffers.get(f"{name}_mask") is None:
        return False
    # spectral_norm of old also keeps a Parameter called weight_orig, but no mask.
    return module._parameters.get(f"{name}_orig") is not None or is_masked_in_place(module, name)


def is_masked_in_place(module: nn.Module, name: str) -> bool:
    """Tell whether the mask of ``module.name`` is kept as zeros of the weight itself, as in a sharded model."""
    hooks = module._forward_pre_hooks.values()
    return any(getattr(hook, "in_weight", False) and getattr(hook, "_tensor_name", None) == name for hook in hooks)


def is_masked_by_hook(module: nn.Module, name: str) -> bool:
    """Tell whether torch's pruning hook makes ``module.name`` anew at every forward, from ``name_orig``."""
    return is_masked(module, name) and not is_masked_in_place(module, name)


def alive_mask(module: nn.Module, name: str) -> Tensor | None:
    """Return which entries are alive (bool, the weight's shape), or None where nothing has been pruned."""
    if not is_masked(module, name):
        return None
    mask = module._buffers[f"{name}_mask"]
    assert mask is not None
    return mask != 0


def present_mask(key: ParameterKey) -> Tensor:
    """Return the mask that a parameter carries, bool; all True if it carries none."""
    mask = alive_mask(*key)
    return torch.ones_like(stored(*key), dtype=torch.bool) if mask is None else mask


def inputs_first(module: nn.Module, name: str) -> int:
    """Tell whether a weight lies as (inputs, outputs), and in how many groups; 0 where outputs come first.

    Transposed convolutions keep theirs so, and the ``Conv1D`` of transformers, which is a linear layer.

    Example:
        >>> inputs_first(nn.ConvTranspose2d(8, 4, 3, groups=2), "weight"), inputs_first(nn.Conv2d(8, 4, 3), "weight")
        (2, 0)
    """
    if name != "weight":
        return 0
    if isinstance(module, _ConvTransposeNd):
        return module.groups
    return int(isinstance(module, class_if_loaded("transformers.pytorch_utils:Conv1D")))


def class_if_loaded(name: str) -> Any:
    """Return a class of a package that may not be installed, as ``module:class``; ``()`` if nobody has imported it.

    Example:
        >>> class_if_loaded("torch.nn:Linear") is nn.Linear, class_if_loaded("nowhere:Linear")
        (True, ())
    """
    module, _, last = name.partition(":")
    return getattr(sys.modules.get(module), last, ())


def score_dtype(parameter: Tensor) -> torch.dtype:
    """Return the type in which a parameter's scores are kept: float64 for float64, float32 for all others."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32
