"""Groups for layers that torch-pruning's graph leaves alone, from our own tracing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .._support.example_inputs import Inputs
from ..parameters import module_names
from .adapter.graph import TRACE_ERRORS
from .adapter.observation import call
from .copies import copied
from .groups import FIXED, ChannelGroup
from .tracing import How, traced_groups


@dataclasses.dataclass(frozen=True)
class Spares:
    """Traces copies of a model when it is asked to, in each way once.

    Attributes:
        original: The model; only copies of it run, and every tensor on the way is kept until the end of that.
        inputs: From :func:`as_inputs`.
        losses: Runs the losses too, where they reach layers that the forward does not run.
        kept: Names of layers that keep their outputs, and of bare parameters.
    """

    original: nn.Module
    inputs: Inputs
    losses: Callable[[nn.Module], list[Tensor]] | None
    kept: Collection[str]
    _known: dict[How, tuple[list[ChannelGroup], str]] = dataclasses.field(default_factory=dict)

    def groups(self, how: How) -> tuple[list[ChannelGroup], str]:
        """Return the groups, in terms of the model, and why other layers stay; no group if it cannot be traced.

        Args:
            how: What happens where dimensions are cut and joined.
        """
        if how not in self._known:
            self._known[how] = self._traced(how)
        return self._known[how]

    def _traced(self, how: How) -> tuple[list[ChannelGroup], str]:
        model = copied(self.original)
        back: dict[Any, Any] = dict(zip(model.modules(), self.original.modules(), strict=True))
        back.update(zip(model.parameters(), self.original.parameters(), strict=True))
        back.update(zip(model.buffers(), self.original.buffers(), strict=True))
        stay: list[nn.Module | nn.Parameter] = [m for m, name in module_names(model).items() if name in self.kept]
        stay += [parameter for name, parameter in model.named_parameters() if name in self.kept]

        def forward(model: nn.Module) -> Sequence[Tensor]:
            return call(model, self.inputs)

        try:
            found, unknown = traced_groups(model, [forward, *([self.losses] if self.losses else [])], stay, how)
        except TRACE_ERRORS:
            return [], ""  # each layer keeps the reason that it has
        why = f"meets what cannot be followed: {', '.join(sorted(unknown))}" if unknown else FIXED
        return [group.on(back) for group in found], why


def apart(groups: Sequence[ChannelGroup], others: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """Return the groups that cut no position which one of the others cuts."""
    taken: dict[tuple[str, str, int], set[int]] = {}
    for group in others:
        for follower in group.followers:
            key = (follower.target, follower.side, follower.dim)
            taken.setdefault(key, set()).update(follower.positions.tolist())
    return [group for group in groups if not _meets(group, taken)]


def _meets(group: ChannelGroup, taken: Mapping[tuple[str, str, int], set[int]]) -> bool:
    return any(
        not taken.get((f.target, f.side, f.dim), set()).isdisjoint(f.positions.tolist()) for f in group.followers
    )
