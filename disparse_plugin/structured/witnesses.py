"""Batches that show what the user's losses run: the first one, and each that runs a layer which none before it ran."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sized

from torch import Tensor, nn

from ..scoring.losses import Batch, TaskLosses
from .layers import makes_channels

# More would make each trial slow, and few models have more ways through them.
MOST = 4


class Peeked:
    """Data whose first batch has been looked at; iterates over all of it once."""

    def __init__(self, data: Iterable[Batch]) -> None:
        self._iterator = iter(data)
        self.first: list[Batch] = list(itertools.islice(self._iterator, 1))

    def __iter__(self) -> Iterator[Batch]:
        return itertools.chain(self.first, self._iterator)


class _SizedPeeked(Peeked):
    def __init__(self, data: Iterable[Batch], length: int) -> None:
        super().__init__(data)
        self._length = length

    def __len__(self) -> int:
        return self._length


def peeked(data: Iterable[Batch]) -> Peeked:
    """Look at the first batch of data that may be read only once.

    Raises:
        TypeError: If it is no iterable.

    Example:
        >>> data = peeked(iter("ab"))
        >>> data.first, list(data)
        (['a'], ['a', 'b'])
    """
    if not isinstance(data, Iterable):
        raise TypeError(
            f"data: must be an iterable of batches, found {type(data).__name__}; a single batch is data=[batch]"
        )
    try:
        return _SizedPeeked(data, len(data)) if isinstance(data, Sized) else Peeked(data)
    except TypeError:  # a DataLoader over an IterableDataset has __len__, but no length
        return Peeked(data)


class Witnesses:
    """Keeps, while losses are computed, the batches that ran something new.

    Attributes:
        batches: Those batches, as they were given, at most ``MOST``.
        ran: Layers that made channels in some batch.
    """

    def __init__(self, losses: TaskLosses) -> None:
        self._losses = losses
        self.batches: list[Batch] = []
        self.ran: set[nn.Module] = set()

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Compute the losses, and watch which layers run."""
        ran: set[nn.Module] = set()
        with contextlib.ExitStack() as stack:
            for layer in model.modules():
                if makes_channels(layer):
                    stack.callback(layer.register_forward_hook(lambda layer, _, __: ran.add(layer)).remove)
            result = self._losses(model, batch)
        if (not self.batches or ran - self.ran) and len(self.batches) < MOST:
            self.batches.append(batch)
        self.ran |= ran
        return result
