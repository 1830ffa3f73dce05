"""How many channels must go for a target, and what that leaves of every parameter."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Container, Mapping, Sequence
from fractions import Fraction
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from .groups import ChannelGroup

Quantity: TypeAlias = Literal["channels", "parameters", "macs", "latency"]
QUANTITIES = ("channels", "parameters", "macs", "latency")

# For each group a bool vector over its units: True = goes.
Choice: TypeAlias = Sequence[Tensor]


@dataclasses.dataclass(frozen=True)
class _Loss:
    """What one group takes away from one dimension of one parameter: entries per unit."""

    group: int
    dim: int
    per_unit: Tensor
    size: int


class Budget:
    """Counts what is left of a model's channels, parameters and MACs after some units are gone.

    Every parameter shrinks by the product over its dimensions of the share that stays; MACs of a layer are its weights
    times the number of times that each is used, which does not change.
    """

    def __init__(
        self,
        groups: Sequence[ChannelGroup],
        sizes: Mapping[str, int],
        uses: Mapping[str, Fraction | int],
        names: Mapping[str, str],
        weights: Sequence[int],
    ) -> None:
        """Prepare the counts.

        Args:
            groups: The groups that may lose units.
            sizes: Number of entries of every parameter of the model, by name; one that layers share stands once.
            uses: Multiplications per entry, by name, for the weights that have any.
            names: Every name of a parameter to the one that it is counted by.
            weights: For each group, as how many channels each of its channels counts.
        """
        self._groups, self._sizes, self._uses, self._weights = groups, sizes, uses, weights
        self._losses: dict[str, list[_Loss]] = {}
        for number, group in enumerate(groups):
            taken: dict[str, str] = {}
            for piece in group.slices():
                name = names[piece.name]
                if taken.setdefault(name, piece.name) != piece.name:
                    continue  # the same Parameter in another layer
                per_unit = torch.bincount(group.units[piece.channels], minlength=group.num_units)
                size = piece.shape[piece.dim] * piece.blocks
                self._losses.setdefault(name, []).append(_Loss(number, piece.dim, per_unit, size))

    def total(self, of: Quantity) -> int:
        """Return the quantity of the whole model; of channels, those of the groups."""
        return self.left(of, [torch.zeros(group.num_units, dtype=torch.bool) for group in self._groups])

    def left(self, of: Quantity, choice: Choice, inside: Container[str] | None = None) -> int:
        """Return the quantity that is left after the chosen units are gone.

        Args:
            of: The quantity; not ``"latency"``, which is measured.
            choice: For each group a bool vector over its units.
            inside: Names of the parameters that count; None: all.
        """
        if of == "channels":
            return sum(self.channels(number, gone) for number, gone in enumerate(choice))
        left = {name: count for name, count in self.entries(choice).items() if inside is None or name in inside}
        if of == "parameters":
            return sum(left.values())
        return int(sum(left[name] * uses for name, uses in self._uses.items() if name in left))

    def channels(self, number: int, gone: Tensor) -> int:
        """Return how many channels of a group are left after the chosen units are gone."""
        return self._weights[number] * int(self._groups[number].unit_sizes()[~gone].sum())

    def in_groups(self) -> int:
        """Return how many entries of parameters follow the channels of some group."""
        return sum(self._sizes[name] for name in self._losses)

    def entries(self, choice: Choice) -> dict[str, int]:
        """Return how many entries are left of every parameter."""
        left = dict(self._sizes)
        for name, losses in self._losses.items():
            gone: dict[int, int] = {}
            for loss in losses:
                gone[loss.dim] = gone.get(loss.dim, 0) + int(loss.per_unit[choice[loss.group]].sum())
            share = math.prod(1 - count / loss.size for loss in _one_per_dim(losses) for count in [gone[loss.dim]])
            left[name] = round(self._sizes[name] * share)
        return left


def _one_per_dim(losses: Sequence[_Loss]) -> list[_Loss]:
    return list({loss.dim: loss for loss in losses}.values())


def units_to_keep(group: ChannelGroup, max_pruning_ratio: float, parts: Sequence[Tensor] = ()) -> int:
    """Return how many units of a group must stay: one, or one of each part, or more if only a share may go.

    ``parts`` are those of :func:`parts_of`.

    Example:
        >>> units_to_keep(ChannelGroup("fc", 10, torch.arange(10), ()), 0.75)
        3
    """
    least = min(group.num_units, math.ceil(group.num_units * (1 - max_pruning_ratio) - 1e-9))
    return max(1, len(parts), least)


def parts_of(group: ChannelGroup) -> list[Tensor]:
    """Return sets of units of which one must stay each: those that make up a layer that follows, or a stored size.

    Queries and keys may be one layer with the values and lose other channels than those; neither may lose all.

    Returns:
        int64 numbers of units; sets of all units, and such that hold another set, are left out.

    Example:
        >>> from torch import nn
        >>> from disparse_plugin.structured.groups import Follower
        >>> channels = torch.arange(4)
        >>> both = Follower("qkv", nn.Linear(1, 4), "out", -1, 4, channels, channels)
        >>> keys = Follower("norm", nn.LayerNorm(2), "out", -1, 2, torch.arange(2), torch.tensor([0, 1]))
        >>> parts_of(ChannelGroup("qkv", 4, channels, (both, keys)))
        [tensor([0, 1])]
    """
    whole = [f.channels for f in group.followers if f.count == len(f.positions)]
    whole += [entry.channels for entry in group.sizes if bool((entry.channels >= 0).all())]
    sets = {frozenset(group.units[channels].tolist()) for channels in whole if len(channels)}
    least = [one for one in sets if len(one) < group.num_units and not any(other < one for other in sets)]
    return [torch.tensor(sorted(one)) for one in sorted(least, key=sorted)]


def multiples(
    groups: Sequence[ChannelGroup], round_to: int | Literal["auto"] | None, device: torch.device
) -> list[int]:
    """Return of which number the channels that stay in each group must be a multiple.

    ``"auto"`` is what the kernels of a device are made for: vector registers hold 16 numbers of float32 with AVX-512
    and 8 with AVX2, and oneDNN blocks channels so; tiles of NVIDIA's tensor cores are filled by 16. Narrow layers, in
    which that would leave next to no choice, take the half, or a quarter, and so on: a quarter of their width at most.

    Args:
        groups: The groups.
        round_to: A number for all groups, ``"auto"``, or None.
        device: Where the model runs.

    Example:
        >>> wide, narrow = (ChannelGroup("", size, torch.arange(size), ()) for size in (64, 20))
        >>> multiples([wide, narrow], 8, torch.device("cpu")), multiples([wide, narrow], "auto", torch.device("cuda"))
        ([8, 8], [16, 4])
    """
    if round_to != "auto":
        return [int(round_to or 1)] * len(groups)
    wide = 8 if device.type == "cpu" and "AVX512" not in torch.backends.cpu.get_cpu_capability() else 16
    found = []
    for group in groups:
        number = wide
        while number > 1 and number * 4 > group.size:
            number //= 2
        found.append(number)
    return found


def chosen(
    groups: Sequence[ChannelGroup], order: Sequence[Tensor], keep: Sequence[int], count: int, round_to: Sequence[int]
) -> list[Tensor]:
    """Choose the first ``count`` units of the order, as far as each group may lose them.

    Args:
        groups: The groups.
        order: The place of every unit.
        keep: How many units of each group must stay.
        count: How many places are looked at.
        round_to: For each group of which number the channels that stay must be a multiple, if it loses any.

    Returns:
        For each group a bool vector over its units.
    """
    choice = []
    for group, places, least, multiple in zip(groups, order, keep, round_to, strict=True):
        sizes, by_place = group.unit_sizes(), places.argsort()
        gone = min(int((places < count).sum()), group.num_units - least)
        while gone and int(sizes[by_place[gone:]].sum()) % multiple:
            gone -= 1
        flags = torch.zeros(group.num_units, dtype=torch.bool)
        flags[by_place[:gone]] = True
        choice.append(flags)
    return choice


def choose(
    groups: Sequence[ChannelGroup],
    order: Sequence[Tensor],
    keep: Sequence[int],
    *,
    left: Callable[[Choice], float],
    of: Quantity,
    amount: float,
    round_to: Sequence[int],
    why: Callable[[], str],
    what: str = "amount",
    total: float | None = None,
    whole: float | None = None,
) -> list[Tensor]:
    """Find the shortest beginning of the order whose removal reaches the amount.

    Args:
        groups: The groups.
        order: The place of every unit.
        keep: How many units of each group must stay.
        left: From a choice to what it leaves of the quantity.
        of: What is counted.
        amount: A fraction (float) or a number (int) of it to remove.
        round_to: As in :func:`chosen`.
        why: Says what keeps the removal from going further; asked only for a message.
        what: What messages call the amount.
        total: How much there was, where some is gone by other means; None: what is left if nothing is chosen.
        whole: The amount of all steps, of which this is the first; it must be within reach. None: this is all.

    Returns:
        For each group a bool vector over its units.

    Raises:
        ValueError: If even removing all that may go is not enough.
    """
    if total is None:
        total = left([torch.zeros(group.num_units, dtype=torch.bool) for group in groups])

    def in_total(amount: float) -> float:
        if isinstance(amount, numbers.Integral):
            return float(amount)
        return round(amount * total) if of == "channels" else amount * total

    def removed(count: int) -> float:
        return total - left(chosen(groups, order, keep, count, round_to))

    low, high = 0, sum(group.num_units for group in groups)
    most, wanted, asked = removed(high), in_total(amount), amount if whole is None else whole
    if most < in_total(asked):
        raise ValueError(
            f"{what}: at most {most:.6g} of {total:.6g} {of} ({most / max(total, 1e-12):.1%}) can be removed, found "
            f"{asked} asked; lower it. What holds the rest: {why()}"
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if removed(middle) >= wanted else (middle + 1, high)
    return chosen(groups, order, keep, low, round_to)
