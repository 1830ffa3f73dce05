"""The groups that compete for the removal, and what the tasks say of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor, nn

from ..agreement.budgets import part_of
from ..parameters import keys_by_name, module_names
from ..scoring.task_scores import TaskScores
from .applying import Pruners
from .budget import Budget, Quantity
from .channel_scores import channel_scores, normalized, why_unjudged
from .groups import SETTLED, ChannelGroup
from .layer_rule import Side
from .layers import makes_channels
from .numbers import WholeHeads, whole_heads
from .order import ChannelRule
from .spare import apart


@dataclasses.dataclass(frozen=True)
class Options:
    """How much of what goes, and by which rule; checked once by :func:`remove_channels`.

    Of a removal in steps, ``whole`` is the amount of all together, which the first must find within the limit of
    ``max_pruning_ratio``; ``first`` says how many channels the groups had before the first, by their root.
    """

    amount: float | Mapping[str, float]
    of: Quantity
    rule: ChannelRule
    reduction: str
    normalizer: str | None
    max_pruning_ratio: float
    round_to: int | Literal["auto"] | None
    customized_pruners: Pruners | None
    isomorphic: bool = False
    whole: float | Mapping[str, float] | None = None
    first: Mapping[tuple[str, Side], int] = dataclasses.field(default_factory=dict)

    def ratio_of(self, group: ChannelGroup) -> float:
        """Return which share of its present channels a group may lose, so that it keeps what it must of the first."""
        return 1 - (1 - self.max_pruning_ratio) * self.first.get(group.root, group.size) / group.size

    def groups_in(self, group: ChannelGroup) -> int:
        """Return how many of the first groups lose a channel with each channel of a group: some have become one."""
        return max(1, len(self.first.keys() & {(f.target, f.side) for f in group.followers}))


@dataclasses.dataclass(frozen=True)
class Contest:
    """The groups that compete, and what the tasks say of them.

    Attributes:
        root: The model, not yet changed.
        options: What was asked.
        sizes: Number of entries of every Parameter, once, by the name that comes first.
        names: Every name of a parameter to that name.
        uses: Multiplications per entry, by that name.
        tasks: All tasks.
        named: Element scores by parameter name and task.
        unreached: Names of the parameters that no task reaches.
        groups: The groups.
        scores: For each group, each reaching task's scores of its units.
        heads: For each group, whether its units are whole heads.
        numbered: Names of groups for which numbers that modules hold of their width change too.
        skipped: Layer name to the reason why its channels are left alone.
        read: Gives the names of the numbers that modules hold and that a forward reads, by module.
    """

    root: nn.Module
    options: Options
    sizes: Mapping[str, int]
    names: Mapping[str, str]
    uses: Mapping[str, Fraction | int]
    tasks: tuple[str, ...]
    named: Mapping[str, Mapping[str, Tensor]]
    unreached: frozenset[str]
    groups: tuple[ChannelGroup, ...]
    scores: tuple[Mapping[str, Tensor], ...]
    heads: tuple[WholeHeads | None, ...]
    numbered: frozenset[str]
    skipped: Mapping[str, str]
    read: Callable[[], Mapping[str, Collection[str]]]

    def budget(self) -> Budget:
        """Return the counts of what is left after some units are gone."""
        return Budget(self.groups, self.sizes, self.uses, self.names, [*map(self.options.groups_in, self.groups)])

    def joined_by(self, groups: Sequence[ChannelGroup]) -> Contest:
        """Return the contest with more groups, scored; those that cannot take part are noted with the reason."""
        admitted: list[tuple[ChannelGroup, dict[str, Tensor], WholeHeads | None]] = []
        reasons = dict(self.skipped)
        for group in groups:
            heads = whole_heads(self.root, group)
            if heads is not None:
                group = dataclasses.replace(group, units=torch.arange(group.size) // heads.width)
            by_task = channel_scores(group, self.named, self.options.reduction)
            if group.num_units < 2:
                reasons[group.name] = "has one channel" if group.size == 1 else "all its channels go together"
            elif not by_task:
                reasons[group.name] = why_unjudged(group, self.unreached)
            else:
                scale = self.options.normalizer
                per_unit = {task: group.per_unit(normalized(v, scale)) for task, v in by_task.items()}
                admitted.append((group, per_unit, heads))
        first, second, third = zip(*admitted, strict=True) if admitted else ((), (), ())
        losing = {f.target for group in first for f in group.followers if f.side == "out"}
        return dataclasses.replace(
            self,
            groups=(*self.groups, *first),
            scores=(*self.scores, *second),
            heads=(*self.heads, *third),
            numbered=self.numbered | {group.name for group in first if group.sizes},
            skipped={name: why for name, why in reasons.items() if name not in losing},
        )

    @property
    def is_whole(self) -> bool:
        """Whether no layer is left alone that has channels to lose."""
        return all(why in SETTLED or why.endswith(", which must keep its outputs") for why in self.skipped.values())

    def instead(self, groups: Sequence[ChannelGroup], why: str) -> Contest:
        """Return the contest with other groups, and of its own those that cut nothing which the others cut.

        Args:
            groups: The others.
            why: The reason of layers that are in none.
        """
        settled = {name: why for name, why in self.skipped.items() if why in SETTLED}
        none = dataclasses.replace(self, groups=(), scores=(), heads=(), numbered=frozenset(), skipped=settled)
        found = none.joined_by(groups)
        found = found.joined_by(apart(self.groups, groups))
        losing = {f.target for group in (*groups, *found.groups) for f in group.followers if f.side == "out"}
        layers = {name for module, name in module_names(self.root).items() if makes_channels(module)}
        known = self.reasons_outside(losing)
        unknown = {name: why for name in layers - losing if name not in known or "map" in known[name]}
        return dataclasses.replace(found, skipped={**known, **unknown, **found.skipped})

    def reasons_outside(self, losing: Collection[str]) -> dict[str, str]:
        """Return why layers are left alone, of those that are not among the given ones."""
        return {name: why for name, why in self.skipped.items() if name not in losing}

    def without(self, reasons: Mapping[int, str], numbered: frozenset[str]) -> Contest:
        """Return the contest without some groups, given by number with the reason."""
        stay = [number for number in range(len(self.groups)) if number not in reasons]
        left = {self.groups[number].name: f"a removal breaks the model: {why}" for number, why in reasons.items()}
        return dataclasses.replace(
            self,
            groups=tuple(self.groups[n] for n in stay),
            scores=tuple(self.scores[n] for n in stay),
            heads=tuple(self.heads[n] for n in stay),
            numbered=numbered,
            skipped={**self.skipped, **left},
        )


def contest_of(
    root: nn.Module,
    options: Options,
    scores: TaskScores,
    groups: Sequence[ChannelGroup],
    uses: Mapping[str, Fraction | int],
    skipped: Mapping[str, str],
    read: Callable[[], Mapping[str, Collection[str]]],
) -> Contest:
    """Score all groups, or note why they are left alone."""
    sizes, names = parameter_sizes(root)
    named = dict(zip(scores.names, scores.by_parameter(), strict=True))
    joint_uses: dict[str, Fraction | int] = {}
    for name, count in uses.items():
        joint_uses[names[name]] = joint_uses.get(names[name], 0) + count
    return Contest(
        root, options, sizes, names, joint_uses, scores.tasks, named, frozenset(scores.unreached), (), (), (),
        frozenset(), skipped, read,
    ).joined_by(groups)  # fmt: skip


def parameter_sizes(root: nn.Module) -> tuple[dict[str, int], dict[str, str]]:
    """Count every Parameter once, by the first of its names; return the counts, and every name to that name."""
    first: dict[int, str] = {}
    sizes, names = {}, {}
    for name, (module, key) in keys_by_name(root).items():
        parameter = module._parameters[key]
        assert parameter is not None
        names[name] = first.setdefault(id(parameter), name)
        sizes[names[name]] = parameter.numel()
    return sizes, names


def part_of_parameters(contest: Contest) -> dict[str, str]:
    """Name the part of every parameter by the tasks that reach its layer, or else the channels that it follows."""
    by_layer: dict[str, set[str]] = {}
    for name, table in contest.named.items():
        by_layer.setdefault(name.rpartition(".")[0], set()).update(table)
    following: dict[str, set[str]] = {}
    for group, scores in zip(contest.groups, contest.scores, strict=True):
        for piece in group.slices():
            following.setdefault(piece.name, set()).update(scores)
    found = {}
    for name in contest.sizes:
        tasks = by_layer.get(name.rpartition(".")[0], set())
        if not tasks and name not in contest.unreached:
            tasks = following.get(name, set())
        if tasks:
            found[name] = part_of(tasks)
        else:
            found[name] = "unreached" if name in contest.unreached else "not scored"
    return found
