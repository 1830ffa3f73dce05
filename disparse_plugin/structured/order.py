"""In which order channels go: percentiles per task, the arbiter, a strict total order, and what may not go at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch import Tensor

from .. import arbiters
from ..agreement.candidates import Candidates
from ..agreement.percentiles import agreement
from ..agreement.ranking import ranks
from ..arbiters import Arbiter


@dataclasses.dataclass(frozen=True)
class ChannelRule:
    """How the tasks agree on which channels of a group go first, and on how many of each group."""

    which: Arbiter
    how_many: Arbiter

    @classmethod
    def of(cls, arbiter: str | Arbiter, across: str | Arbiter | None) -> ChannelRule:
        """Resolve what a user gave: ``across`` is the arbiter of how many, by default the same.

        Raises:
            TypeError: If one is neither a name nor callable.
            ValueError: If a name is unknown.
        """
        which = arbiters.resolve(arbiter)
        return cls(which, which if across is None else arbiters.resolve(across, "across"))


def removal_order(
    scores: Sequence[Mapping[str, Tensor]],
    keep: Sequence[int],
    tasks: Sequence[str],
    rule: ChannelRule,
    magnitudes: Sequence[Tensor] | None = None,
    parts: Sequence[Sequence[Tensor]] | None = None,
) -> list[Tensor]:
    """Put all units of one ranking scope in the order of their removal.

    A task's percentile of a unit is ``(rank + 1) / n_k`` among the ``n_k`` units of the scope that the task reaches;
    the arbiter reduces the percentiles to an agreement score; lower goes first. Equal scores go by their magnitudes,
    and of equal magnitudes in the order of the groups and of the units in them, so the order is strict and any number
    of units can be removed exactly. The best
    units of each group go after all others, so that no group is emptied. Where the rule has another arbiter for how
    many, its order decides that, and which units of the group these are is left to the first.

    Args:
        scores: For each group, each reaching task's scores (1-D, one per unit, finite).
        keep: For each group, how many units may not go.
        tasks: All task names.
        rule: The reductions over tasks.
        magnitudes: For each group, the sum of ``abs(w)`` of each unit; None where the order alone decides.
        parts: For each group, sets of units (int64) the best of which is among those that may not go.

    Returns:
        For each group, float64 places in the order, ``0..n-1`` over all groups, each once.

    Example:
        >>> rule = ChannelRule.of("unanimous", None)
        >>> trunk = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([9.0, 1.0, 2.0])}
        >>> head = {"a": torch.tensor([0.5, 0.4])}
        >>> [places.tolist() for places in removal_order([trunk, head], [1, 1], ("a", "b"), rule)]
        [[2.0, 1.0, 4.0], [3.0, 0.0]]
    """
    if not scores:
        return []
    sizes = [next(iter(rows.values())).numel() for rows in scores]
    candidates = Candidates(scores, magnitudes)
    places = _places(candidates, tasks, rule.which)
    if rule.how_many is not rule.which:
        counted = _places(candidates, tasks, rule.how_many)
        places = [others.sort().values[ranks(own).long()] for own, others in zip(places, counted, strict=True)]
    lifted = []
    for place, count, own in zip(places, keep, parts or [()] * len(keep), strict=True):
        value = place.clone()
        value[[int(part[place[part].argmax()]) for part in own]] += sum(sizes)
        value[value.topk(min(count, value.numel())).indices] += sum(sizes)
        lifted.append(value)
    return list(ranks(torch.cat(lifted)).double().split(sizes))


def interleaved_order(
    kinds: Sequence[Hashable], order_of: Callable[[Sequence[int]], list[Tensor]], sizes: Sequence[int]
) -> list[Tensor]:
    """Put units in the order of their removal such that groups of each kind lose the same share.

    Groups of one kind are ranked among themselves, as with ``isomorphic=True`` of torch-pruning (Fang et al.,
    Isomorphic Pruning for Vision Models, 2024). A unit's place is its rank divided by the number of units of its kind,
    and equal places go in the order of the groups.

    Args:
        kinds: Of each group.
        order_of: From numbers of groups to the places of their units among these groups.
        sizes: Number of units of each group.

    Returns:
        As :func:`removal_order`.

    Example:
        >>> places = {0: [0.0, 2.0], 1: [1.0, 3.0], 2: [1.0, 0.0]}
        >>> order_of = lambda members: [torch.tensor(places[n]) for n in members]
        >>> [own.tolist() for own in interleaved_order(["conv", "conv", "fc"], order_of, [2, 2, 2])]
        [[0.0, 3.0], [1.0, 4.0], [5.0, 2.0]]
    """
    shares: list[Tensor] = [torch.zeros(size, dtype=torch.float64) for size in sizes]
    for kind in dict.fromkeys(kinds):
        members = [number for number, other in enumerate(kinds) if other == kind]
        total = sum(sizes[number] for number in members)
        for number, places in zip(members, order_of(members), strict=True):
            shares[number] = (places.double() + 1) / total
    return list(ranks(torch.cat(shares)).double().split(list(sizes)))


def _places(candidates: Candidates, tasks: Sequence[str], arbiter: Arbiter) -> list[Tensor]:
    values = torch.cat(agreement(candidates, tasks, arbiter))
    turns = candidates.joined_magnitudes(range(len(candidates.scores)))
    return list(ranks(values, turns).double().split(candidates.sizes))
