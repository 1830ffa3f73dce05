"""The pruning method whose mask can change in place: one hook and one buffer per tensor, for good."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from .._support.all_or_nothing import all_or_nothing
from ..kinds import check_kind
from ..maskable import check_takes_masks, check_tensor
from ..parameters import ParameterKey, is_masked, stored
from .attach import Masks, check_keeps_or_not, checked_masks


class DiSparseDynamic(prune.BasePruningMethod):
    """Mask a tensor such that the mask can be rewritten later, to drop and to regrow entries.

    The methods of ``torch.nn.utils.prune`` append one more hook and one more mask at every call and can only remove.
    This one is applied once; :meth:`rewrite` then writes into the same buffer, so the Parameter, the optimizer, a
    ``DistributedDataParallel`` wrapper and a compiled graph stay valid. ``prune.is_pruned``, ``prune.remove``,
    ``weight_orig``, ``weight_mask`` and ``state_dict`` are as for every pruned module, and unlike there the parameters
    keep their order, so that optimizer state saved by position still fits.

    Example:
        >>> layer = nn.Linear(3, 1)
        >>> hook = DiSparseDynamic.apply(layer, "weight", torch.tensor([[True, False, True]]))
        >>> hook.rewrite(layer, torch.tensor([[True, True, False]]))
        >>> layer.weight_mask, bool(layer.weight[0, 1] == 0)
        (tensor([[1., 1., 0.]]), True)
        >>> prune.is_pruned(layer), prune.remove(layer, "weight") is layer
        (True, True)
    """

    PRUNING_TYPE = "unstructured"

    def __init__(self, mask: Tensor) -> None:
        """Take the first mask.

        Args:
            mask: True (or 1) = keep; of the tensor's shape.
        """
        check_kind("mask", mask, Tensor, "a tensor")
        self._first: Tensor | None = mask

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:  # noqa: ARG002
        """Return the first mask where nothing was pruned before; called by torch when methods are chained."""
        if self._first is None:
            return default_mask
        return default_mask * self._first.to(default_mask)

    @classmethod
    def apply(cls, module: nn.Module, name: str, mask: Tensor) -> Self:  # type: ignore[override]
        """Put the hook on a tensor. Masks that torch's methods left on it are taken over: kept, with one hook.

        Args:
            module: The module.
            name: The tensor's name in it, e.g. ``"weight"``.
            mask: Which entries to keep, bool or 0/1, of the tensor's shape.

        Returns:
            The hook that is now on the module.

        Raises:
            TypeError: If ``mask`` is not a tensor.
            ValueError: If its shape differs or it holds other values than 0 and 1, or the tensor cannot be pruned. The
                module is as before.
        """
        check_tensor(module, name)
        _check_mask(mask, stored(module, name).shape)
        hook = cls(mask)
        hook._tensor_name = name
        if is_masked(module, name):
            buffer = _mask_of(module, name)
            first = hook.compute_mask(buffer, buffer.clone())
            _unhook(module, name)
            buffer.copy_(first)
        else:
            original = stored(module, name)
            ones = torch.ones_like(original.detach(), memory_format=torch.contiguous_format)
            first = hook.compute_mask(original, ones)
            _rename(module, name, f"{name}_orig")
            module.register_buffer(f"{name}_mask", first)
        hook._first = None  # one mask is enough: the buffer
        module.register_forward_pre_hook(hook)
        hook.refresh(module)
        return hook

    @classmethod
    def find(cls, module: nn.Module, name: str) -> Self:
        """Return the hook on a tensor.

        Raises:
            ValueError: If there is none, or another pruning method was applied on top of it.
        """
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, cls) and hook._tensor_name == name and is_masked(module, name):
                return hook
        raise ValueError(
            f"parameters: {type(module).__name__}.{name} must carry its DiSparseDynamic hook, found it gone (removed, "
            "or another pruning method was applied on top); make a new scheduler"
        )

    def rewrite(self, module: nn.Module, mask: Tensor) -> None:
        """Write a new mask in place. Entries that regrow start at 0; masked entries of ``weight_orig`` are 0 too.

        Args:
            module: The module that carries this hook.
            mask: bool, of the tensor's shape, on its device; True = keep.
        """
        name: str = self._tensor_name
        original, buffer = module._parameters[f"{name}_orig"], _mask_of(module, name)
        assert original is not None
        with torch.no_grad():
            original.masked_fill_(~(mask & (buffer != 0)), 0)
            buffer.copy_(mask)
        self.refresh(module)

    def refresh(self, module: nn.Module) -> None:
        """Bring the effective ``module.weight`` up to date for readers before the next forward.

        It is a leaf, so that ``copy.deepcopy`` (an EMA) works until the next forward, and it asks for a gradient, which
        it only ever gets from a parent that reads it without running the module; see :meth:`is_bypassed`.
        """
        name: str = self._tensor_name
        original, held = module._parameters[f"{name}_orig"], module.__dict__.get(name)
        assert original is not None
        with torch.no_grad():
            effective: Tensor = self.apply_mask(module)  # type: ignore[no-untyped-call]
            if isinstance(held, Tensor) and _can_take(held, effective):
                effective = held.copy_(effective)  # whoever waits for a gradient of the leaf still finds it
            setattr(module, name, effective.requires_grad_(original.requires_grad))

    def is_bypassed(self, module: nn.Module) -> bool:
        """Tell, after a backward, whether a parent reads ``module.weight`` directly: a gradient went to the copy."""
        effective = module.__dict__.get(self._tensor_name)
        return isinstance(effective, Tensor) and effective.is_leaf and effective.grad is not None

    def remove(self, module: nn.Module) -> None:
        """Make the pruning permanent, for ``prune.remove``; the parameter goes back to its place in the order."""
        name: str = self._tensor_name
        original, buffer = module._parameters[f"{name}_orig"], module._buffers.pop(f"{name}_mask")
        assert original is not None
        assert buffer is not None
        original.data = original.data * buffer.to(original.dtype)
        module.__dict__.pop(name, None)
        # Set once more as a user would: recurrent layers note then what they compute with.
        setattr(module, name, _rename(module, f"{name}_orig", name))


def attach_in_place(model: nn.Module, masks: Masks) -> None:
    """Mask parameters such that the masks can be rewritten later and the parameters keep their order.

    As :func:`~disparse_plugin.masks.attach_masks`, but with the hook of :class:`DiSparseDynamic`.

    Args:
        model: The model; changed in place, after all checks.
        masks: bool, by pair or by qualified name. On a parameter that carries a mask, both masks apply.

    Raises:
        TypeError: As :func:`~disparse_plugin.masks.attach_masks`. Nothing is changed.
        ValueError: As :func:`~disparse_plugin.masks.attach_masks`. Nothing is changed.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> attach_in_place(layer, {"weight": torch.tensor([[True, False]])})
        >>> [name for name, _ in layer.named_parameters()]
        ['weight_orig', 'bias']
    """
    checked = checked_masks(model, masks)
    check_takes_masks(model, list(checked))
    check_keeps_or_not(model, list(checked))
    attach_rewritable({key: mask.to(stored(*key).device) for key, mask in checked.items()})


def _mask_of(module: nn.Module, name: str) -> Tensor:
    mask = module._buffers[f"{name}_mask"]
    assert mask is not None
    return mask


def attach_rewritable(masks: Mapping[ParameterKey, Tensor]) -> None:
    """Put the hook of :class:`DiSparseDynamic` on every parameter, or, if that fails, on none.

    Args:
        masks: bool, for each parameter, on its device.
    """
    with all_or_nothing(masks):
        for (module, name), mask in masks.items():
            DiSparseDynamic.apply(module, name, mask)


def _can_take(held: Tensor, values: Tensor) -> bool:
    """Tell whether a tensor may be written to, no matter who has seen it, and stays what it is."""
    alike = (held.shape, held.dtype, held.device) == (values.shape, values.dtype, values.device)
    return alike and held.is_leaf and not held.is_inference()


def _check_mask(mask: Tensor, shape: torch.Size) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: must be a tensor, found {type(mask).__name__}; True (or 1) keeps an entry")
    if mask.shape != shape:
        raise ValueError(f"mask: must have the tensor's shape {tuple(shape)}, found {tuple(mask.shape)}")
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("mask: must hold 0 and 1 only, found other values; pass scores to a one-shot method instead")


def _rename(module: nn.Module, old: str, new: str) -> nn.Parameter:
    """Rename a parameter without changing the order of the module's parameters."""
    entries = list(module._parameters.items())
    module._parameters.clear()
    module._parameters.update({new if key == old else key: value for key, value in entries})
    parameter = module._parameters[new]
    assert parameter is not None
    return parameter


def _unhook(module: nn.Module, name: str) -> None:
    """Take off the pruning hook of a tensor and leave its mask and its original values where they are."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name:
            del module._forward_pre_hooks[key]
