"""The mask of a sharded model: zeros in the weight itself, which its gradient leaves at zero.

``torch.nn.utils.prune`` computes ``mask * weight_orig`` before every forward. In a model sharded by ``fully_shard``
that is not to be had: its parameters cannot be renamed any more, and the product, kept whole for the backward, would
undo the sharding. The same network comes of a weight whose masked entries are 0 and get no gradient, wherever it is
read. The mask is a buffer that lies on each rank beside its share of the weight.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from ._support.shards import beside, is_sharded, local, part_here, spread_alike
from .parameters import ParameterKey, is_masked, is_masked_by_hook, is_masked_in_place, stored


class MaskInWeight(prune.BasePruningMethod):
    """Mask a tensor by zeros in the tensor itself; ``prune.is_pruned`` and ``prune.remove`` know it.

    The parameter keeps its name, and ``weight_mask`` (bool) is beside it in the state dict. There is no
    ``weight_orig``: what a mask removes is gone, and comes back as 0.

    An optimizer leaves a weight at 0 that has been masked, as long as its moments are 0 there: apply masks before the
    first step, or let a scheduler, which clears them. SGD and Adam and their like are meant, with weight decay or
    without.

    Example:
        >>> layer = nn.Linear(3, 1)
        >>> hook = MaskInWeight.apply(layer, "weight", torch.tensor([[True, False, True]]))
        >>> layer(torch.ones(3)).sum().backward()
        >>> layer.weight.grad, bool(layer.weight[0, 1] == 0), prune.is_pruned(layer)
        (tensor([[1., 0., 1.]]), True, True)
        >>> list(prune.remove(layer, "weight").state_dict())
        ['weight', 'bias']
    """

    PRUNING_TYPE = "unstructured"
    in_weight = True

    def __init__(self) -> None:
        """Start without a tensor."""
        self._handle: torch.utils.hooks.RemovableHandle | None = None
        self._loading: torch.utils.hooks.RemovableHandle | None = None
        self._watching = False  # beside the handle, which a compiled forward cannot look at

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:  # noqa: ARG002
        """Return the mask as it is; called by torch if another method is applied on top."""
        return default_mask

    def __call__(self, module: nn.Module, inputs: object) -> None:  # noqa: ARG002
        """Leave the forward as it is: the weight holds its zeros. See to its gradient, if the weight is another."""
        if not self._watching or not torch.compiler.is_compiling():
            self._watch(module)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the handle behind: copied and loaded Parameters have no hooks, the first forward gives them one."""
        return {**vars(self), "_handle": None, "_watching": False}

    @classmethod
    def apply(cls, module: nn.Module, name: str, mask: Tensor) -> Self:  # type: ignore[override]
        """Put the mask on a tensor.

        Args:
            module: The module.
            name: The tensor's name in it.
            mask: bool, whole or spread as the tensor is; True = keep.

        Returns:
            The hook that is now on the module.

        Raises:
            ValueError: If the tensor carries a mask already.
        """
        if is_masked(module, name):
            raise ValueError(
                f"parameters: {type(module).__name__}.{name} must carry no mask yet, found one; fold(model) makes it "
                "permanent"
            )
        hook, parameter = cls(), stored(module, name)
        hook._tensor_name = name
        everything = torch.ones_like(local(parameter), dtype=torch.bool)
        module.register_buffer(f"{name}_mask", beside(everything, parameter))
        module.register_forward_pre_hook(hook)
        hook._loading = module.register_load_state_dict_post_hook(hook._after_load)
        hook.rewrite(module, mask)
        return hook

    @classmethod
    def find(cls, module: nn.Module, name: str) -> Self:
        """Return the hook on a tensor.

        Raises:
            ValueError: If there is none.
        """
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, cls) and hook._tensor_name == name:
                return hook
        raise ValueError(
            f"parameters: {type(module).__name__}.{name} must carry its mask, found it gone (removed); make a new "
            "scheduler"
        )

    def rewrite(self, module: nn.Module, mask: Tensor) -> None:
        """Write a new mask in place. Entries that regrow start at 0.

        Args:
            module: The module that carries this hook.
            mask: bool, whole, or spread as the weight is, or what of it lies here; True = keep.
        """
        name: str = self._tensor_name
        parameter = stored(module, name)
        here = local(parameter)
        new = mask if not is_sharded(mask) and mask.shape == here.shape else part_here(mask, parameter)
        buffer = self._buffer(module)
        with torch.no_grad():
            here.masked_fill_(~(new.to(here.device) & buffer), 0)
            buffer.copy_(new)
        self._watch(module)

    def refresh(self, module: nn.Module) -> None:
        """Write the zeros once more, after another weight has been loaded."""
        with torch.no_grad():
            local(stored(module, self._tensor_name)).masked_fill_(~self._buffer(module), 0)

    def remove(self, module: nn.Module) -> None:
        """Make the pruning permanent, for ``prune.remove``: the zeros stay, and may be trained."""
        self.refresh(module)
        del module._buffers[f"{self._tensor_name}_mask"]
        for handle in (self._handle, self._loading):
            if handle is not None:
                handle.remove()

    def _after_load(self, module: nn.Module, _: object) -> None:
        self.refresh(module)

    def _buffer(self, module: nn.Module) -> Tensor:
        return local(self._mask(module))

    def _mask(self, module: nn.Module) -> Tensor:
        mask = module._buffers[f"{self._tensor_name}_mask"]
        assert mask is not None
        return mask

    def _watch(self, module: nn.Module) -> None:
        """See to it that the gradient of the present Parameter is masked: ``deepcopy`` and others put new ones there.

        ``fully_shard`` gathers a weight for the forward. The whole weight is let be: it is its share that is masked.
        """
        parameter = stored(module, self._tensor_name)
        trained = isinstance(parameter, nn.Parameter) and parameter.requires_grad
        if not trained or not spread_alike(parameter, self._mask(module)):
            return
        hooks = parameter._post_accumulate_grad_hooks
        if self._handle is not None and hooks is not None and self._handle.id in hooks:
            # model.double() swaps what is inside a DTensor, and the engine's part of a hook goes with that.
            parameter._post_accumulate_grad_hooks = hooks
            return
        if self._handle is not None:
            self._handle.remove()
        masked = functools.partial(self._mask_gradient, module)
        self._handle = parameter.register_post_accumulate_grad_hook(masked)
        self._watching = True

    def _mask_gradient(self, module: nn.Module, parameter: Tensor) -> None:
        if parameter.grad is not None:
            with torch.no_grad():
                local(parameter.grad).mul_(self._buffer(module))


