"""Go back to earlier weights under later masks, for iterative magnitude pruning with rewinding."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._support.shards import local, reshard, spread_alike
from ..masks.in_place import DiSparseDynamic
from ..parameters import ParameterKey, alive_mask, is_masked, keys_by_name, qualified_names, stored, unwrap
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
        self._optimizer = optimizer
        reshard(self._root)
        # By name: a forward, a move of the model or the loading of a state may put other tensors there.
        copies = {parameter: parameter.detach().clone() for parameter in self._root.parameters()}
        self._values = {name: copies[stored(*key)] for name, key in keys_by_name(self._root).items()}
        self._buffers = {
            name: None if (buffer := module._buffers[own]) is None else buffer.detach().clone()
            for name, (module, own) in _buffers_without_masks(self._root).items()
        }
        self._trained = _trained(self._root, optimizer)
        self._state = copy.deepcopy(optimizer.state_dict())

    def rewind(self) -> None:
        """Go back; masked weights are 0, and so are their moments.

        Raises:
            ValueError: If parameters or buffers are gone or have another shape, or the optimizer trains others than
                when the point was taken. Nothing is changed.
        """
        reshard(self._root)
        keys, buffers = keys_by_name(self._root), _buffers_without_masks(self._root)
        self._check(keys, buffers)
        self._optimizer.load_state_dict(copy.deepcopy(self._state))
        with torch.no_grad():
            for name, value in self._values.items():
                stored(*keys[name]).copy_(value)
            for name, then in self._buffers.items():
                module, own = buffers[name]
                now = module._buffers[own]
                if now is None or then is None or now.shape != then.shape:
                    module._buffers[own] = None if then is None else then.clone()
                else:
                    now.copy_(then)
        _silence_masked(self._root, self._optimizer)

    def _check(self, keys: Mapping[str, ParameterKey], buffers: Mapping[str, ParameterKey]) -> None:
        """Check that what was remembered has a place."""
        lost = [name for name in (*self._values, *self._buffers) if name not in keys and name not in buffers]
        other = [name for name, value in self._values.items() if name in keys and not _fits(stored(*keys[name]), value)]
        if lost or other:
            raise ValueError(
                "model: must have the tensors that it had when the RewindPoint was taken, found "
                f"{len(lost) + len(other)} gone or of another shape (first: {[*lost, *other][0]}); take the point of "
                "the model as it is trained"
            )
        if _trained(self._root, self._optimizer) != self._trained:
            raise ValueError(
                "optimizer: must train the same parameters, in the same order, as when the RewindPoint was taken, "
                "found others; load_state_dict without assign=True leaves Parameters in place, and with a new "
                "optimizer take a new point"
            )


def _fits(parameter: Tensor, value: Tensor) -> bool:
    return parameter.shape == value.shape and spread_alike(parameter, value)


def _trained(root: nn.Module, optimizer: Optimizer) -> list[list[str | None]]:
    """Name what an optimizer trains, group by group; None for what is not of the model."""
    names = {stored(*key): name for name, key in keys_by_name(root).items()}
    return [[names.get(parameter) for parameter in group["params"]] for group in optimizer.param_groups]


def _buffers_without_masks(root: nn.Module) -> dict[str, ParameterKey]:
    """Find the buffers that training changes (BatchNorm statistics, ...), without the masks of pruning, by name."""
    keys = [
        (module, name)
        for module in root.modules()
        for name in module._buffers
        if not is_masked(module, name.removesuffix("_mask"))
    ]
    return dict(zip(qualified_names(root, keys), keys, strict=True))


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
