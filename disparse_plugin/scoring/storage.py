"""Where and how scores are kept once they are made, and of how many tasks the sums are held at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from .._support.shards import is_sharded
from ..errors import wrong
from ..kinds import whole_number
from .losses import Batch

Device: TypeAlias = torch.device | str | int

# What scores may be kept in. float16 may not: its largest number is 65,504, its smallest 6e-8.
KEPT = (torch.bfloat16, torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True)
class Storage:
    """How scores are kept.

    Attributes:
        dtype: What they are rounded to once they are complete; None keeps the type of their sums.
        device: Where they lie then; None leaves them beside their weights.
        tasks_at_once: Of how many tasks sums are held at once; None for all.

    Raises:
        TypeError: If one is of the wrong type.
        ValueError: If one is out of range.

    Example:
        >>> Storage(torch.bfloat16).keep(torch.tensor([1.0, 1.001]))
        tensor([1., 1.], dtype=torch.bfloat16)
    """

    dtype: torch.dtype | None = None
    device: Device | None = None
    tasks_at_once: int | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and not isinstance(self.dtype, torch.dtype):
            raise TypeError(f"dtype: must be a torch.dtype or None, found {wrong(self.dtype)}")
        if self.dtype is not None and self.dtype not in KEPT:
            known = ", ".join(str(dtype) for dtype in KEPT)
            raise ValueError(f"dtype: must be one of {known}, found {self.dtype}; scores have the range of float32")
        if self.device is not None:
            try:
                torch.device(self.device)
            except (RuntimeError, TypeError) as error:
                raise type(error)(f"device: must be a device or None, found {wrong(self.device)}; {error}") from None
        if self.tasks_at_once is not None:
            whole_number("tasks_at_once", self.tasks_at_once, least=1, otherwise=" or None (all)")

    def keep(self, score: Tensor) -> Tensor:
        """Round a complete score, and begin to move it: before it is read, :meth:`wait`.

        Raises:
            ValueError: If it is to leave the ranks over which its weight is spread.
        """
        if self.device is not None and is_sharded(score):
            raise ValueError(
                f"device: must be None where weights are sharded, found {self.device}; scores lie beside their shards"
            )
        score = score if self.dtype is None else score.to(self.dtype)
        # To the host torch copies into pinned memory then, and the program goes on meanwhile: see `wait`.
        return score if self.device is None else score.to(self.device, non_blocking=True)

    def wait(self, sources: Iterable[torch.device]) -> None:
        """Wait until what :meth:`keep` has taken from these devices has arrived."""
        if self.device is not None:
            for device in {device for device in sources if device.type != "cpu"}:
                torch.accelerator.synchronize(device)

    def check_source(self, data: Iterable[Batch]) -> None:
        """Check that data can be read again, where not all tasks are scored at once.

        Raises:
            ValueError: If it is an iterator, which can be read once.
        """
        if self.tasks_at_once is not None and isinstance(data, Iterator):
            raise ValueError(
                f"data: must be readable again with tasks_at_once, found {wrong(data)}, which can be read once; pass a "
                "list, or a loader"
            )


BESIDE = Storage()


class TasksInTurn:
    """Which tasks are scored in one go over the data, and which are left for another."""

    def __init__(self, at_once: int | None) -> None:
        """Start with none scored."""
        self._at_once = at_once
        self._every: Sequence[str] = ()
        self._start = 0

    def of(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the losses of the tasks whose turn it is."""
        if self._at_once is None:
            return dict(losses)
        if not self._every:
            self._every = tuple(losses)
        return {task: losses[task] for task in self._every[self._start :][: self._at_once]}

    def more(self) -> bool:
        """Go on to the next tasks; tell whether there are any."""
        self._start += self._at_once or len(self._every)
        return self._start < len(self._every)


_WIDE = (torch.float32, torch.float64)


def _wide(row: Tensor) -> Tensor:
    return row if row.dtype in _WIDE else row.float()


class Widened(Mapping[str, Tensor]):
    """Scores by task, those of few bits as float32 whenever they are looked at: so no more of them is held."""

    def __init__(self, rows: Mapping[str, Tensor], form: Callable[[Tensor], Tensor] = _wide) -> None:
        """Take the rows, and what else is to be done to one when it is looked at."""
        self._rows = rows
        self._form = form

    def then(self, function: Callable[[Tensor], Tensor]) -> Widened:
        """Let a function see each row in single precision or more, and its result stand for the row."""
        return Widened(self._rows, lambda row: function(_wide(row)))

    def __getitem__(self, task: str) -> Tensor:
        """Return one row."""
        return self._form(self._rows[task])

    def __iter__(self) -> Iterator[str]:
        """Iterate over the tasks."""
        return iter(self._rows)

    def __len__(self) -> int:
        """Return the number of tasks."""
        return len(self._rows)


def widened(rows: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Give scores at least single precision, in which they are compared and added up.

    Example:
        >>> widened({"a": torch.ones(1, dtype=torch.bfloat16)})["a"].dtype
        torch.float32
    """
    few = any(row.dtype not in _WIDE for row in rows.values())
    return Widened(rows) if few else rows
