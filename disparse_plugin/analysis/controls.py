"""What an observed overlap is compared with: null models below, the ceiling above.

Scores come from a sample of batches, so even one task scored twice on different batches does not choose the same
weights. Agreement *between* tasks has to be read against that, and on the same footing: each side scored on its own
half of the data. The observed overlap of :func:`~disparse_plugin.analysis.task_overlap` is not on that footing, because
all tasks there see the same pictures in the same forward.

===============  ===================================================================================================
observed         tasks against each other, all data
chance           independent masks of the same densities, by formula
permuted         as observed, with the labels permuted between samples: what is left is architecture and inputs
across           tasks against each other, one on one half of the data, the other on the other half
ceiling          each task against itself, one half against the other
===============  ===================================================================================================

For identical tasks, across equals the ceiling.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from .measures import Overlap, plain, together

# Below this kappa a task does not even agree with itself on other data, and nothing can be said about two tasks.
LOWEST_CEILING = 0.1


@dataclasses.dataclass(frozen=True)
class Controls:
    """What an overlap is compared with; see the table in :mod:`disparse_plugin.analysis.controls`.

    Attributes:
        permuted: The analysis with permuted labels.
        across: For each shared layer, all pairs of tasks across halves, every pair and direction a stratum of its own.
        ceiling: For each shared layer, every task against itself, every task a stratum of its own.
        resamples: For each resample of the batches, :meth:`relative_agreement` per shared layer.
    """

    permuted: tuple[Overlap, ...]
    across: tuple[Overlap, ...]
    ceiling: tuple[Overlap, ...]
    resamples: tuple[tuple[float, ...], ...] = ()

    def profiles(self) -> tuple[tuple[Overlap, ...], tuple[Overlap, ...], tuple[Overlap, ...]]:
        """Return permuted, across and ceiling, each for every shared layer and at last for the trunk."""
        permuted, across, ceiling = (
            (*layers, together("trunk", layers)) for layers in (self.permuted, self.across, self.ceiling)
        )
        return permuted, across, ceiling

    def relative_agreement(self) -> tuple[float, ...]:
        """Return, per shared layer, kappa across halves over the ceiling; NaN where the ceiling is too low to tell."""
        return tuple(_relative(across, ceiling) for across, ceiling in zip(self.across, self.ceiling, strict=True))

    @property
    def permuted_trunk(self) -> Overlap:
        """All shared layers with permuted labels, together."""
        return together("trunk", self.permuted)

    @property
    def across_trunk(self) -> Overlap:
        """All shared layers, tasks against each other across halves, together."""
        return together("trunk", self.across)

    def ceiling_of(self, task: str) -> Overlap:
        """Return one task against itself, in all shared layers that it reaches."""
        strata = (stratum for layer in self.ceiling for stratum in layer.strata if next(iter(stratum.kept)) == task)
        return Overlap("trunk", tuple(strata))

    def select(self, places: Sequence[int]) -> Controls:
        """Return the controls of some of the shared layers."""
        permuted, across, ceiling = (
            tuple(layers[place] for place in places) for layers in (self.permuted, self.across, self.ceiling)
        )
        resamples = tuple(tuple(profile[place] for place in places) for profile in self.resamples)
        return Controls(permuted, across, ceiling, resamples)

    def add_to(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Add the controls' kappas to the rows of an overlap, where they hold for all tasks together."""
        values = {
            layers[0].name: {
                f"{control} kappa": None if math.isnan(layer.kappa) else layer.kappa
                for control, layer in zip(("permuted", "across", "ceiling"), layers, strict=True)
            }
            for layers in zip(*self.profiles(), strict=True)
        }
        seen: set[str] = set()
        result = []
        for row in rows:
            result.append(row if row["name"] in seen else {**row, **values[row["name"]]})
            seen.add(row["name"])
        return result

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON; what is undefined is None."""
        named = zip(("permuted", "across", "ceiling"), self.profiles(), strict=True)
        return {
            **{control: [_summary(layer) for layer in layers] for control, layers in named},
            "relative_agreement": [plain(value) for value in self.relative_agreement()],
            "resamples": [[plain(value) for value in profile] for profile in self.resamples],
        }


def _relative(across: Overlap, ceiling: Overlap) -> float:
    limit = ceiling.kappa
    return across.kappa / limit if limit >= LOWEST_CEILING else math.nan


def _summary(layer: Overlap) -> dict[str, Any]:
    return {
        "name": layer.name,
        "iou": plain(layer.iou),
        "chance_iou": plain(layer.chance_iou),
        "kappa": plain(layer.kappa),
    }
