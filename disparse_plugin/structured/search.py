"""The search for what to remove: rank, choose, try; and choose again without the groups that break the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..agreement.budgets import SHARED, check_task_names, part_of
from ..agreement.ranking import ranks
from ..parameters import keys_by_name, module_names, stored
from .budget import choose, chosen, multiples, parts_of, units_to_keep
from .channel_scores import channel_magnitudes
from .contest import Contest, part_of_parameters
from .cuts import Attributes, Cut, merge_cuts
from .groups import ChannelGroup
from .layers import rule_of
from .numbers import counts_heads, heads_left, shrunk_sizes, stored_widths
from .order import interleaved_order, removal_order
from .plan import RemovalPlan
from .spare import Spares, apart
from .tracing import How
from .trial import Trial
from .verdict import culprits, verdict


@dataclasses.dataclass(frozen=True)
class Removal:
    """What a search has found: which units of each group go, the plan, how far that is from masking, and seconds."""

    contest: Contest
    choice: tuple[Tensor, ...]
    plan: RemovalPlan
    deviation: float
    seconds: tuple[float, float] | None = None


def search(contest: Contest, trial: Trial, measure: Callable[[RemovalPlan], float] | None = None) -> Removal:
    """Choose the units, try the removal on a copy, and choose again without the groups that break it.

    Args:
        contest: The groups.
        trial: What to try on.
        measure: What a plan leaves of the quantity asked for, where that is measured; None: it is counted.

    Raises:
        ValueError: If no group is left, or the amount cannot be reached with those that are.
    """
    while (removal := attempt(contest, trial, measure)) is None:
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

        reasons, changed = culprits(trial, plan_of, losing, numbered)
        names = frozenset(contest.groups[number].name for number in changed)
        if not reasons and names == contest.numbered:
            # Each alone is right, and all together are not: the last that was admitted is the one to leave.
            reasons = {losing[-1]: "it goes wrong together with the others"}
        contest = contest.without(reasons, names)
    return removal


def attempt(contest: Contest, trial: Trial, measure: Callable[[RemovalPlan], float] | None = None) -> Removal | None:
    """Choose the units, and try the removal on a copy; return None if it breaks the model.

    Raises:
        ValueError: As :func:`search`.
    """
    if not contest.groups:
        raise ValueError(
            f"model: at least one group of channels must be removable, found none; left alone: {dict(contest.skipped)}"
        )
    choice = chosen_units(contest, measure)
    plan = _plan(contest, choice)
    found = verdict(trial, plan)
    if found.failure is not None:
        return None
    seconds = None if measure is None else (measure(RemovalPlan(())), measure(plan))
    return Removal(contest, tuple(choice), plan, found.deviation, seconds)


def _units_of(group: ChannelGroup) -> tuple[str, tuple[int, ...]]:
    return group.name, tuple(group.units.tolist())


def search_wider(
    contest: Contest,
    trial: Trial,
    spares: Spares,
    measure: Callable[[RemovalPlan], float] | None = None,
) -> Removal:
    """Search; where layers that could lose channels would be left alone, let groups found otherwise take part.

    Args:
        contest: The groups of torch-pruning's graph.
        trial: What to try on.
        spares: Gives those of our own tracing.
        measure: As in :func:`search`.
    """
    removal = _searched_wider(contest, trial, spares, measure)
    return dataclasses.replace(removal, plan=_with_needed_numbers(removal.plan, contest, trial))


def _searched_wider(
    contest: Contest, trial: Trial, spares: Spares, measure: Callable[[RemovalPlan], float] | None
) -> Removal:
    if contest.is_whole and (removal := attempt(contest, trial, measure)) is not None:
        return removal
    ways: tuple[How, ...] = ("width", "tied", "whole heads", "tied heads")
    contests = [contest.instead(*found) if (found := spares.groups(how))[0] else contest for how in ways]
    for other in contests:
        if other.groups and other.is_whole and (removal := attempt(other, trial, measure)) is not None:
            return removal
    try:
        removal = search(contests[0], trial, measure)
    except ValueError:
        removal = search(contest, trial, measure)
    refused = {_units_of(group) for group in contests[0].groups}
    for other in (*contests[1:], contest):
        if removal.contest.is_whole:
            break
        fresh = [group for group in other.groups if _units_of(group) not in refused]
        refused |= {_units_of(group) for group in fresh}
        left = apart(fresh, removal.contest.groups)
        if left and (wider := removal.contest.joined_by(left)).groups != removal.contest.groups:
            removal = search(wider, trial, measure)
    return removal


def _with_needed_numbers(plan: RemovalPlan, contest: Contest, trial: Trial) -> RemovalPlan:
    """Leave numbers that modules hold as they are where the trial goes as well without: they equal a width by chance.

    They are tried by class and attribute, as the blocks of a network are alike.
    """
    modules = {name: module for module, name in module_names(contest.root).items()}
    plain = [name for name in plan.attributes if rule_of(modules[name]) is None]
    doubtful = [(name, key) for name in plain for key in plan.attributes[name] if not counts_heads(key)]
    kinds = dict.fromkeys((type(modules[name]), key) for name, key in doubtful)
    for kind, attribute in kinds:
        left = {
            name: {k: v for k, v in values.items() if not (k == attribute and type(modules[name]) is kind)}
            for name, values in plan.attributes.items()
        }
        fewer = RemovalPlan(plan.cuts, {name: values for name, values in left.items() if values})
        if verdict(trial, fewer).failure is None:
            plan = fewer
    return plan


def _magnitudes(contest: Contest) -> list[Tensor]:
    """Return the magnitude of each unit, of the weights that were scored."""
    keys = keys_by_name(contest.root)
    weights = {name: stored(*keys[name]) for name in contest.named}
    return [group.per_unit(channel_magnitudes(group, weights)) for group in contest.groups]


def chosen_units(contest: Contest, measure: Callable[[RemovalPlan], float] | None = None) -> list[Tensor]:
    """Choose the units that go, for each group a bool vector."""
    options, groups = contest.options, contest.groups
    parts = [parts_of(group) for group in groups]
    keep = [units_to_keep(group, options.ratio_of(group), own) for group, own in zip(groups, parts, strict=True)]
    order = _order(contest, keep, parts)
    round_to = multiples(groups, options.round_to, next(contest.root.parameters()).device)
    if isinstance(options.amount, Mapping):
        return _chosen_by_part(contest, options.amount, keep, order, round_to)
    budget = contest.budget()

    def left(choice: Sequence[Tensor]) -> float:
        return budget.left(options.of, choice) if measure is None else measure(_plan(contest, choice))

    return choose(
        groups, order, keep, left=left, of=options.of, amount=options.amount, round_to=round_to,
        why=lambda: _what_holds(contest), whole=_of_all_steps(contest),
    )  # fmt: skip


def _of_all_steps(contest: Contest, part: str | None = None) -> float | None:
    """Return the amount of all steps where the first tells whether it is within reach; None where it does not.

    Channels that go together now may go apart later, when a convolution has become depthwise.
    """
    whole = contest.options.whole
    if isinstance(whole, Mapping):
        whole = None if part is None else whole[part]
    alone = all(group.num_units == group.size for group in contest.groups)
    return whole if alone or contest.options.max_pruning_ratio < 1 else None


def _order(contest: Contest, keep: Sequence[int], parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Put all units in the order of their removal."""
    groups, magnitudes = contest.groups, _magnitudes(contest)

    def order_of(members: Sequence[int]) -> list[Tensor]:
        scores, least = [contest.scores[n] for n in members], [keep[n] for n in members]
        weights, own = [magnitudes[n] for n in members], [parts[n] for n in members]
        return removal_order(scores, least, contest.tasks, contest.options.rule, weights, own)

    if not contest.options.isomorphic:
        return order_of(range(len(groups)))
    return interleaved_order([group.kind for group in groups], order_of, [group.num_units for group in groups])


