"""Take the labels away from their samples: the null model in which no task can be learnt."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..kinds import check_kind
from ..scoring.losses import Batch


def permute_labels(batch: Batch, generator: torch.Generator) -> Batch:
    """Give every sample the labels of another sample of the batch; the inputs, and all distributions, stay.

    Args:
        batch: A tuple or list ``(inputs, labels, ...)`` or a mapping whose first entry are the inputs. Every further
            entry gets a random cyclic order of its own, so that no sample keeps its label and labels of different
            entries come apart; an entry that is itself a mapping is taken entry by entry. Tensors inside one entry move
            together along their first dimension; a list of one thing per sample (boxes, targets of a detector) is
            reordered as a list. Which entry is called inputs does not matter for a mapping: all
            entries come apart from each other in any case.
        generator: Where the order is drawn from.

    Returns:
        A batch of the same structure and of the same types (``OrderedDict``, ``BatchEncoding``, named tuples).

    Raises:
        TypeError: If ``generator`` is no generator, the batch neither a tuple, a list nor a mapping, or an entry holds
            no tensor.
        ValueError: If it has a single entry, a single sample, or entries of different lengths inside one.

    Example:
        >>> images, labels = permute_labels((torch.zeros(3, 1), torch.tensor([0, 1, 2])), torch.Generator())
        >>> sorted(labels.tolist()), bool((labels == torch.tensor([0, 1, 2])).any())
        ([0, 1, 2], False)
    """
    check_kind("generator", generator, torch.Generator, "a torch.Generator")
    if isinstance(batch, Mapping):
        entries = list(batch.items())
        _check_entries(len(entries))
        size = _size(entries[0][1])
        changed = {key: _permuted(value, generator, repr(key), size) for key, value in entries[1:]}
        return _with_entries(batch, changed)
    if not isinstance(batch, tuple | list):
        raise TypeError(
            f"batch: must be a tuple or list (inputs, labels, ...) or a mapping, found {type(batch).__name__}; pass "
            "permute=your_function(batch, generator) that gives every sample the labels of another"
        )
    _check_entries(len(batch))
    size = _size(batch[0])
    parts = [batch[0], *(_permuted(part, generator, str(place), size) for place, part in enumerate(batch[1:], start=1))]
    return _of_parts(batch, parts)


def _with_entries(mapping: Mapping[Any, Any], changed: Mapping[Any, Any]) -> Any:
    """Return a mapping of the same kind with some entries changed: losses may read ``batch.labels``, too."""
    if isinstance(mapping, dict | UserDict):  # of which copies have entries of their own
        copied = copy.copy(mapping)
        for key, value in changed.items():
            copied[key] = value
        return copied
    kind: Any = type(mapping)
    try:
        return kind({**mapping, **changed})
    except TypeError as error:
        raise TypeError(
            f"batch: a mapping must be a dict, a UserDict, or made from one, found {kind.__name__}; pass "
            "permute=your_function"
        ) from error


def _of_parts(like: Any, parts: Iterable[Any]) -> Any:
    """Return a list, tuple or named tuple of the same kind with other parts."""
    return type(like)(*parts) if hasattr(like, "_fields") else type(like)(parts)


def _check_entries(count: int) -> None:
    if count < 2:
        raise ValueError(f"batch: must hold inputs and labels, found {count} entry; pass permute=your_function")


def _size(inputs: Any) -> int | None:
    """Return how many samples there are, where the inputs are one tensor or a list of one for each."""
    if isinstance(inputs, Tensor):
        return len(inputs) if inputs.dim() else None
    return len(inputs) if isinstance(inputs, list) else None


def _permuted(entry: Any, generator: torch.Generator, where: str, size: int | None) -> Any:
    if isinstance(entry, Mapping):
        inner = {key: _permuted(value, generator, f"{where}[{key!r}]", size) for key, value in entry.items()}
        return _with_entries(entry, inner)
    if _one_per_sample(entry, size):
        source = _ring(len(entry), generator)
        return type(entry)(entry[place] for place in source.tolist())
    lengths = {len(tensor) for tensor in _tensors(entry) if tensor.dim()}
    if len(lengths) != 1 or lengths == {1}:
        raise ValueError(
            f"batch: labels must be tensors of one length of at least 2, found {sorted(lengths)} in entry {where}; use "
            "larger batches, or pass permute=your_function"
        )
    return _reordered(entry, _ring(lengths.pop(), generator))


def _one_per_sample(entry: Any, size: int | None) -> bool:
    """Tell whether an entry is a list of one thing per sample, and not of tensors that hold all samples."""
    if not isinstance(entry, list | tuple) or hasattr(entry, "_fields") or len(entry) != size or size < 2:
        return False
    return not all(isinstance(part, Tensor) and part.dim() and len(part) == size for part in entry)


def _ring(size: int, generator: torch.Generator) -> Tensor:
    """Draw where each sample takes its label from: one cycle, so that none keeps its own."""
    ring = torch.randperm(size, generator=generator, device=generator.device)
    source = torch.empty_like(ring)
    source[ring] = ring.roll(1)
    return source


def _tensors(entry: Any) -> list[Tensor]:
    if isinstance(entry, Tensor):
        return [entry]
    if isinstance(entry, tuple | list):
        return [tensor for part in entry for tensor in _tensors(part)]
    raise TypeError(f"batch: labels must be tensors, found {type(entry).__name__}; pass permute=your_function")


def _reordered(entry: Any, source: Tensor) -> Any:
    if isinstance(entry, Tensor):
        return entry[source.to(entry.device)] if entry.dim() else entry
    return _of_parts(entry, [_reordered(part, source) for part in entry])