def masks_in_weights(model: nn.Module) -> bool:
    """Tell whether a model is sharded, so that its masks are kept in the weights, or has such masks already.

    Example:
        >>> masks_in_weights(nn.Linear(2, 1))
        False
    """
    return any(is_sharded(parameter) for parameter in model.parameters()) or any(
        is_masked_in_place(module, name) for module in model.modules() for name in module._parameters
    )


def attach_in_weights(masks: Mapping[ParameterKey, Tensor]) -> None:
    """Give parameters of a sharded model these masks; one that is there already is written anew.

    Args:
        masks: bool, whole or spread as the weight is, by ``(module, name)``.

    Raises:
        ValueError: If a parameter carries a mask of ``torch.nn.utils.prune``. Nothing is changed.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> attach_in_weights({(layer, "weight"): torch.tensor([[True, False]])})
        >>> layer.weight_mask
        tensor([[ True, False]])
    """
    for module, name in masks:
        if is_masked_by_hook(module, name):
            raise ValueError(
                f"parameters: {type(module).__name__}.{name} must carry no mask of torch.nn.utils.prune in a sharded "
                "model, found one; fold(model) before fully_shard, and load_masks or attach_masks after it"
            )
    for (module, name), mask in masks.items():
        if is_masked_in_place(module, name):
            MaskInWeight.find(module, name).rewrite(module, mask)
        else:
            MaskInWeight.apply(module, name, mask)