def _chosen_by_part(
    contest: Contest,
    amounts: Mapping[str, float],
    keep: Sequence[int],
    order: Sequence[Tensor],
    round_to: Sequence[int],
) -> list[Tensor]:
    """Choose in each part for itself, in the order of all; the shared part first, as it is what the others read."""
    check_task_names(contest.tasks)
    options, groups, budget = contest.options, contest.groups, contest.budget()
    none = [torch.zeros(group.num_units, dtype=torch.bool) for group in groups]
    choice = list(none)
    of_group = [part_of(scores) for scores in contest.scores]
    of_parameter = part_of_parameters(contest)
    for part in sorted(amounts, key=lambda name: name != SHARED):
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
                return sum(budget.channels(n, whole[n]) for n in members)
            return budget.left(options.of, whole, inside)

        found = choose(
            own, places, [keep[n] for n in members], left=left, of=options.of, amount=amounts[part],
            round_to=[round_to[n] for n in members], why=lambda: _what_holds(contest), what=f"amount[{part!r}]",
            total=full, whole=_of_all_steps(contest, part),
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
    limits = [f"max_pruning_ratio={limit}"] if limit < 1 else []
    if _rounding_holds(contest):
        limits.append(f"round_to={contest.options.round_to!r}")
    return "; ".join([*limits, *held]) or "one channel of each layer"


def _rounding_holds(contest: Contest) -> bool:
    """Tell whether some group could lose more if what stays of it were not a multiple."""
    options, groups = contest.options, contest.groups
    if options.round_to is None:
        return False
    keep = [units_to_keep(group, options.ratio_of(group), parts_of(group)) for group in groups]
    order = [torch.arange(group.num_units) for group in groups]
    rounded = multiples(groups, options.round_to, next(contest.root.parameters()).device)
    most = max(group.num_units for group in groups)
    fewer, more = (chosen(groups, order, keep, most, each) for each in (rounded, [1] * len(groups)))
    return any(not torch.equal(one, other) for one, other in zip(fewer, more, strict=True))


def removal_plan(
    contest: Contest, choice: Sequence[Tensor], groups: Sequence[int], numbered: frozenset[int]
) -> RemovalPlan:
    """Make the plan that removes the chosen units of some groups."""
    cuts: list[Cut] = []
    known = [(contest.groups[n], choice[n][contest.groups[n].units]) for n in groups if n in numbered]
    attributes = _read_ones(contest, shrunk_sizes(contest.root, known))
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
            left = heads_left(contest.root, heads, group.size, group.size - int(gone.sum()))
            found.append(_read_ones(contest, left, besides=counts_heads))
        if number in numbered and not group.sizes:
            found.append(_read_ones(contest, stored_widths(contest.root, merge_cuts(own))))
        for change in found:
            for name, values in change.items():
                attributes.setdefault(name, {}).update(values)
    return RemovalPlan(merge_cuts(cuts), attributes)


def _read_ones(
    contest: Contest, attributes: Attributes, besides: Callable[[str], bool] = lambda _: False
) -> dict[str, dict[str, Any]]:
    """Leave out the numbers that no forward reads, but for those of layers: that they equal a width may be chance."""
    if not attributes:
        return {}
    read, layers = contest.read(), {name for module, name in module_names(contest.root).items() if rule_of(module)}
    found = {
        name: {key: value for key, value in values.items() if name in layers or key in read[name] or besides(key)}
        for name, values in attributes.items()
    }
    return {name: values for name, values in found.items() if values}
