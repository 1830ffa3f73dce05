"""Scores of one model on several groups of batches, to be added up in any combination."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence, Sized

from torch import Tensor, nn

from ..criteria import Criterion
from ..parameters import ParameterKey
from ..scoring.losses import Batch, TaskLosses
from ..scoring.score import score_tasks
from .task_masks import alive_scores


@dataclasses.dataclass(frozen=True)
class ScoreTables:
    """Scores of the alive entries, before any per-layer step, so that sums of them are scores too.

    Attributes:
        tasks: Task names.
        rows: For each parameter, by its qualified name, the scores of each task that reaches it, flat.
    """

    tasks: tuple[str, ...]
    rows: dict[str, dict[str, Tensor]]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        losses: TaskLosses,
        batches: Sequence[Batch],
        rule: Criterion,
        keys: Sequence[ParameterKey] | None,
    ) -> ScoreTables:
        """Score a model on some batches."""
        plain = dataclasses.replace(rule, per_layer=None)
        scores = score_tasks(model, losses, batches, criterion=plain, parameters=keys)
        rows = [dict(row) for row in alive_scores(scores)]
        return cls(scores.tasks, dict(zip(scores.names, rows, strict=True)))

    @classmethod
    def sum(cls, tables: Sequence[ScoreTables]) -> ScoreTables:
        """Add up the scores of several groups of batches; the tables themselves are not changed.

        Scores that do not depend on the data (magnitudes) are added up as well, which does not change their order.
        """
        rows: dict[str, dict[str, Tensor]] = {}
        for table in tables:
            for name, row in table.rows.items():
                total = rows.setdefault(name, {})
                for task, score in row.items():
                    total[task] = total[task] + score if task in total else score
        return cls(tables[0].tasks, rows)


def chunks(data: Iterable[Batch], num_batches: int | None, groups: int) -> Iterator[list[Batch]]:
    """Cut the batches into near-equal groups, holding one group at a time where the number of batches is known."""
    known = num_batches if num_batches is not None else len(data) if isinstance(data, Sized) else None
    source: Iterable[Batch] = data
    if known is None:
        source = list(data)
        known = len(source)
    batches = iter(source)
    groups = min(groups, known)
    for group in range(groups):
        chunk = list(itertools.islice(batches, known * (group + 1) // groups - known * group // groups))
        if not chunk:
            raise ValueError(
                f"num_batches: must be at most the number of batches in data, found {num_batches} with fewer in data"
            )
        yield chunk
