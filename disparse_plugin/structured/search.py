"""The search for what to remove: rank, choose, try; and choose again without the groups that break the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..agreement.ranking import ranks
from ..parameters import keys_by_name, stored
from ..scoring.task_scores import TaskScores
from .applying import Pruners
from .budget import Budget, Quantity, choose, multiples, units_to_keep
from .cuts import Attributes, Cut, merge_cuts
from .groups import ChannelGroup, channel_magnitudes, channel_scores, normalized
from .numbers import WholeHeads, heads_left, stored_widths, whole_heads
from .order import ChannelRule, removal_order
from .plan import RemovalPlan
from .trial import Trial, culprits, verdict


@dataclasses.dataclass(frozen=True)
class Options:
    """How much of what goes, and by which rule; checked once by :func:`remove_channels`."""

    amount: float | Mapping[str, float]
    of: Quantity
    rule: ChannelRule
    reduction: str
    normalizer: str | None
    max_pruning_ratio: float
    round_to: int | Literal["auto"] | None
    customized_pruners: Pruners | None


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
    """

    root: nn.Module
    options: Options
    sizes: Mapping[str, int]
    names: Mapping[str, str]
    uses: Mapping[str, int]
    tasks: tuple[str, ...]
    named: Mapping[str, Mapping[str, Tensor]]
    unreached: frozenset[str]
    groups: tuple[ChannelGroup, ...]
    scores: tuple[Mapping[str, Tensor], ...]
    heads: tuple[WholeHeads | None, ...]
    numbered: frozenset[str]
    skipped: Mapping[str, str]

    def budget(self) -> Budget:
        """Return the counts of what is left after some units are gone."""
        return Budget(self.groups, self.sizes, self.uses, self.names)

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


@dataclasses.dataclass(frozen=True)
class Removal:
    """What a search has found: which units of each group go, the plan, how far that is from masking, and seconds."""

    contest: Contest
    choice: tuple[Tensor, ...]
    plan: RemovalPlan
    deviation: float
    seconds: tuple[float, float] | None = None


