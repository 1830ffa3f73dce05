"""Decide alike on all ranks of ``torch.distributed``: share failures, add up scores, compare decisions.

Everything here does nothing without an initialised process group of two or more ranks. With one, every rank has to make
the same calls. A rank that fails on its own tells the others before it raises, so that all raise and none waits.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def several_ranks() -> bool:
    """Tell whether there is a process group of two or more ranks.

    Example:
        >>> several_ranks()
        False
    """
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def ranks_in_all() -> int:
    """Return the number of ranks; 1 without a process group.

    Example:
        >>> ranks_in_all()
        1
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def this_rank() -> int:
    """Return the number of this rank; 0 in one process.

    Example:
        >>> this_rank()
        0
    """
    return dist.get_rank() if several_ranks() else 0


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Run a block that may fail on some ranks, and then fail on all.

    The block itself must not communicate. The rank that failed raises its own error.

    Yields:
        Nothing.

    Raises:
        RuntimeError: On the other ranks, with the first failed rank and its message.
    """
    if not several_ranks():
        yield
        return
    try:
        yield
    except Exception as error:
        _gather(f"{type(error).__name__}: {error}")
        raise
    for rank, failure in enumerate(_gather(None)):
        if failure is not None:
            raise RuntimeError(f"distributed: all ranks must succeed, found that rank {rank} failed with {failure}")


def on_any_rank(flag: bool) -> bool:
    """Tell whether a flag is set on at least one rank."""
    return any(_gather(flag)) if several_ranks() else flag


def numbers_of_ranks(number: int) -> list[int]:
    """Return the number of every rank; cheap enough for every optimizer step, and no GPU is waited for.

    Example:
        >>> numbers_of_ranks(7)
        [7]
    """
    if not several_ranks():
        return [number]
    own = torch.tensor([number], device="cpu")
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own, group=_cpu_group())
    return [int(value) for value in found]


def check_same(argument: str, value: Any, advice: str) -> None:
    """Check that all ranks hold the same value.

    Args:
        argument: What it is, for the message.
        value: Anything that can be pickled and compared.
        advice: What to do about a difference.

    Raises:
        ValueError: On all ranks, if they differ.
    """
    if several_ranks():
        values = _gather(value)
        if any(other != values[0] for other in values):
            raise ValueError(f"{argument}: must be the same on all ranks, found {values}; {advice}")


def check_same_tensors(argument: str, tensors: Sequence[Tensor], advice: str) -> None:
    """Check by a digest that all ranks hold the same bool tensors.

    Raises:
        ValueError: On all ranks, if they differ.
    """
    if several_ranks():
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        check_same(argument, digest.hexdigest()[:16], advice)


def check_same_copies(argument: str, parts: Mapping[Any, Tensor], advice: str) -> None:
    """Check by digests that ranks which hold copies of a part of something hold the same.

    Args:
        argument: What it is, for the message.
        parts: bool tensors, by what names the part; names that a rank lacks are not compared.
        advice: What to do about a difference.

    Raises:
        ValueError: On all ranks, if copies differ.
    """
    if several_ranks():
        own = {name: hashlib.sha256(part.cpu().contiguous().numpy().tobytes()).digest() for name, part in parts.items()}
        first: dict[Any, bytes] = {}
        for of_rank in _gather(own):
            for name, digest in of_rank.items():
                if first.setdefault(name, digest) != digest:
                    raise ValueError(f"{argument}: must be the same on all ranks that hold {name[0]}; {advice}")


def check_same_values(argument: str, tensors: Mapping[str, Tensor], advice: str) -> None:
    """Check that all ranks hold the same floating point tensors, by the sums of their bits: exact, in any order.

    Args:
        argument: What they are, for the message.
        tensors: By the name that the message has; the same names on all ranks.
        advice: What to do about a difference.

    Raises:
        ValueError: On all ranks, with the first name, if they differ.
    """
    if not several_ranks() or not tensors:
        return
    sums = [_bits(tensor).sum(dtype=torch.int64).cpu() for tensor in tensors.values()]
    found = _gather(torch.stack(sums).tolist())
    for name, values in zip(tensors, zip(*found, strict=True), strict=True):
        if len(set(values)) > 1:
            raise ValueError(f"{argument}: must be the same on all ranks, found {name} to differ; {advice}")


def _bits(tensor: Tensor) -> Tensor:
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().view(kinds[tensor.element_size()])


def add_up(sums: MutableMapping[str, dict[int, Tensor]], zeros: Callable[[int], Tensor], summed: bool) -> None:
    """Add the scores of all ranks, in place. A task or parameter that only some ranks have seen counts as 0 elsewhere.

    Args:
        sums: Scores by task and index of the parameter; the order of the tasks becomes that of the first rank.
        zeros: Makes a score of zeros for the parameter of an index.
        summed: Whether scores add up over batches. Those that do not (magnitudes) are taken from a rank that has them.
    """
    if not several_ranks():
        return
    seen: list[dict[str, list[int]]] = _gather({task: sorted(rows) for task, rows in sums.items()})
    for task in dict.fromkeys(task for table in seen for task in table):
        rows = sums.pop(task, {})
        sums[task] = rows
        for index in sorted({index for table in seen for index in table.get(task, ())}):
            everywhere = all(index in table.get(task, ()) for table in seen)
            if index in rows:
                rows[index] = rows[index].contiguous()
            else:
                rows[index] = zeros(index) if summed else zeros(index).fill_(-torch.inf)
            if summed or not everywhere:
                dist.all_reduce(rows[index], op=dist.ReduceOp.SUM if summed else dist.ReduceOp.MAX)


def added_counts(counts: Tensor) -> Tensor:
    """Add up counts over all ranks; int64, on the CPU.

    Example:
        >>> added_counts(torch.tensor([1, 2]))
        tensor([1, 2])
    """
    if several_ranks():
        counts = counts.clone()
        dist.all_reduce(counts, group=_cpu_group())
    return counts


def total_counts(counts: Sequence[int]) -> list[int]:
    """Add up each of several whole numbers over all ranks.

    Example:
        >>> total_counts([1, 2])
        [1, 2]
    """
    found: list[int] = added_counts(torch.tensor(counts, dtype=torch.int64, device="cpu")).tolist()
    return found


def averaged(values: Tensor) -> Tensor:
    """Return the mean over all ranks of a tensor that all of them have.

    Example:
        >>> averaged(torch.ones(2))
        tensor([1., 1.])
    """
    if several_ranks():
        values = values.contiguous().clone()
        dist.all_reduce(values, group=_group_for(values))
        values /= dist.get_world_size()
    return values


def handed_out(
    values: Tensor, sizes: Sequence[int], received: Sequence[int] | None = None
) -> tuple[Tensor, Sequence[int]]:
    """Give each rank its range of the values here, and take what the others give.

    Args:
        values: 1-D.
        sizes: How many of them, from the first on, go to each rank.
        received: How many come from each rank, if that is known.

    Returns:
        What came, in the order of the ranks, and how many came from each.

    Example:
        >>> handed_out(torch.tensor([1.0, 2.0]), [2])
        (tensor([1., 2.]), [2])
    """
    if not several_ranks():
        return values, sizes
    if received is None:
        rank = dist.get_rank()
        received = [of_rank[rank] for of_rank in _gather(list(sizes))]
    result = values.new_empty(sum(received))
    dist.all_to_all_single(result, values.contiguous(), list(received), list(sizes), group=_group_for(values))
    return result, received


def _group_for(values: Tensor) -> Any:
    return _cpu_group() if values.device.type == "cpu" else None


_GROUPS: dict[Any, Any] = {}


def _cpu_group() -> Any:
    """Return a group that sends CPU tensors: the default one (None), or one beside it where that has NCCL alone."""
    world = dist.group.WORLD
    if world not in _GROUPS:
        _GROUPS.clear()  # of a default group that is gone
        _GROUPS[world] = None if "gloo" in dist.get_backend_config() else dist.new_group(backend="gloo")
    return _GROUPS[world]


def gathered(value: Any) -> list[Any]:
    """Return the values of all ranks, in their order; of one process alone, its own.

    Example:
        >>> gathered(3)
        [3]
    """
    return _gather(value) if several_ranks() else [value]


def _gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
