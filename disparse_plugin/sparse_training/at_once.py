"""Drop and grow in many layers at once, for accelerators: there, starting operations layer after layer takes the time.

The layers are laid end to end, and one sort puts the entries of all of them in order: by layer, then by value. What
:mod:`.exchange` says of one layer is then said of all with the same few operations, and nothing but the number of
entries that are alive, or wanted by some task, is read back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..agreement.ranking import absolute
from ..sorting import ordered, positions

# Entries of layers that are taken together; a few times as many numbers of 64 bits are held meanwhile.
TOGETHER = 2**24
_LAYER = 32  # the bits of a value, under those of its layer


@dataclasses.dataclass(frozen=True)
class Layer:
    """What of one layer is exchanged.

    Attributes:
        weight: The weight; masked entries may hold anything.
        alive: bool, of that shape.
        scores: Those of each task that reaches it, of that shape.
        kept: How many entries are alive.
        count: How many are exchanged: at least one, at most as many as are masked.
    """

    weight: Tensor
    alive: Tensor
    scores: Mapping[str, Tensor]
    kept: int
    count: int

    @property
    def fits(self) -> bool:
        """Whether it lies on an accelerator, with values that leave room for the number of its layer."""
        values = (self.weight, *self.scores.values())
        return self.alive.device.type != "cpu" and all(value.dtype != torch.float64 for value in values)


def new_masks_at_once(layers: Sequence[Layer], *, regrow_dropped: bool) -> list[Tensor]:
    """Choose the new masks of some layers, with the arbiter ``unanimous``.

    Args:
        layers: The layers; all of them must fit.
        regrow_dropped: Whether a weight may be grown in the update that drops it.

    Returns:
        As :meth:`.exchange.Exchange.new_masks`.

    Example:
        >>> weight, alive = torch.tensor([1.0, 3.0, 0.0, 0.0]), torch.tensor([True, True, False, False])
        >>> layer = Layer(weight, alive, {"a": torch.arange(4.0)}, kept=2, count=1)
        >>> [mask.tolist() for mask in new_masks_at_once([layer], regrow_dropped=False)]
        [[False, True, False, True]]
    """
    found: list[Tensor] = []
    for group in _alike(layers):
        found.extend(_new_masks(group, regrow_dropped=regrow_dropped))
    return found


def _alike(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    """Part the layers into some that follow each other, on one device, reached by the same tasks."""
    group: list[Layer] = []
    for layer in layers:
        entries = sum(each.alive.numel() for each in (*group, layer))
        if group and (_kind(layer) != _kind(group[0]) or entries > TOGETHER):
            yield group
            group = []
        group.append(layer)
    if group:
        yield group


def _kind(layer: Layer) -> tuple[torch.device, tuple[str, ...]]:
    return layer.alive.device, tuple(layer.scores)


def _new_masks(group: Sequence[Layer], *, regrow_dropped: bool) -> list[Tensor]:
    sizes = [layer.alive.numel() for layer in group]
    alive = _joined([layer.alive for layer in group])
    numbers = torch.tensor([[each.kept, each.count] for each in group], device=alive.device)
    count = numbers[:, 1]
    owner = _owners(sizes, alive.device)
    dropped = _smallest([layer.weight for layer in group], alive, owner, count)
    candidates = ~alive | dropped if regrow_dropped else ~alive
    # In each layer what may not grow comes first.
    barred = numbers[:, 0] - count if regrow_dropped else numbers[:, 0]
    best, asked = torch.zeros_like(owner), torch.zeros_like(count, dtype=torch.bool)
    for task in group[0].scores:
        values = _joined([layer.scores[task] for layer in group]).float().masked_fill(~candidates, -torch.inf)
        ranked = _Ranked.of(ordered(values), owner, len(group))
        asks = ranked.holds_more_than_zeros(barred)
        above = (count[ranked.owner] - ranked.followers).clamp_min_(0).mul_(asks[ranked.owner])
        best = torch.maximum(best, torch.empty_like(best).scatter_(0, ranked.order, above))
        asked |= asks
    wanted = positions(best != 0)
    ranked = _Ranked.of(best[wanted], owner[wanted], len(group))
    grown = torch.zeros_like(alive)
    grown[wanted[ranked.order]] = ranked.followers < count[ranked.owner]
    masks = torch.where(asked[owner], (alive & ~dropped) | grown, alive).split(sizes)
    return [mask.view(layer.alive.shape) for mask, layer in zip(masks, group, strict=True)]


def _smallest(weights: Sequence[Tensor], alive: Tensor, owner: Tensor, count: Tensor) -> Tensor:
    """Mark the alive weights of the smallest magnitude of each layer; of equal ones the first."""
    where = positions(alive)
    magnitudes = absolute(_joined([weight.detach() for weight in weights])[where])
    ranked = _Ranked.of(ordered(magnitudes), owner[where], len(weights))
    marked = torch.zeros_like(alive)
    marked[where[ranked.order]] = ranked.place < count[ranked.owner]
    return marked


@dataclasses.dataclass(frozen=True)
class _Ranked:
    """Entries of several layers in order: by layer, then from the lowest value to the highest; equal ones as they come.

    Attributes:
        keys: The layer above the value, int64, ascending.
        order: Which entry each is.
        owner: The number of its layer.
        first: Where each layer begins, and at last the number of entries.
    """

    keys: Tensor
    order: Tensor
    owner: Tensor
    first: Tensor

    @classmethod
    def of(cls, values: Tensor, owner: Tensor, layers: int) -> _Ranked:
        """Sort whole numbers of at most 32 bits, the sign among them."""
        keys, order = (values + (owner << _LAYER)).sort(stable=True)
        lowest = (torch.arange(layers + 1, device=keys.device) << _LAYER) - 2 ** (_LAYER - 1)
        first = torch.searchsorted(keys, lowest)
        return cls(keys, order, (keys + 2 ** (_LAYER - 1)) >> _LAYER, first)

    @property
    def place(self) -> Tensor:
        """How many of its layer come before each."""
        return torch.arange(self.keys.numel(), device=self.keys.device) - self.first[self.owner]

    @property
    def followers(self) -> Tensor:
        """How many of its layer come after each."""
        return self.first[self.owner + 1] - 1 - torch.arange(self.keys.numel(), device=self.keys.device)

    def holds_more_than_zeros(self, barred: Tensor) -> Tensor:
        """Tell of each layer whether another value than zero comes after its first ``barred`` ones."""
        zero = torch.arange(barred.numel(), device=barred.device) << _LAYER
        return (self.keys[self.first[:-1] + barred] != zero) | (self.keys[self.first[1:] - 1] != zero)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def _owners(sizes: Sequence[int], device: torch.device) -> Tensor:
    """Number the layers, once for each of their entries; int64."""
    begins = torch.tensor(sizes[:-1], dtype=torch.int64, device=device).cumsum(0)
    return torch.zeros(sum(sizes), dtype=torch.int64, device=device).index_fill_(0, begins, 1).cumsum(0)
