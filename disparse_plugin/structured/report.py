"""What a removal did, and to whom."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .._support.text_table import Table, Tabular
from .contest import part_of_parameters
from .plan import RemovalPlan
from .search import Removal


@dataclasses.dataclass(frozen=True)
class Change:
    """A quantity before and after."""

    before: float
    after: float

    @property
    def removed(self) -> float:
        """Share that is gone."""
        return 1 - self.after / self.before if self.before else 0.0


@dataclasses.dataclass(frozen=True)
class PartChange:
    """Parameters and MACs of one part of the model."""

    parameters: Change
    macs: Change


@dataclasses.dataclass(frozen=True)
class GroupChange:
    """Channels of one group, and the tasks that judged them."""

    channels: Change
    tasks: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class RemovalReport(Tabular):
    """What :func:`~disparse_plugin.structured.remove_channels` did; ``str()`` is a table.

    Attributes:
        of: What the amount was counted in.
        asked: The amount.
        channels: Channels of all groups that could be removed from.
        parameters: Parameters of the whole model.
        macs: Multiplications and additions of convolutions, linear and recurrent layers and the projections of
            ``nn.MultiheadAttention`` for the example inputs, and of Parameters that other modules give as they are to
            ``F.linear`` and ``F.conv*d``. Not counted are products inside attention, element-wise work, other functions
            of weights (``x @ layer.weight.t()``), and what only the losses run.
        parts: ``"shared"`` (reached by two tasks or more), each task's own part by its name, ``"unreached"`` (by any
            task), and ``"not scored"`` (bare parameters in no group).
        groups: Layer name to its change, for every group that could be removed from.
        skipped: Layer name to the reason why its channels were left alone.
        outside: Share of the parameters that follow no group that could be removed from.
        deviation: Largest difference, on the scale of each entry, between outputs and losses after the removal and
            those of the full model with the same channels masked. Below 1e-6 if the removal is right (it is tried in
            double precision where the model runs in that); larger if something computes with the number or the sum
            of its channels.
        latency: Seconds of one forward on the example inputs, before and after, as measured; None unless
            ``of="latency"``.
        plan: The removal as data.
    """

    of: str
    asked: float | Mapping[str, float]
    channels: Change
    parameters: Change
    macs: Change
    parts: Mapping[str, PartChange]
    groups: Mapping[str, GroupChange]
    skipped: Mapping[str, str]
    outside: float
    deviation: float
    plan: RemovalPlan
    latency: Change | None = None

    @property
    def achieved(self) -> float:
        """Share that is gone of what the amount was counted in, which ``of`` says.

        For ``of="channels"`` that is of the channels of groups that could be removed from, not of the whole model.
        """
        return self.counted.removed

    @property
    def counted(self) -> Change:
        """What the amount was counted in, before and after."""
        change: Change = getattr(self, self.of)
        return change

    @property
    def gone(self) -> float:
        """How much is gone of what the amount was counted in."""
        return self.counted.before - self.counted.after

    def save(self, path: str | Path) -> None:
        """Write the removal to a file for :func:`~disparse_plugin.structured.replay_removal`.

        Args:
            path: The file; an existing one is replaced atomically.
        """
        self.plan.save(path)

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat row per part, and the total, of plain values."""
        return [
            {
                "part": name,
                "parameters before": part.parameters.before,
                "parameters": part.parameters.after,
                "MACs before": part.macs.before,
                "MACs": part.macs.after,
            }
            for name, part in self._parts().items()
        ]

    def _parts(self) -> dict[str, PartChange]:
        return {**self.parts, "total": PartChange(self.parameters, self.macs)}

    def _table(self) -> Table:
        """Tabulate what is left, per part, and say what was left alone."""
        warning = "; WARNING: most of the model cannot be removed from" if self.outside > 0.5 else ""
        before = [
            f"removed {self.parameters.removed:.1%} of the parameters and {self.macs.removed:.1%} of the MACs of the "
            "whole model",
            f"{self.outside:.1%} of the parameters follow no channels that could be removed{warning}",
        ]
        rows = [("part", "parameters", "", "left", "MACs", "", "left")]
        rows += [(name, *_cells(part.parameters), *_cells(part.macs)) for name, part in self._parts().items()]
        what = {"channels": "channels that can be removed", "latency": "measured latency"}.get(self.of, self.of)
        after = [
            f"removed {self.achieved:.1%} of the {what}, asked {_asked(self.asked)}; deviation {self.deviation:.1e}"
        ]
        reasons: dict[str, list[str]] = {}
        for layer, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(layer)
        after += [f"left alone ({reason}): {', '.join(layers)}" for reason, layers in reasons.items()]
        return Table(rows, before=before, after=after)


def _asked(amount: float | Mapping[str, float]) -> str:
    if isinstance(amount, Mapping):
        return ", ".join(f"{part} {_asked(one)}" for part, one in amount.items())
    return f"{amount:.1%}" if isinstance(amount, float) else str(amount)


def _cells(change: Change) -> tuple[str, str, str]:
    return f"{change.before:,}", f"{change.after:,}", f"{1 - change.removed:.1%}"


def tally(removal: Removal, asked: float | Mapping[str, float]) -> RemovalReport:
    """Count what a removal changes."""
    contest, choice = removal.contest, removal.choice
    budget, of_parameter = contest.budget(), part_of_parameters(contest)
    left, none = budget.entries(choice), [torch.zeros_like(gone) for gone in choice]
    counts: dict[str, list[int]] = {}
    for name, size in contest.sizes.items():
        own = counts.setdefault(of_parameter[name], [0, 0, 0, 0])
        uses = contest.uses.get(name, 0)
        for place, value in enumerate((size, left[name], int(size * uses), int(left[name] * uses))):
            own[place] += value
    total = [sum(own[place] for own in counts.values()) for place in range(4)]
    groups = {
        group.name: GroupChange(Change(group.size, group.size - int(group.unit_sizes()[gone].sum())), tuple(scores))
        for group, gone, scores in zip(contest.groups, choice, contest.scores, strict=True)
    }
    return RemovalReport(
        of=contest.options.of,
        asked=asked,
        channels=Change(budget.left("channels", none), budget.left("channels", choice)),
        parameters=Change(total[0], total[1]),
        macs=Change(total[2], total[3]),
        parts={name: PartChange(Change(c[0], c[1]), Change(c[2], c[3])) for name, c in counts.items()},
        groups=groups,
        skipped=dict(contest.skipped),
        outside=1 - budget.in_groups() / max(1, total[0]),
        deviation=removal.deviation,
        plan=removal.plan,
        latency=None if removal.seconds is None else Change(*removal.seconds),
    )
