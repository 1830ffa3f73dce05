"""What a removal did, and to whom."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from .._support.text_table import draw
from .plan import RemovalPlan


@dataclasses.dataclass(frozen=True)
class Change:
    """A quantity before and after."""

    before: int
    after: int

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
class RemovalReport:
    """What :func:`~disparse_plugin.structured.remove_channels` did; ``str()`` is a table.

    Attributes:
        of: What the amount was counted in.
        asked: The amount.
        channels: Channels of all groups that could be removed from.
        parameters: Parameters of the whole model.
        macs: Multiplications and additions of convolutions and linear layers for the example inputs. Products inside
            attention and element-wise work are not counted.
        parts: ``"shared"`` (reached by two tasks or more), each task's own part by its name, ``"unreached"`` (by any
            task), and ``"not scored"`` (bare parameters in no group).
        groups: Layer name to its change, for every group that could be removed from.
        skipped: Layer name to the reason why its channels were left alone.
        deviation: Largest difference, relative to the size of the output, between the outputs after the removal and
            those of the full model with the same channels masked. Near 1e-6 in float32 if the removal is right; larger
            if a layer computes with the number or the mean of its channels (as GlobalResponseNorm does).
        plan: The removal as data.
    """

    of: str
    asked: float
    channels: Change
    parameters: Change
    macs: Change
    parts: Mapping[str, PartChange]
    groups: Mapping[str, GroupChange]
    skipped: Mapping[str, str]
    deviation: float
    plan: RemovalPlan

    @property
    def achieved(self) -> float:
        """Share that is gone of what the amount was counted in."""
        change: Change = getattr(self, self.of)
        return change.removed

    def save(self, path: str | Path) -> None:
        """Write the removal to a file for :func:`~disparse_plugin.structured.replay_removal`.

        Args:
            path: The file; an existing one is replaced atomically.
        """
        self.plan.save(path)

    def __str__(self) -> str:
        """Tabulate what is left, per part, and say what was left alone."""
        rows = [("part", "parameters", "", "left", "MACs", "", "left")]
        parts = {**self.parts, "total": PartChange(self.parameters, self.macs)}
        for name, part in parts.items():
            rows.append((name, *_cells(part.parameters), *_cells(part.macs)))
        lines = [draw(rows)]
        asked = f"{self.asked:.1%}" if isinstance(self.asked, float) else str(self.asked)
        lines.append(f"removed {self.achieved:.1%} of {self.of}, asked {asked}; deviation {self.deviation:.1e}")
        reasons: dict[str, list[str]] = {}
        for layer, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(layer)
        lines += [f"left alone ({reason}): {', '.join(layers)}" for reason, layers in reasons.items()]
        return "\n".join(lines)


def _cells(change: Change) -> tuple[str, str, str]:
    return f"{change.before:,}", f"{change.after:,}", f"{1 - change.removed:.1%}"
