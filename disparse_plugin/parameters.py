"""Which tensors are pruned: finding, naming and checking ``(module, name)`` pairs."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

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
        TypeError: If an entry of ``exclude`` is neither a module nor a string.
        ValueError: If an entry of ``exclude`` is nothing of ``model``.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
        >>> [(type(module).__name__, name) for module, name in prunable_parameters(net)]
        [('Conv2d', 'weight'), ('Linear', 'weight')]
        >>> len(prunable_parameters(net, exclude=[net[3]])), len(prunable_parameters(net, exclude=["0.*"]))
        (1, 1)
    """
    return left_in(model, [(m, "weight") for m in model.modules() if isinstance(m, _PRUNABLE)], exclude)


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
    if isinstance(exclude, str | nn.Module):
        raise TypeError(f"{argument}: must be a list, found {type(exclude).__name__}; write [{_shown(exclude)}]")
    entries = list(exclude)
    if not entries:
        return pairs
    named = keys_by_name(model)
    paths = {path: module for module, path in module_names(model).items() if path}
    gone: set[ParameterKey] = set()
    for entry in entries:
        gone |= _matching(entry, named, paths, model, argument)
    return [pair for pair in pairs if pair not in gone]


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
    """Return the module inside ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile`` wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


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
    """Tell whether ``module.name`` carries a mask of ``torch.nn.utils.prune``."""
    # spectral_norm of old also keeps a Parameter called weight_orig, but no mask.
    return module._parameters.get(f"{name}_orig") is not None and module._buffers.get(f"{name}_mask") is not None


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


def check_parameters(
    model: nn.Module, parameters: Iterable[ParameterKey] | None, exclude: Exclude = ()
) -> tuple[ParameterKey, ...]:
    """Check a list of ``(module, name)`` pairs against a model, before anything is scored or changed.

    Args:
        model: The model, unwrapped.
        parameters: The pairs, or None for :func:`prunable_parameters`.
        exclude: What to leave out of them, as in :func:`prunable_parameters`.

    Returns:
        The pairs as a tuple.

    Raises:
        TypeError: If an entry is not a ``(module, str)`` pair.
        ValueError: If there is none, one is repeated, one is not a dense floating point parameter of the model, or one
            shares its memory with another parameter.
    """
    pairs = tuple(prunable_parameters(model) if parameters is None else parameters)
    for pair in pairs:
        _check_pair(pair)
    pairs = tuple(left_in(model, pairs, exclude))
    if not pairs:
        raise ValueError(
            "parameters: at least one (module, name) pair is needed, found none; the model has no Conv*/Linear "
            "weight, the list passed is empty, or exclude leaves nothing"
        )
    names = qualified_names(model, pairs)
    for (module, name), qualified in zip(pairs, names, strict=True):
        _check_tensor(module, name, qualified)
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"parameters: every pair may stand once, found {', '.join(twice)} more than once")
    _check_untied(model, pairs)
    return pairs


def _check_pair(pair: object) -> None:
    if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], nn.Module) and isinstance(pair[1], str)):
        raise TypeError(
            f"parameters: every entry must be a (module, name) pair, found {pair!r}; use prunable_parameters(model) or "
            "e.g. [(model.conv1, 'weight')]"
        )


def _check_tensor(module: nn.Module, name: str, qualified: str) -> None:
    parametrizations = module._modules.get("parametrizations")
    if parametrizations is not None and name in parametrizations._modules:
        raise ValueError(
            f"parameters: {qualified} must be a plain parameter, found one computed by a parametrization (weight_norm, "
            "spectral_norm, ...), which torch's pruning hook cannot mask; call "
            "torch.nn.utils.parametrize.remove_parametrizations first, or leave it out"
        )
    tensor = module._parameters.get(f"{name}_orig" if is_masked(module, name) else name)
    if tensor is None:
        raise ValueError(
            f"parameters: {qualified} must be a parameter, found {type(getattr(module, name, None)).__name__}; "
            f"{type(module).__name__} has the parameters "
            f"{sorted(k for k, v in module._parameters.items() if v is not None)}"
        )
    if is_lazy(tensor):
        raise ValueError(
            f"parameters: {qualified} must have a shape, found a lazy parameter; run one batch through the model first"
        )
    if hasattr(tensor, "__tensor_flatten__"):  # torch's protocol of tensors that wrap other tensors
        raise ValueError(
            f"parameters: {qualified} must be a plain tensor, found {type(tensor.data).__name__}; score and prune "
            "before the weights are sharded (fully_shard) or quantised"
        )
    if tensor.is_meta:
        raise ValueError(
            f"parameters: {qualified} must hold values, found the meta device; materialise the model first"
        )
    if not tensor.is_floating_point():
        raise ValueError(
            f"parameters: {qualified} must be of a floating point type, found {tensor.dtype}; leave it out"
        )
    if tensor.numel() == 0:
        raise ValueError(
            f"parameters: {qualified} must hold at least one entry, found shape {tuple(tensor.shape)}; leave it out"
        )


def _check_untied(model: nn.Module, pairs: Sequence[ParameterKey]) -> None:
    """Refuse a parameter whose memory another parameter shares: masking one would leave the other unmasked."""
    spans = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not is_lazy(parameter) and not parameter.is_meta and parameter.numel():
                spans.append((str(parameter.device), *_span(parameter), module, name.removesuffix("_orig")))
    wanted = set(pairs)
    spans.sort(key=lambda span: span[:3])
    for first, second in itertools.pairwise(spans):
        overlap = first[0] == second[0] and second[1] < first[2]
        if overlap and not wanted.isdisjoint({first[3:], second[3:]}):
            names = qualified_names(model, [first[3:], second[3:]])
            raise ValueError(
                f"parameters: a pruned weight must have its memory for itself, found {names[0]} and {names[1]} tied; a "
                "mask on one would leave the other whole: untie them, or leave both out with parameters=..."
            )


def _span(tensor: Tensor) -> tuple[int, int]:
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    start = tensor.data_ptr()
    return start, start + extent * tensor.element_size()


def score_dtype(parameter: Tensor) -> torch.dtype:
    """Return the type in which a parameter's scores are kept: float64 for float64, float32 for all others."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32
