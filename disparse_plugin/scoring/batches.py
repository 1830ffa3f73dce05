"""Which batches are scored: checked as far as can be before the first is read."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sized

from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..kinds import check_flag, whole_number
from .losses import Batch


@dataclasses.dataclass(frozen=True)
class Data:
    """Batches as a user passes them to :func:`~disparse_plugin.score_tasks`.

    Attributes:
        source: Any iterable of batches.
        num_batches: How many to use; None for all.
        cycle: Start again at the first when ``source`` ends before ``num_batches``.
        progress: Show a tqdm bar.
        may_cycle: Whether ``cycle`` is for the user to choose, so that messages may advise it.

    Example:
        >>> list(Data([1, 2], num_batches=3, cycle=True).batches())
        [1, 2, 1]
    """

    source: Iterable[Batch]
    num_batches: int | None = None
    cycle: bool = False
    progress: bool = False
    may_cycle: bool = True

    def batches(self) -> Iterator[Batch]:
        """Check the options, and return an iterator over the batches.

        Raises:
            TypeError: If an option has the wrong type, or what is passed is one batch, or a list of a loader.
            ValueError: If ``num_batches`` is out of range or missing. And, where that shows only as they are read, if
                there is no batch, or fewer than ``num_batches``.
        """
        check_flag("cycle", self.cycle)
        check_flag("progress", self.progress)
        count = checked_count(self.num_batches)
        if count is None and self.cycle:
            raise ValueError(
                "num_batches: must be given with cycle=True, found None; otherwise scoring would never end"
            )
        check_source(self.source)
        known = length(self.source)
        if count is not None and known is not None and 0 < known < count and not self.cycle:
            raise self._too_short(count, known)
        expected = count if known is None or self.cycle else min(known, count or known)
        batches = self._counted(count)
        return iter(tqdm(batches, total=expected, desc="scoring", unit="batch", disable=not self.progress))

    def _counted(self, count: int | None) -> Iterator[Batch]:
        found = 0
        for _ in itertools.count():
            start = found
            for batch in self.source if count is None else itertools.islice(self.source, count - found):
                if isinstance(batch, DataLoader):
                    raise TypeError(
                        "data: must be an iterable of batches, found a DataLoader in it, which holds batches itself; "
                        "pass data=loader"
                    )
                found += 1
                yield batch
            if not self.cycle or found in (start, count):
                break
        if found == 0:
            raise ValueError("data: must hold at least one batch, found none")
        if count is not None and found < count:
            raise self._too_short(count, found)

    def _too_short(self, wanted: int, found: int) -> ValueError:
        if self.cycle:
            otherwise = ", or data that can be read again"
        else:
            otherwise = ", or cycle=True with a data set that can be read again" if self.may_cycle else ""
        return ValueError(
            f"num_batches: must be at most the number of batches in data, found {wanted} with {found} in data; pass "
            f"num_batches={found}{otherwise}"
        )


def checked_count(num_batches: int | None) -> int | None:
    """Check how many batches are asked for.

    Raises:
        TypeError: If it is neither an int nor None.
        ValueError: If it is less than one.
    """
    if num_batches is None:
        return None
    return whole_number("num_batches", num_batches, least=1, otherwise=" or None (all of data)")


def check_source(source: object) -> None:
    """Check that data are batches, and not one.

    Raises:
        TypeError: If not.
    """
    if isinstance(source, Tensor | Mapping | str | bytes):
        what = f"one {type(source).__name__}"
    elif not isinstance(source, Iterable):
        what = type(source).__name__
    else:
        return
    raise TypeError(f"data: must be an iterable of batches, found {what}; a single batch is data=[batch]")


def length(data: Iterable[Batch]) -> int | None:
    """Return how many batches there are, as far as that can be known before they are read."""
    try:
        return len(data) if isinstance(data, Sized) else None
    except TypeError:  # a DataLoader over an IterableDataset has __len__, but no length
        return None
