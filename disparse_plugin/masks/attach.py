"""Masks on a model: reading, copying, attaching, applying and folding them.

Masks are bool, True = keep, keyed by ``(module, name)`` or by qualified name. Everything here reads and writes what
``torch.nn.utils.prune`` leaves on a module (``weight_orig``, ``weight_mask``, one hook), whoever pruned it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from .._support.all_or_nothing import all_or_nothing
from .._support.shards import local, part_here, reshard
from ..agreement.tallies import counts_true
from ..errors import wrong
from ..in_weight import attach_in_weights, masks_in_weights
from ..kinds import check_kind
from ..maskable import Obstacle, check_takes_masks, refusal
from ..parameters import ParameterKey, alive_mask, is_masked, keys_by_name, qualified_names, stored, unwrap

Masks: TypeAlias = Mapping[ParameterKey, Tensor] | Mapping[str, Tensor]

_Model = TypeVar("_Model", bound=nn.Module)


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the masks that a model carries, by qualified name.

    Args:
        model: Any module.

    Returns:
        bool tensors of the weights' shapes, on their devices; only parameters that carry a mask.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> hook = prune.custom_from_mask(net[0], "weight", torch.eye(2))
        >>> {name: mask.tolist() for name, mask in masks_of(net).items()}
        {'0.weight': [[True, False], [False, True]]}
    """
    found = {}
    reshard(model)
    for name, key in keys_by_name(model).items():
        alive = alive_mask(*key)
        if alive is not None:
            found[name] = alive
    return found


def clone_pruned(model: _Model) -> _Model:
    """Copy a model deeply, pruned or not.

    ``copy.deepcopy`` of a model pruned by torch fails until its next forward without gradients, because the effective
    weight is no leaf of the autograd graph (pytorch#37322). This copies the parameters, masks and hooks and makes the
    effective weights of the copy anew, without gradients: until the next forward with gradients, ``copy.deepcopy`` of
    the copy works too, and so do averages that are made by it. The original is not touched.

    Args:
        model: Any module.

    Returns:
        An independent copy.

    Example:
        >>> layer = prune.random_unstructured(nn.Linear(3, 2), "weight", 0.5)
        >>> twin = clone_pruned(layer)
        >>> torch.equal(twin.weight, layer.weight), twin.weight_orig is layer.weight_orig
        (True, False)
    """
    memo: dict[int, Tensor] = {}
    for module, name in keys_by_name(model).values():
        effective = vars(module).get(name)
        if isinstance(effective, Tensor) and alive_mask(module, name) is not None:
            memo[id(effective)] = effective.detach()
    twin = copy.deepcopy(model, memo)
    with torch.no_grad():  # so that the copy can be copied in turn
        for key in keys_by_name(twin).values():
            if alive_mask(*key) is not None:
                _refresh(*key)
    return twin


def attach_masks(model: nn.Module, masks: Masks) -> None:
    """Give parameters these masks, in the form that ``torch.nn.utils.prune`` uses.

    Afterwards ``model.state_dict()`` has the keys ``weight_orig`` and ``weight_mask``, so a checkpoint of a pruned
    model loads strictly. A parameter that carries a mask already gets the new one in its place: same hook, same buffer,
    written in place; entries that the new mask keeps come back with the value they have in ``weight_orig``.

    In a sharded model (``fully_shard``, DTensor) the mask is kept as zeros of the weight, whose gradient is masked: the
    parameter keeps its name, and what the mask leaves out is lost.

    Args:
        model: The model; changed in place, after all checks.
        masks: A bool tensor of the weight's shape for each parameter, by pair or by qualified name.

    Raises:
        TypeError: If a mask is not a bool tensor.
        ValueError: If a name or pair is not in the model, a shape differs, or something is in the way of a mask (a tied
            or parametrized weight, one that a parent reads). Nothing is changed.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 1))
        >>> attach_masks(net, {"0.weight": torch.tensor([[True, False]])})
        >>> sorted(net.state_dict())
        ['0.bias', '0.weight_mask', '0.weight_orig']
    """
    checked = checked_masks(model, masks)
    check_takes_masks(unwrap(model), list(checked))
    if masks_in_weights(model):
        attach_in_weights(checked)
        return
    with all_or_nothing(checked):
        for (module, name), mask in checked.items():
            if alive_mask(module, name) is None:
                prune.custom_from_mask(module, name, mask.to(stored(module, name).device))
            else:
                buffer = module._buffers[f"{name}_mask"]
                assert buffer is not None
                buffer.copy_(mask)
                _refresh(module, name)


