"""Each task's own mask: what the task would keep if the network served it alone (B_kc of the paper).

There are two ways to say how much that is, and they differ because a union of masks is larger than each of them:

``"per_task"``
    Every task removes ``amount`` of the weights that *it* uses: the authors' procedure, with keep ratio
    ``rho = 1 - amount``. The union of these masks is a unanimous mask, but a denser one than ``amount`` asks for.
``"union"``
    All tasks share the one keep ratio at which the union of their masks removes exactly ``amount`` of all weights: the
    masks behind ``TaskScores.masks(amount)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from .. import arbiters
from .._support.user_warning import warn_user
from ..agreement.amounts import check_amount, count_to_prune, warn_of_percentage
from ..agreement.candidates import Candidates
from ..agreement.patterns import Place, spread
from ..agreement.percentiles import percentiles_of
from ..agreement.ranking import lowest
from ..agreement.ways import lowest_by_agreement
from ..kinds import check_flag
from ..parameters import ParameterKey
from ..scoring.given import check_scores
from ..scoring.task_scores import TaskScores

# What an amount is meant of; the option is called cut.
AmountOf: TypeAlias = Literal["per_task", "union"]

# For each parameter, which alive entries each task that reaches it keeps: bool, 1-D.
AliveMasks: TypeAlias = Sequence[dict[str, Tensor]]


def own_masks(
    scores: TaskScores, amount: float, *, cut: AmountOf = "per_task", as_scored: bool | None = None
) -> dict[str, dict[ParameterKey, Tensor]]:
    """Return what each task would keep on its own.

    Args:
        scores: The scores.
        amount: How much is removed, of the alive entries: a fraction (float in [0, 1]) or a count (int).
        cut: ``"per_task"``: each task removes ``amount`` of what it uses. ``"union"``: one keep ratio for all tasks,
            such that the union of the masks removes exactly ``amount`` of all.
        as_scored: True: all entries count, whatever masks the model carries now. False: those alive now. By default
            those alive now, with a warning if the model carries masks: who pruned with these scores may mean True.

    Returns:
        For each task, and each pair that it reaches, a bool tensor of the weight's shape; True = keep. Entries
        left out are False. Ties as in :mod:`disparse_plugin.agreement.ranking`.

    Raises:
        TypeError: If ``amount`` is neither int nor float.
        ValueError: If ``amount`` is out of range or ``cut`` is unknown.

    Example:
        >>> layer = torch.nn.Linear(4, 1)
        >>> a, b = torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.tensor([[4.0, 1.0, 2.0, 3.0]])
        >>> scores = TaskScores(layer, {"a": {(layer, "weight"): a}, "b": {(layer, "weight"): b}})
        >>> [masks[layer, "weight"].int().tolist() for masks in own_masks(scores, 0.5).values()]
        [[[1, 1, 0, 0]], [[1, 0, 0, 1]]]
    """
    places = counted(scores, as_scored)
    candidates = scores.candidates(places=places)
    warn_of_percentage(amount, sum(candidates.sizes))
    masks = alive_masks(candidates, scores.tasks, amount, cut)
    return {
        task: {
            key: spread(row[task], place)
            for key, place, row in zip(scores.parameters, places, masks, strict=True)
            if task in row
        }
        for task in scores.tasks
    }


def counted(scores: TaskScores, as_scored: bool | None) -> list[Place]:
    """Return which entries of each parameter count; see :func:`own_masks`."""
    check_scores(scores)
    if as_scored is not None:
        check_flag("as_scored", as_scored, otherwise=" or None")
    places = scores.places()
    if as_scored:
        return [dataclasses.replace(place, alive=None) for place in places]
    masked = sum(place.alive is not None for place in places)
    if masked and as_scored is None:
        warn_user(
            f"scores: {masked} of {len(places)} parameters carry masks, so only weights alive now are compared; "
            "say as_scored=True to compare all as they were scored, or as_scored=False to mean this",
        )
    return places


def alive_masks(candidates: Candidates, tasks: Sequence[str], amount: float, cut: AmountOf) -> AliveMasks:
    """Return what each task would keep on its own, as :func:`own_masks`, for the alive entries alone."""
    check_amount(amount)
    if cut == "per_task":
        by_task = {
            task: candidates.over_task(task, lambda values, magnitudes: _top(values, magnitudes, amount))
            for task in tasks
        }
    elif cut == "union":
        by_task = _tops_with_union(candidates, tasks, amount)
    else:
        raise ValueError(f"cut: must be 'per_task' or 'union', found {cut!r}")
    rows = enumerate(candidates.scores)
    return [{task: by_task[task][index] for task in tasks if task in row} for index, row in rows]


def _top(values: Tensor, magnitudes: Tensor | None, amount: float) -> Tensor:
    return ~lowest(values, count_to_prune(amount, values.numel()), magnitudes)


def _tops_with_union(candidates: Candidates, tasks: Sequence[str], amount: float) -> dict[str, dict[int, Tensor]]:
    """Find the tasks' top sets whose union is exactly the unanimous mask.

    The unanimous mask removes a weight if its largest percentile is at most some ``c``. A task's own part of what stays
    is then what it ranks at ``c`` or above; at ``c`` itself ties between tasks were broken, so it must have stayed too.
    """
    count = count_to_prune(amount, sum(candidates.sizes))
    pruned = lowest_by_agreement(candidates, tasks, arbiters.unanimous, count)
    percentiles = {task: percentiles_of(candidates, task) for task in tasks}
    removed = [
        values[pruned[index]].max()
        for parts in percentiles.values()
        for index, values in parts.items()
        if bool(pruned[index].any())
    ]
    border = max((float(value) for value in removed), default=-torch.inf)
    return {
        task: {index: (values >= border) & ~pruned[index] for index, values in parts.items()}
        for task, parts in percentiles.items()
    }