def contest_of(
    root: nn.Module,
    options: Options,
    scores: TaskScores,
    groups: Sequence[ChannelGroup],
    uses: Mapping[str, int],
    skipped: Mapping[str, str],
) -> Contest:
    """Score all groups, or note why they are left alone."""
    sizes, names = parameter_sizes(root)
    named = {
        name: {task: scores[task][key] for task in scores.tasks_reaching(*key)}
        for key, name in zip(scores.parameters, scores.names, strict=True)
    }
    admitted: list[tuple[ChannelGroup, dict[str, Tensor], WholeHeads | None]] = []
    reasons = dict(skipped)
    for group in groups:
        heads = whole_heads(root, group)
        if heads is not None:
            group = dataclasses.replace(group, units=torch.arange(group.size) // heads.width)
        by_task = channel_scores(group, named, options.reduction)
        if group.num_units < 2:
            reasons[group.name] = "all its channels go together"
        elif not by_task:
            reasons[group.name] = "reached by no task"
        else:
            per_unit = {task: group.per_unit(normalized(v, options.normalizer)) for task, v in by_task.items()}
            admitted.append((group, per_unit, heads))
    joint_uses: dict[str, int] = {}
    for name, count in uses.items():
        joint_uses[names[name]] = joint_uses.get(names[name], 0) + count
    first, second, third = zip(*admitted, strict=True) if admitted else ((), (), ())
    return Contest(
        root, options, sizes, names, joint_uses, scores.tasks, named, frozenset(scores.unreached), first, second, third,
        frozenset(), reasons,
    )  # fmt: skip


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


def search(contest: Contest, trial: Trial, measure: Callable[[RemovalPlan], float] | None = None) -> Removal:
    """Choose the units, try the removal on a copy, and choose again without the groups that break it.

    Args:
        contest: The groups.
        trial: What to try on.
        measure: What a plan leaves of the quantity asked for, where that is measured; None: it is counted.

    Raises:
        ValueError: If no group is left, or the amount cannot be reached with those that are.
    """
    while True:
        if not contest.groups:
            raise ValueError(
                "model: at least one group of channels must be removable, found none; left alone: "
                f"{dict(contest.skipped)}"
            )
        choice = chosen_units(contest, measure)
        losing = [number for number, gone in enumerate(choice) if bool(gone.any())]
        numbered = frozenset(n for n, group in enumerate(contest.groups) if group.name in contest.numbered)

        def plan_of(
            groups: Sequence[int],
            numbered: frozenset[int],
            contest: Contest = contest,
            choice: Sequence[Tensor] = choice,
        ) -> RemovalPlan:
            return removal_plan(contest, choice, groups, numbered)

        plan = plan_of(losing, numbered)
        found = verdict(trial, plan)
        if found.failure is None:
            seconds = None if measure is None else (measure(RemovalPlan(())), measure(plan))
            return Removal(contest, tuple(choice), plan, found.deviation, seconds)
        reasons, changed = culprits(trial, plan_of, losing, numbered)
        names = frozenset(contest.groups[number].name for number in changed)
        if not reasons and names == contest.numbered:
            # Each alone is right, and all together are not: the last that was admitted is the one to leave.
            reasons = {losing[-1]: found.failure}
        contest = contest.without(reasons, contest.numbered | names)


def _magnitudes(contest: Contest) -> list[Tensor]:
    """Return the magnitude of each unit, of the weights that were scored."""
    keys = keys_by_name(contest.root)
    weights = {name: stored(*keys[name]) for name in contest.named}
    return [group.per_unit(channel_magnitudes(group, weights)) for group in contest.groups]


def chosen_units(contest: Contest, measure: Callable[[RemovalPlan], float] | None = None) -> list[Tensor]:
    """Choose the units that go, for each group a bool vector."""
    options, groups = contest.options, contest.groups
    keep = [units_to_keep(group, options.max_pruning_ratio) for group in groups]
    order = removal_order(contest.scores, keep, contest.tasks, options.rule, _magnitudes(contest))
    round_to = multiples(groups, options.round_to, next(contest.root.parameters()).device)
    if isinstance(options.amount, Mapping):
        return _chosen_by_part(contest, options.amount, keep, order, round_to)
    budget = contest.budget()

    def left(choice: Sequence[Tensor]) -> float:
        return budget.left(options.of, choice) if measure is None else measure(_plan(contest, choice))

    return choose(
        groups, order, keep, left=left, of=options.of, amount=options.amount, round_to=round_to,
        why=_what_holds(contest),
    )  # fmt: skip


def _chosen_by_part(
    contest: Contest,
    amounts: Mapping[str, float],
    keep: Sequence[int],
    order: Sequence[Tensor],
    round_to: Sequence[int],
) -> list[Tensor]:
    """Choose in each part for itself, in the order of all; the shared part first, as it is what the others read."""
    options, groups, budget = contest.options, contest.groups, contest.budget()
    none = [torch.zeros(group.num_units, dtype=torch.bool) for group in groups]
    choice = list(none)
    of_group = [next(iter(scores)) if len(scores) == 1 else "shared" for scores in contest.scores]
    of_parameter = parts(contest)
    for part in sorted(amounts, key=lambda name: name != "shared"):
        members = [number for number, other in enumerate(of_group) if other == part]
        if not members:
            raise ValueError(
                f"amount: every part must have channels that can be removed, found none in {part!r}; there are "
                f"{', '.join(sorted(set(of_group)))}"
            )
        own = [groups[n] for n in members]
        places = ranks(torch.cat([order[n] for n in members])).double().split([group.num_units for group in own])
        inside = {name for name, other in of_parameter.items() if other == part}

        full = budget.left(options.of, none, inside) if options.of != "channels" else None

        def left(chosen: Sequence[Tensor], members: list[int] = members, inside: set[str] = inside) -> float:
            whole = list(choice)
            for number, gone in zip(members, chosen, strict=True):
                whole[number] = gone
            if options.of == "channels":
                return sum(int(groups[n].unit_sizes()[~whole[n]].sum()) for n in members)
            return budget.left(options.of, whole, inside)

        found = choose(
            own, places, [keep[n] for n in members], left=left, of=options.of, amount=amounts[part],
            round_to=[round_to[n] for n in members], why=_what_holds(contest), what=f"amount[{part!r}]", total=full,
        )  # fmt: skip
        for number, gone in zip(members, found, strict=True):
            choice[number] = gone
    return choice


def _plan(contest: Contest, choice: Sequence[Tensor]) -> RemovalPlan:
    numbered = frozenset(n for n, group in enumerate(contest.groups) if group.name in contest.numbered)
    losing = [number for number, gone in enumerate(choice) if bool(gone.any())]
    return removal_plan(contest, choice, losing, numbered)


def _what_holds(contest: Contest) -> str:
    """Say what keeps a removal from going further."""
    reasons: dict[str, list[str]] = {}
    for layer, reason in contest.skipped.items():
        reasons.setdefault(reason, []).append(layer)
    held = [f"{', '.join(layers)} ({reason})" for reason, layers in reasons.items()]
    limit = contest.options.max_pruning_ratio
    return "; ".join([*held, *([f"max_pruning_ratio={limit}"] if limit < 1 else [])]) or "one channel of each layer"


def removal_plan(
    contest: Contest, choice: Sequence[Tensor], groups: Sequence[int], numbered: frozenset[int]
) -> RemovalPlan:
    """Make the plan that removes the chosen units of some groups."""
    cuts: list[Cut] = []
    attributes: dict[str, dict[str, object]] = {}
    for number in groups:
        group, heads = contest.groups[number], contest.heads[number]
        gone = choice[number][group.units]
        own = []
        for follower in group.followers:
            positions = follower.positions[gone[follower.channels]]
            if positions.numel():
                own.append(Cut(follower.target, follower.side, follower.dim, follower.count, positions))
        cuts += own
        found: list[Attributes] = []
        if heads is not None:
            found.append(heads_left(contest.root, heads, group.size, group.size - int(gone.sum())))
        if number in numbered:
            found.append(stored_widths(contest.root, merge_cuts(own)))
        for change in found:
            for name, values in change.items():
                attributes.setdefault(name, {}).update(values)
    return RemovalPlan(merge_cuts(cuts), attributes)


def parts(contest: Contest) -> dict[str, str]:
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
        if len(tasks) == 1:
            found[name] = next(iter(tasks))
        else:
            found[name] = "shared" if tasks else "unreached" if name in contest.unreached else "not scored"
    return found
