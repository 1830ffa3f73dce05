"""Numbers that modules hold of widths inside them (split sizes, heads), found by value and judged by a trial."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._support.stored import stored_numbers
from ..parameters import module_names
from .cuts import Attributes, Cut
from .groups import ChannelGroup, StoredSize
from .layers import makes_channels, rule_of


def stored_widths(root: nn.Module, cuts: Iterable[Cut]) -> Attributes:
    """Propose new values for the whole numbers, alone or in tuples, that equal the old width of a layer inside.

    Where two layers of the same old width become different, the number stays. Whether the proposal is right is not
    known here: the removal is tried with it.

    Args:
        root: The model before the removal.
        cuts: What its layers lose.

    Returns:
        Module name to its changed numbers.

    Example:
        >>> class Halves(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.width, self.first = 8, nn.Linear(4, 8)
        >>> stored_widths(Halves(), [Cut("first", "out", -1, 8, torch.tensor([0, 3]))])
        {'': {'width': 6}}
    """
    modules = {name: module for module, name in module_names(root).items()}
    widths: dict[str, dict[int, set[int]]] = {}
    for cut in cuts:
        path = cut.target
        while path:
            path = path.rpartition(".")[0]
            widths.setdefault(path, {}).setdefault(cut.count, set()).add(cut.count - len(cut.positions))
    found: dict[str, dict[str, Any]] = {}
    for path, by_count in widths.items():
        new = {old: next(iter(values)) for old, values in by_count.items() if len(values) == 1 and old > 1}
        for name, value in stored_numbers(modules[path]).items() if rule_of(modules[path]) is None else ():
            changed = _replaced(value, new)
            if changed != value and not name.startswith("_"):
                found.setdefault(path, {})[name] = changed
    return found


def shrunk_sizes(root: nn.Module, changes: Iterable[tuple[ChannelGroup, Tensor]]) -> Attributes:
    """Propose new values for the whole numbers that equal a size which their module meets, and which shrinks.

    Of several sizes that were equal before, the one that the module made itself counts (heads, pieces), or else the
    one that it met first.

    Args:
        root: The model before the removal.
        changes: Groups, and which of their channels go (bool).
    """
    modules = {name: module for module, name in module_names(root).items()}
    gone: dict[tuple[str, int], int] = {}
    met: dict[tuple[str, int], StoredSize] = {}
    for group, lost in changes:
        for entry in group.sizes:
            key = (entry.way, entry.number)
            met[key] = entry
            gone[key] = gone.get(key, 0) + int(lost[entry.channels[entry.channels >= 0]].sum())
    new: dict[str, dict[int, int]] = {}
    for entry in sorted(met.values(), key=lambda entry: (entry.cut, -entry.number)):  # the last that is set counts
        if lost_here := gone[entry.way, entry.number]:
            new.setdefault(entry.module, {})[entry.size] = entry.size - lost_here
    found: dict[str, dict[str, Any]] = {}
    for path, by_size in new.items():
        for name, value in stored_numbers(modules[path]).items():
            changed = _replaced(value, by_size)
            if changed != value and not name.startswith("_"):
                found.setdefault(path, {})[name] = changed
    return found


def _replaced(value: Any, new: Mapping[int, int]) -> Any:
    if isinstance(value, tuple):
        return tuple(_replaced(entry, new) for entry in value)
    return new.get(value, value) if type(value) is int else value


@dataclasses.dataclass(frozen=True)
class WholeHeads:
    """An attention whose heads can only go as a whole.

    Attributes:
        width: Of a head.
        modules: Names of the modules that hold the layers for query, key and value.
    """

    width: int
    modules: tuple[str, ...]


def whole_heads(root: nn.Module, group: ChannelGroup) -> WholeHeads | None:
    """Tell whether a group is an attention with a layer each for query, key and value that knows its head width.

    Such a module reshapes to ``(..., heads, head width)`` by numbers that it holds, so heads cannot become narrower,
    but there can be fewer. It is known by three layers in one module that lose outputs together, beside a number that
    divides their width, and maybe another that is the quotient.

    Args:
        root: The model.
        group: A group whose channels can go one by one.

    Returns:
        The width of a head and where the numbers are, or None.
    """
    modules = {name: module for module, name in module_names(root).items()}
    outs: dict[str, int] = {}
    for follower in group.followers:
        if follower.side == "out" and makes_channels(follower.layer) and follower.count == group.size:
            parent = follower.target.rpartition(".")[0]
            outs[parent] = outs.get(parent, 0) + 1
    parents = tuple(parent for parent, count in outs.items() if count >= 3)
    widths = {_head_width(stored_numbers(modules[parent]), group.size) for parent in parents}
    width = widths.pop() if len(widths) == 1 else None
    if width is None:
        return None
    channels = torch.arange(group.size)
    alone_or_whole = torch.equal(group.units, channels) or torch.equal(group.units, channels // width)
    return WholeHeads(width, parents) if alone_or_whole else None


def _head_width(numbers: Mapping[str, Any], size: int) -> int | None:
    whole = {name: value for name, value in numbers.items() if type(value) is int and 1 < value < size}
    named = [value for name, value in whole.items() if _says_width(name) and size % value == 0]
    quotients = [value for value in named if size // value in whole.values()]
    return next(iter([*quotients, *named]), None)


def _says_width(name: str) -> bool:
    return ("dim" in name or "size" in name) and ("head" in name or "key" in name)


def counts_heads(name: str) -> bool:
    """Tell whether a number is called as the number of heads is: then it is that also where no forward reads it."""
    return "head" in name and not _says_width(name)


def heads_left(root: nn.Module, heads: WholeHeads, size: int, left: int) -> Attributes:
    """Return the new values of the numbers of heads, and of their joint width, after whole heads are gone.

    Args:
        root: The model before.
        heads: The attention.
        size: Its joint width before.
        left: Its joint width after.
    """
    modules = {name: module for module, name in module_names(root).items()}
    found: dict[str, dict[str, Any]] = {}
    for path in heads.modules:
        for name, value in stored_numbers(modules[path]).items():
            if value == size and type(value) is int:
                found.setdefault(path, {})[name] = left
            elif value == size // heads.width and type(value) is int and counts_heads(name):
                found.setdefault(path, {})[name] = left // heads.width
    return found
