"""Cuts: which positions one side of one layer loses. Checked, merged, and joined over several steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .layer_rule import Side
from .shrinking import kept_of

# Module name to the plain numbers that it holds after the removal, where they changed.
Attributes: TypeAlias = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Cut:
    """Positions that one layer loses on one side.

    Attributes:
        target: Qualified name of the module, or of the parameter if ``side`` is ``"parameter"``.
        side: ``"out"``, ``"in"`` or ``"parameter"``.
        dim: The dimension of a bare parameter; -1 elsewhere.
        count: How many positions the side has before.
        positions: int64, ascending, each once.
    """

    target: str
    side: Side
    dim: int
    count: int
    positions: Tensor


def check_cuts(cuts: Iterable[Cut]) -> None:
    """Check what can be checked without a model.

    Raises:
        ValueError: If a side of a layer stands twice, or positions are not ascending, out of range, or all there are.

    Example:
        >>> check_cuts([Cut("fc", "in", -1, 2, torch.tensor([0, 1]))])
        Traceback (most recent call last):
        ValueError: cuts: a layer must keep a position, found that fc (in) loses all 2
    """
    seen = set()
    for cut in cuts:
        what = f"{cut.target} ({cut.side})"
        if cut.side not in ("out", "in", "parameter") or type(cut.count) is not int or type(cut.dim) is not int:
            raise ValueError(f"cuts: must say side, dim and count, found {cut.side!r}, {cut.dim!r} and {cut.count!r}")
        if (cut.target, cut.side, cut.dim) in seen:
            raise ValueError(f"cuts: each side of a layer may stand once, found {what} twice")
        seen.add((cut.target, cut.side, cut.dim))
        positions = cut.positions
        if positions.dtype != torch.int64 or positions.dim() != 1:
            raise ValueError(f"cuts: positions must be int64 in one dimension, found {positions.dtype} for {what}")
        if positions.numel() and not 0 <= int(positions[0]) <= int(positions[-1]) < cut.count:
            raise ValueError(f"cuts: positions must lie in 0..{cut.count - 1}, found {positions.tolist()} for {what}")
        if bool((positions.diff() <= 0).any()):
            raise ValueError(f"cuts: positions must ascend, found {positions.tolist()} for {what}")
        if positions.numel() >= cut.count:
            raise ValueError(f"cuts: a layer must keep a position, found that {what} loses all {cut.count}")


def merge_cuts(cuts: Iterable[Cut]) -> tuple[Cut, ...]:
    """Join the cuts of one side of one layer, which several groups may share (after a concatenation).

    Example:
        >>> one, two = Cut("fc", "in", -1, 4, torch.tensor([2])), Cut("fc", "in", -1, 4, torch.tensor([0, 2]))
        >>> merge_cuts([one, two])[0].positions
        tensor([0, 2])
    """
    merged: dict[tuple[str, Side, int], Cut] = {}
    for cut in cuts:
        key = (cut.target, cut.side, cut.dim)
        known = merged.get(key)
        positions = cut.positions if known is None else torch.cat([known.positions, cut.positions])
        merged[key] = dataclasses.replace(cut, positions=positions.unique())
    return tuple(merged.values())


def composed(first: Sequence[Cut], later: Sequence[Cut]) -> tuple[Cut, ...]:
    """Join the cuts of two removals, the later one made on the smaller model, in the numbering of the full one."""
    known = {(cut.target, cut.side, cut.dim): cut for cut in first}
    for cut in later:
        key = (cut.target, cut.side, cut.dim)
        if key in known:
            before = known[key]
            own = kept_of(before.count, before.positions)[cut.positions]
            known[key] = dataclasses.replace(before, positions=torch.cat([before.positions, own]).sort().values)
        else:
            known[key] = cut
    return tuple(known.values())
