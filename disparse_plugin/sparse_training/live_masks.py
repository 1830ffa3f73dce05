"""The masks of a model in training: read, rewritten in place together with weights and optimizer state, stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils import prune
from torch.optim import Optimizer

from .._support.distributed import check_same_copies, check_same_tensors, failing_together, this_rank, total_counts
from .._support.files import packed_bits, unpacked_bits
from .._support.shards import beside, block, is_sharded, local, owns, part_here, reshard
from ..agreement.patterns import WEIGHTS, Pattern
from ..agreement.tallies import counts_true
from ..in_weight import MaskInWeight, attach_in_weights, masks_in_weights
from ..maskable import Obstacle, read_by_parent, warn_of_kept_aside
from ..masks.attach import check_keeps_or_not
from ..masks.in_place import DiSparseDynamic, attach_rewritable
from ..parameters import ParameterKey, is_masked, is_masked_in_place, qualified_names, stored
from .optimizer_state import check_optimizer, forget, remembered, remind


class LiveMasks:
    """One mask per listed parameter, each changed in place.

    Attributes:
        keys: The ``(module, name)`` pairs.
        names: Their qualified names.
        kept: How many entries of each were alive after the last change.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        masks: Mapping[ParameterKey, Tensor],
        *,
        revocable: bool = False,
    ) -> None:
        """Check everything, then mask the parameters.

        Args:
            model: The model, unwrapped.
            optimizer: What trains it.
            masks: The first masks, bool; of a sharded parameter what of it lies on this rank.
            revocable: Whether :meth:`let_go` may be called before the first change: until then the weights are kept as
                they were found, and what the optimizer remembers of them.

        Raises:
            TypeError: If the optimizer is not known; see
                :func:`.check_optimizer`.
            ValueError: If the optimizer does not train a parameter, or the masks differ between ranks.
        """
        self.keys: Sequence[ParameterKey] = tuple(masks)
        self._root, self._optimizer = model, optimizer
        with failing_together():
            self.names = qualified_names(model, self.keys)
            check_keeps_or_not(model, self.keys)
            check_optimizer(optimizer, dict(zip(self.names, self.parameters(), strict=True)))
        self.check_alike(list(masks.values()), "give all ranks the same seed and the same model")
        self._found = [self._as_found(parameter) for parameter in self.parameters()] if revocable else None
        self._had = frozenset(name for name, key in zip(self.names, self.keys, strict=True) if is_masked(*key))
        self._in_weights = masks_in_weights(model)
        if self._in_weights:
            attach_in_weights(masks)
        else:
            warn_of_kept_aside(model, self.keys)
            attach_rewritable(masks)
        self.rewrite(list(masks.values()))
        self.kept = counts_true(self._read())
        # Leaves that are read until the modules run, so that only what a parent reads directly gets a gradient. A mask
        # in the weight itself counts wherever that is read.
        self._copies: list[Tensor] = [] if self._in_weights else self._effective()

    @property
    def sharded(self) -> bool:
        """Whether masks, and what is asked of them, are what of them lies on this rank."""
        return any(is_sharded(parameter) for parameter in self.parameters())

    def check_alike(self, masks: Sequence[Tensor], advice: str) -> None:
        """Check that ranks which hold the same parameters, or parts of them, have the same masks.

        Raises:
            ValueError: On all ranks, if they have not.
        """
        if not self.sharded:
            check_same_tensors("masks", masks, advice)
            return
        layers = zip(self.names, self.parameters(), masks, strict=True)
        check_same_copies("masks", {(name, *block(parameter)): mask for name, parameter, mask in layers}, advice)

    def counts(self, masks: Sequence[Tensor]) -> list[int]:
        """Count the True entries of masks of all parameters, on all ranks together where these are sharded."""
        return counts_of(self.parameters(), masks)

    def parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters behind the masks, not what ``fully_shard`` has gathered in their place."""
        reshard(self._root)
        return [stored(*key) for key in self.keys]

    def current(self) -> list[Tensor]:
        """Return the masks, bool; copies.

        Raises:
            ValueError: If a parameter lost its hook, or its mask was changed by something else; or as
                :func:`.check_optimizer`.
        """
        self._hooks()
        check_optimizer(self._optimizer, dict(zip(self.names, self.parameters(), strict=True)))
        masks = self._read()
        if counts_true(masks) != self.kept:
            raise ValueError(
                "masks: must be changed by their scheduler only, found another number of alive entries than after its "
                "last change; load the scheduler's state together with the model's"
            )
        return masks

    def misread(self) -> dict[str, Obstacle]:
        """Return, after the first backward, the weights that a parent read without the mask that counts."""
        if not self._copies:
            return {}
        return {
            name: read_by_parent(module, ran=module.__dict__.get(own) is not copy)
            for (module, own), name, copy in zip(self.keys, self.names, self._copies, strict=True)
            if copy.grad is not None
        }

    def came_masked(self, names: Iterable[str]) -> bool:
        """Tell whether any of the named weights was masked before: then :meth:`let_go` does not free it."""
        return not self._had.isdisjoint(names)

    def settle(self) -> None:
        """Drop what was kept for :meth:`misread` and :meth:`let_go`."""
        self._copies, self._found = [], None

    def let_go(self) -> None:
        """Take the masks off again; what was not masked is as dense as it was, with its moments; the rest stays.

        Only before the first change, and only if made ``revocable``.
        """
        assert self._found is not None
        for key, name, mask, (dense, states) in zip(self.keys, self.names, self._read(), self._found, strict=True):
            if name not in self._had:
                prune.remove(*key)
                parameter = stored(*key)
                with torch.no_grad():
                    local(parameter).copy_(torch.where(mask, local(parameter), dense))
                remind(self._optimizer, parameter, states, ~mask)
        self.settle()

    def _as_found(self, parameter: nn.Parameter) -> tuple[Tensor, dict[str, Tensor]]:
        """Copy a weight, and what the optimizer remembers of its entries."""
        return local(parameter.detach()).clone(), remembered(self._optimizer, parameter)

    def rewrite(self, masks: Sequence[Tensor]) -> None:
        """Write new masks in place.

        What was masked before or is masked now becomes 0, in the weights and in the optimizer's moments: so weights
        that regrow start afresh, and masked ones have nothing that could make them drift.

        Args:
            masks: bool, one per parameter.
        """
        for hook, key, old, new in zip(self._hooks(), self.keys, self._read(), masks, strict=True):
            forget(self._optimizer, stored(*key), ~(old & new))
            hook.rewrite(key[0], new)
        self.kept = counts_true(masks)

    def hold(self) -> None:
        """Write the zeros of masks that are kept in weights again, after a step of the optimizer.

        A gradient that no backward has put there (one that is combined of the tasks' own ones) has not been masked.
        """
        if not self._in_weights:
            return
        reshard(self._root)
        for module, name in self.keys:
            if is_masked_in_place(module, name):  # not folded meanwhile
                MaskInWeight.find(module, name).refresh(module)

    def restore(self, masks: Sequence[Tensor]) -> None:
        """Write masks of an earlier run in place; weights and moments that are alive in them are not touched.

        Args:
            masks: bool, one per parameter.
        """
        with torch.no_grad():
            for key, mask in zip(self.keys, masks, strict=True):
                local(self._buffer(key)).copy_(mask)
        self.rewrite(masks)
        if self._copies:  # that has put others in their place, which the first step will read
            self._copies = self._effective()

    def packed(self) -> dict[str, Tensor]:
        """Return the masks by qualified name: as bits, uint8, on the CPU; sharded ones as they are, for other ranks."""
        return {
            name: beside(mask, parameter) if is_sharded(parameter) else packed_bits(mask)
            for name, mask, parameter in zip(self.names, self._read(), self.parameters(), strict=True)
        }

    def unpacked(self, packed: Mapping[str, Tensor]) -> list[Tensor]:
        """Turn what :meth:`packed` returned into bool masks of the parameters' shapes, which :meth:`restore` will take.

        Raises:
            ValueError: If the names or sizes do not fit, or a parameter lost its hook.
        """
        self._hooks()
        if tuple(packed) != self.names:
            raise ValueError(
                f"state_dict: must have masks for {', '.join(self.names)}, found {', '.join(packed)}; build the "
                "scheduler for the same model with the same options first"
            )
        masks = []
        for name, parameter in zip(self.names, self.parameters(), strict=True):
            if is_sharded(packed[name]):
                masks.append(local(packed[name]).clone())
                continue
            if packed[name].numel() != -(-parameter.numel() // 8):
                raise ValueError(
                    f"state_dict: the mask of {name} must be for shape {tuple(parameter.shape)}, found "
                    f"{packed[name].numel()} bytes"
                )
            masks.append(part_here(unpacked_bits(packed[name], parameter.shape), parameter).to(parameter.device))
        return masks

    def _hooks(self) -> list[DiSparseDynamic | MaskInWeight]:
        if self._in_weights:
            return [MaskInWeight.find(*key) for key in self.keys]
        return [DiSparseDynamic.find(*key) for key in self.keys]

    def _effective(self) -> list[Tensor]:
        return [module.__dict__[name] for module, name in self.keys]

    def _read(self) -> list[Tensor]:
        return [local(self._buffer(key)) != 0 for key in self.keys]

    @staticmethod
    def _buffer(key: ParameterKey) -> Tensor:
        module, name = key
        mask = module._buffers.get(f"{name}_mask")
        if mask is None:
            raise ValueError(
                f"masks: {type(module).__name__}.{name} must carry its mask, found it gone (folded or removed); write "
                "the scheduler's state before fold(model)"
            )
        return mask


def counts_of(parameters: Sequence[Tensor], masks: Sequence[Tensor]) -> list[int]:
    """Count the True entries of masks, on all ranks together where the parameters are sharded.

    Args:
        parameters: The parameters, whole or spread.
        masks: bool, for each what of its mask lies here.

    Example:
        >>> counts_of([torch.ones(2)], [torch.tensor([True, False])])
        [1]
    """
    own = counts_true(masks)
    if not any(is_sharded(parameter) for parameter in parameters):
        return own
    return total_counts(
        [count * owns(parameter, this_rank()) for count, parameter in zip(own, parameters, strict=True)]
    )


def check_goes_with_shards(keys: Sequence[ParameterKey], pattern: Pattern, grad_scaler: GradScaler | None) -> None:
    """Refuse what works on whole weights only, before anything is changed.

    Args:
        keys: The ``(module, name)`` pairs.
        pattern: The shape of what is removed.
        grad_scaler: What scales the losses.

    Raises:
        ValueError: If one of the parameters is sharded, and there is a scaler or a pattern of more than one weight.
    """
    if not any(is_sharded(stored(*key)) for key in keys):
        return
    if pattern is not WEIGHTS:
        raise ValueError(f"pattern: must be 'weights' where weights are sharded, found {pattern.name!r}")
    if grad_scaler is not None and grad_scaler.is_enabled():
        raise ValueError(
            "grad_scaler: must be None or disabled where weights are sharded, found one; train in bfloat16, which "
            "needs none"
        )
