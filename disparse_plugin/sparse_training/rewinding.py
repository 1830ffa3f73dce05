"""Go back to earlier weights under later masks, for iterative magnitude pruning with rewinding."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._support.shards import local, reshard
from ..masks.in_place import DiSparseDynamic
from ..parameters import alive_mask, is_masked, keys_by_name, stored, unwrap
from .optimizer_state import forget, fresh_values


class RewindPoint:
    """Weights, buffers and optimizer state as they are now, to go back to after pruning.

    Iterative magnitude pruning with rewinding: take the point early in training; then again and again train to the
    end, mask a part of the weights, and :meth:`rewind`. What is masked stays masked. Learning rate schedulers are the
    caller's to rewind.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> before, point = layer.weight.detach().clone(), RewindPoint(layer, optimizer)
        >>> layer(torch.ones(1, 2)).sum().backward(); optimizer.step()
        >>> point.rewind()
        >>> torch.equal(layer.weight, before)
        True
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Remember.

        Args:
            model: The model, dense or pruned.
            optimizer: Its optimizer; of a kind in :mod:`disparse_plugin.sparse_training.optimizer_state`.

        Raises:
            TypeError: If the optimizer is not known.
        """
        fresh_values(optimizer)
        self._root = unwrap(model)
        reshard(self._root)
        self._optimizer = optimizer
        self._values = [(p, p.detach().clone()) for p in self._root.parameters()]
        # By name: a forward, or a move of the model, may put other tensors there.
        self._buffers = [
            (module, name, None if buffer is None else buffer.detach().clone())
            for module, name, buffer in _buffers_without_masks(self._root)
        ]
        self._state = copy.deepcopy(optimizer.state_dict())

    def rewind(self) -> None:
        """Go back; masked weights are 0, and so are their moments."""
        reshard(self._root)
        self._optimizer.load_state_dict(copy.deepcopy(self._state))
        with torch.no_grad():
            for parameter, value in self._values:
                parameter.copy_(value)
            for module, name, then in self._buffers:
                now = module._buffers[name]
                if now is None or then is None or now.shape != then.shape:
                    module._buffers[name] = None if then is None else then.clone()
                else:
                    now.copy_(then)
        _silence_masked(self._root, self._optimizer)


def _buffers_without_masks(root: nn.Module) -> list[tuple[nn.Module, str, Tensor | None]]:
    """List the buffers that training changes (BatchNorm statistics, ...), without the masks of pruning."""
    return [
        (module, name, buffer)
        for module in root.modules()
        for name, buffer in module._buffers.items()
        if not is_masked(module, name.removesuffix("_mask"))
    ]


def _silence_masked(root: nn.Module, optimizer: Optimizer) -> None:
    for key in keys_by_name(root).values():
        alive = alive_mask(*key)
        if alive is None:
            continue
        parameter = stored(*key)
        with torch.no_grad():
            local(parameter).masked_fill_(~local(alive), 0)
        if optimizer.state.get(parameter):
            forget(optimizer, parameter, ~local(alive))
    for module in root.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, DiSparseDynamic):
                hook.refresh(module)
