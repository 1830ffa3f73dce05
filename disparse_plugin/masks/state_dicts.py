"""Let a model follow the masks of the state dicts that it loads, whoever calls ``load_state_dict``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import prune

from ..maskable import check_parameters
from ..parameters import is_masked, is_masked_by_hook, stored
from .in_place import DiSparseDynamic


def match_masks(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Give a model exactly the masks that a state dict has, so that it can be loaded strictly afterwards.

    Parameters that are pruned in the state dict get a mask, parameters that are dense in it lose theirs. A mask is what
    ``torch.nn.utils.prune`` leaves, ``weight_orig`` with ``weight_mask``; another buffer whose name ends in ``_mask``
    is none. Parameters keep their identity, and those of a masked module take the order of the state dict, so that an
    optimizer state, which is saved by position, loads onto the tensors it belongs to. A file of safetensors has lost
    that order; then the model keeps its own.

    In a ``LightningModule`` this makes ``load_from_checkpoint`` work, which knows no callbacks::

        def on_load_checkpoint(self, checkpoint):
            match_masks(self, checkpoint["state_dict"])

    Args:
        model: The model, as the state dict names it; changed in place, after all checks.
        state_dict: The state dict; not loaded.

    Raises:
        ValueError: If a mask has another shape than the weight, or the weight cannot be masked. Nothing is changed.

    Example:
        >>> saved = prune.random_unstructured(nn.Linear(3, 1), "weight", 2).state_dict()
        >>> layer = nn.Linear(3, 1)
        >>> match_masks(layer, saved)
        >>> layer.load_state_dict(saved), int(layer.weight_mask.sum())
        (<All keys matched successfully>, 1)
    """
    attach, detach = [], []
    for prefix, module, name in _named_parameters(model):
        mask = state_dict.get(f"{prefix}{name}_mask")
        if mask is not None and f"{prefix}{name}_orig" in state_dict:
            if not is_masked(module, name):
                _check_fits(prefix, module, name, mask)
                attach.append((module, name, mask))
        elif is_masked_by_hook(module, name) and f"{prefix}{name}" in state_dict:
            detach.append((module, name))
    for module, name, mask in attach:
        DiSparseDynamic.apply(module, name, (mask != 0).to(stored(module, name).device))
    for key in detach:
        prune.remove(*key)
    if _as_modules_write(model, state_dict):
        _order_as(model, state_dict, {module for module, *_ in detach})


def follow_masks(model: nn.Module) -> list[Any]:
    """Call :func:`match_masks` before every ``model.load_state_dict``, until the returned handles are removed.

    Returns:
        Handles, each with ``remove()``.

    Example:
        >>> layer, handles = nn.Linear(3, 1), []
        >>> handles = follow_masks(layer)
        >>> layer.load_state_dict(prune.random_unstructured(nn.Linear(3, 1), "weight", 2).state_dict())
        <All keys matched successfully>
        >>> for handle in handles:
        ...     handle.remove()
    """
    return [
        model.register_load_state_dict_pre_hook(_before_load),
        model.register_load_state_dict_post_hook(_after_load),
    ]


def _named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    for path, module in model.named_modules():
        for own, parameter in list(module._parameters.items()):
            base = own.removesuffix("_orig")
            if parameter is not None:
                yield f"{path}." if path else "", module, base if is_masked(module, base) else own


def _check_fits(prefix: str, module: nn.Module, name: str, mask: Tensor) -> None:
    check_parameters(module, [(module, name)])
    if mask.shape != stored(module, name).shape:
        raise ValueError(
            f"state_dict: the mask of {prefix}{name} must have the shape {tuple(stored(module, name).shape)}, found "
            f"{tuple(mask.shape)}; was it saved from another model?"
        )


def _as_modules_write(model: nn.Module, state_dict: Mapping[str, Any]) -> bool:
    """Tell whether entries stand module by module, parameters before buffers; in files of safetensors they do not."""
    ranks: dict[str, tuple[int, bool]] = {}
    for index, (path, module) in enumerate(model.named_modules()):
        for own in (*module._parameters, *module._buffers):
            ranks[f"{path}.{own}" if path else own] = (index, own in module._buffers)
    found = [ranks[name] for name in state_dict if name in ranks]
    return found == sorted(found)


def _order_as(model: nn.Module, state_dict: Mapping[str, Any], changed: set[nn.Module]) -> None:
    places = {name: place for place, name in enumerate(state_dict)}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if module in changed or any(is_masked(module, own.removesuffix("_orig")) for own in module._parameters):
            at = {own: places.get(f"{prefix}{own}", len(places)) for own in module._parameters}
            entries = sorted(module._parameters.items(), key=lambda entry, at=at: at[entry[0]])  # type: ignore[misc]
            module._parameters.clear()
            module._parameters.update(entries)


def _before_load(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    own = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    match_masks(module, own)


def _after_load(module: nn.Module, _: Any) -> None:
    """Bring the effective weights up to date, which the next forward would do."""
    for inner in module.modules():
        for hook in inner._forward_pre_hooks.values():
            if isinstance(hook, DiSparseDynamic):
                hook.refresh(inner)
