"""Removing in several steps: how much each takes, and one report of all."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import nn

from ..agreement.budgets import part_of
from ..parameters import module_names
from .cuts import Cut
from .layer_rule import Side
from .layers import has_own_inputs, rule_of
from .plan import RemovalPlan
from .report import Change, GroupChange, PartChange, RemovalReport


def amount_of_step(
    amount: float | Mapping[str, float], share: float, report: RemovalReport | None
) -> float | Mapping[str, float]:
    """Return what to remove of the present model, so that ``share`` of the amount is gone of the model at first.

    Args:
        amount: What is asked in all: a fraction or a number, or one for each part.
        share: How much of that is to be gone after this step.
        report: Of the steps before.

    Returns:
        As ``amount``, of the present model; parts from which nothing is to go any more are left out.
    """
    if report is None:
        if isinstance(amount, Mapping):
            return {part: _first(one, share) for part, one in amount.items()}
        return _first(amount, share)
    whole = report.of == "channels"
    if not isinstance(amount, Mapping):
        return _rest(amount, share, report.counted, of_channels=whole)
    rest = {part: _rest(one, share, _counted(report, part), of_channels=whole) for part, one in amount.items()}
    return {part: one for part, one in rest.items() if one}


def _first(amount: float, share: float) -> float:
    return round(share * amount) if isinstance(amount, numbers.Integral) else share * float(amount)


def _rest(amount: float, share: float, counted: Change, *, of_channels: bool) -> float:
    if isinstance(amount, numbers.Integral) or of_channels:  # in whole numbers, so that no rounding adds up
        wanted = amount if isinstance(amount, numbers.Integral) else float(amount) * counted.before
        return max(0, round(share * wanted) - round(counted.before - counted.after))
    left = (1 - share * float(amount)) * counted.before
    return min(1.0, max(0.0, 1 - left / max(counted.after, 1e-12)))


def _counted(report: RemovalReport, part: str) -> Change:
    """Return what the amount of a part was counted in."""
    if report.of != "channels":
        change: Change = getattr(report.parts[part], report.of)
        return change
    own = [group.channels for group in report.groups.values() if part_of(group.tasks) == part]
    return Change(sum(c.before for c in own), sum(c.after for c in own))


def joined(first: RemovalReport, later: RemovalReport, roots: Iterable[tuple[str, Side]]) -> RemovalReport:
    """Make one report of two removals, the later one of the smaller model.

    Args:
        first: Of the first.
        later: Of the later one.
        roots: The layer and the side in which each group of the first counts its channels.
    """
    sides = dict(roots)
    # A layer may be in another part than at first, as one is that the batches of the later step did not run.
    none = PartChange(Change(0, 0), Change(0, 0))
    pairs = {
        name: (first.parts.get(name, none), later.parts.get(name, none)) for name in {**first.parts, **later.parts}
    }
    parts = {
        name: PartChange(Change(one.parameters.before, two.parameters.after), Change(one.macs.before, two.macs.after))
        for name, (one, two) in pairs.items()
    }
    groups = {name: _after(change, (name, sides[name]), later) for name, change in first.groups.items()}
    for name, change in later.groups.items():
        before = first.groups[name].channels.before if name in first.groups else change.channels.before
        groups[name] = GroupChange(Change(before, change.channels.after), change.tasks)
    channels = [change.channels for change in groups.values()]
    return dataclasses.replace(
        later,
        channels=Change(sum(c.before for c in channels), sum(c.after for c in channels)),
        parameters=Change(first.parameters.before, later.parameters.after),
        macs=Change(first.macs.before, later.macs.after),
        parts=parts,
        groups=groups,
        outside=first.outside,
        deviation=max(first.deviation, later.deviation),
        plan=first.plan.then(later.plan),
        latency=Change(first.latency.before, later.latency.after) if first.latency and later.latency else None,
    )


def _after(change: GroupChange, root: tuple[str, Side], later: RemovalReport) -> GroupChange:
    """Return a group's change where its layer went on losing channels, maybe with those of another one."""
    gone = sum(len(cut.positions) for cut in later.plan.cuts if (cut.target, cut.side) == root)
    return dataclasses.replace(change, channels=Change(change.channels.before, change.channels.after - gone))


def naming_inputs(plan: RemovalPlan, root: nn.Module, apart: Collection[nn.Module]) -> RemovalPlan:
    """Name what layers lose on their inputs too, where that goes without saying now and did not at first.

    A grouped convolution that one channel is left of in each group has its inputs with its outputs from then on. In
    the numbering of the full model, both must be said.

    Args:
        plan: A removal of the present model.
        root: The present model.
        apart: Its layers that could lose outputs and inputs apart at first.
    """
    modules = {name: module for module, name in module_names(root).items()}
    cuts = list(plan.cuts)
    for cut in plan.cuts:
        layer = modules.get(cut.target)
        if layer is not None and cut.side == "out" and layer in apart and not has_own_inputs(layer):
            rule = rule_of(layer)
            assert rule is not None
            count = rule.count(layer, "in")
            assert count is not None
            lost = torch.zeros(cut.count, dtype=torch.bool).index_fill(0, cut.positions, True)
            cuts.append(Cut(cut.target, "in", -1, count, lost.view(count, -1).all(1).nonzero().flatten()))
    return dataclasses.replace(plan, cuts=tuple(cuts))