def apply_masks(model: nn.Module, masks: Masks | nn.Module) -> None:
    """Set to zero, once, what masks leave out: for a copy of the weights such as an EMA or SWA average.

    An average that is made of masks too (timm's ``ModelEmaV3``, ``AveragedModel(use_buffers=True)``) carries means of
    them, which would scale its weights: such a mean becomes a mask of 0 and 1 again, of what is alive in both.

    Args:
        model: The model whose weights are changed in place; it gets no hooks and no further masks. ``AveragedModel``
            and other wrappers are looked through.
        masks: The masks, or the pruned model that carries them.

    Raises:
        TypeError: As :func:`attach_masks`. Nothing is changed.
        ValueError: As :func:`attach_masks`, or if a mask of the pruned model scales weights, or one of ``model`` in
            whose place none is given. Nothing is changed.

    Example:
        >>> average = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> apply_masks(average, {"0.weight": torch.tensor([[True, False]])})
        >>> int((average[0].weight == 0).sum())
        1
    """
    if isinstance(masks, nn.Module):
        check_keeps_or_not(masks, keys_by_name(masks).values())
        masks = masks_of(masks)
    root = inside(model)
    checked, means = checked_masks(root, masks), _scaling(keys_by_name(root).values())
    _refuse_scaling(root, [key for key in means if key not in checked])
    for key, mask in checked.items():
        parameter = stored(*key)
        here = local(parameter)
        gone = ~part_here(mask, parameter).to(here.device)
        with torch.no_grad():
            here.masked_fill_(gone, 0)
            if key in means:
                buffer = local(means[key])
                buffer.copy_((buffer != 0) & ~gone)
        if is_masked(*key):
            _refresh(*key)


def fold(model: _Model) -> _Model:
    """Make every mask permanent: a plain model with zeros, as ``prune.remove`` on each pruned parameter.

    Args:
        model: The model; changed in place.

    Returns:
        The same model.

    Example:
        >>> net = prune.random_unstructured(nn.Linear(4, 1), "weight", 3)
        >>> sorted(fold(net).state_dict()), int((net.weight == 0).sum())
        (['bias', 'weight'], 3)
    """
    reshard(model)
    for key in keys_by_name(model).values():
        if alive_mask(*key) is not None:
            prune.remove(*key)
    return model


def checked_masks(model: nn.Module, masks: Masks) -> dict[ParameterKey, Tensor]:
    """Check masks against a model, and key them by ``(module, name)``.

    Raises:
        TypeError: If there is no mapping, or a mask is not a bool tensor.
        ValueError: If a name or pair is not in the model, or a shape differs.
    """
    reshard(model)
    check_kind("masks", masks, Mapping, "a mapping of names or (module, name) pairs to bool tensors")
    keys = keys_by_name(model)
    names = {key: name for name, key in keys.items()}
    checked = {}
    for given, mask in masks.items():
        key = keys.get(given) if isinstance(given, str) else given
        if key is None or key not in names:
            raise _unknown(given)
        _check_mask(mask, stored(*key), names[key])
        checked[key] = mask
    return checked


def check_keeps_or_not(model: nn.Module, parameters: Iterable[ParameterKey]) -> None:
    """Check that the masks which parameters carry keep a weight or not, before they are read as such.

    Raises:
        ValueError: If one scales weights.
    """
    _refuse_scaling(model, list(_scaling(parameters)))


def _scaling(parameters: Iterable[ParameterKey]) -> dict[ParameterKey, Tensor]:
    """Return the masks with other numbers than 0 and 1."""
    buffers = {key: key[0]._buffers[f"{key[1]}_mask"] for key in parameters if is_masked(*key)}
    masks = {key: mask for key, mask in buffers.items() if mask is not None and not mask.is_meta}
    counts = counts_true([(local(mask) != 0) & (local(mask) != 1) for mask in masks.values()])
    return {key: masks[key] for key, count in zip(masks, counts, strict=True) if count}


def _refuse_scaling(model: nn.Module, parameters: Sequence[ParameterKey]) -> None:
    if parameters:
        cure = (
            "torch.nn.utils.prune.remove makes it permanent, attach_masks puts another in its place (save_pruned keeps "
            "it as it is)"
        )
        obstacle = Obstacle("carry a mask of zeros and ones, if any", "a mask with other numbers", cure)
        raise refusal(dict.fromkeys(qualified_names(model, parameters), obstacle), pasteable=False)


def _unknown(given: object) -> Exception:
    """Make the error for what is no parameter of the model."""
    if isinstance(given, str):
        label, advice = given, "were the masks made for another model?"
    elif isinstance(given, tuple) and len(given) == 2:
        label = f"({type(given[0]).__name__}, {given[1]!r})"
        advice = "those of another model object fit by name: dict(zip(scores.names, masks.values()))"
    else:
        return TypeError(f"masks: every key must be a name or a (module, name) pair, found {wrong(given)}")
    return ValueError(f"masks: every name must be a parameter of the model, found {label} which is not; {advice}")


def inside(model: nn.Module) -> nn.Module:
    """Return the module inside all wrappers, averaging among them."""
    while True:
        inner = unwrap(model)
        if not isinstance(inner, AveragedModel):
            return inner
        model = inner.module


def _check_mask(mask: Tensor, parameter: Tensor, name: str) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(
            f"masks: the mask of {name} must be a bool tensor, found {getattr(mask, 'dtype', type(mask).__name__)}; "
            "use mask != 0"
        )
    if is_lazy(parameter):
        raise ValueError(
            f"masks: {name} must have a shape, found a lazy parameter; run one batch through the model first"
        )
    if mask.shape != parameter.shape:
        raise ValueError(
            f"masks: the mask of {name} must have the shape {tuple(parameter.shape)}, found {tuple(mask.shape)}; was "
            "it made for another model?"
        )


def _refresh(module: nn.Module, name: str) -> None:
    """Make the effective weight anew, as the next forward would."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name:
            hook(module, None)
