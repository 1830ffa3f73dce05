"""The sub-networks of single tasks inside the masks of all."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from ..agreement.candidates import Candidates, first_of
from ..agreement.percentiles import agreement
from ..arbiters import unanimous
from ..kinds import check_kind
from ..parameters import ParameterKey, alive_mask, qualified_names, stored
from ..scoring.given import check_scores
from ..scoring.task_scores import TaskScores


def keep_tasks(model: nn.Module, scores: TaskScores, tasks: Collection[str]) -> dict[ParameterKey, Tensor]:
    """Return masks that drop what only other tasks need: the sub-network of some of the tasks.

    Where the model carries masks cut from these scores by the unanimous rule, an entry stays if it is alive and one of
    the chosen tasks ranks it above the cut; that is the union of the chosen tasks' own masks. In a model that is not
    pruned, everything stays that the chosen tasks reach.

    Args:
        model: The model that the scores belong to; not changed.
        scores: Its scores.
        tasks: Names of the tasks to keep.

    Returns:
        bool tensors for each pair of ``scores.parameters``, for :func:`attach_masks`.

    Raises:
        ValueError: If ``tasks`` is empty or holds an unknown name, the weights are sharded, or the masks of the model
            were not cut from these scores by the unanimous rule.

    Example:
        >>> from disparse_plugin import score_tasks
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.trunk, self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 1), nn.Linear(3, 1)
        >>> def losses(net, x):
        ...     return {"a": net.a(net.trunk(x)).mean(), "b": net.b(net.trunk(x)).mean()}
        >>> net = Net()
        >>> masks = keep_tasks(net, score_tasks(net, losses, [torch.ones(1, 3)]), ["a"])
        >>> bool(masks[net.trunk, "weight"].all()), bool(masks[net.b, "weight"].any())
        (True, False)
    """
    check_scores(scores)
    check_kind("tasks", tasks, Collection, "a list of task names")
    unknown = sorted(map(str, set(tasks) - set(scores.tasks)))
    if unknown or not tasks:
        raise ValueError(f"tasks: must be some of {', '.join(scores.tasks)}, found {', '.join(unknown) or 'none'}")
    qualified_names(model, scores.parameters)
    scores.check_whole()
    chosen = [scores.tasks.index(task) for task in tasks]
    flat = [{task: score.reshape(-1) for task, score in rows.items()} for rows in scores.by_parameter()]
    alive = [
        torch.ones_like(first_of(rows), dtype=torch.bool) if (mask := alive_mask(*key)) is None else mask.reshape(-1)
        for key, rows in zip(scores.parameters, flat, strict=True)
    ]
    candidates = Candidates(flat, [stored(*key).detach().reshape(-1) for key in scores.parameters])
    cut, misfit = _cut_of(candidates, scores, alive)
    if misfit is not None:
        # Weights that were trained since then break ties otherwise: of equal scores those that are pruned went first.
        candidates = Candidates(flat, [mask.to(first_of(rows)) for mask, rows in zip(alive, flat, strict=True)])
        cut, misfit = _cut_of(candidates, scores, alive)
    if misfit is not None:
        raise ValueError(
            f"scores: must be those that the model was pruned with by the unanimous rule, found that {misfit} keeps "
            "weights which they rank below others that are pruned; prune with arbiter='unanimous' (the default for "
            "trained networks adds up shares, where no task has a mask of its own)"
        )
    # Unreached is NaN, which the maximum passes over; where none of the chosen tasks reaches, nothing is above the cut.
    ours = agreement(candidates, scores.tasks, lambda table: table[chosen].nan_to_num(nan=0.0).amax(0))
    return {
        key: (mask & (value > 0) & (value >= cut)).reshape(stored(*key).shape)
        for key, mask, value in zip(scores.parameters, alive, ours, strict=True)
    }


def _cut_of(candidates: Candidates, scores: TaskScores, alive: Sequence[Tensor]) -> tuple[float, str | None]:
    """Return the highest agreement score of what is pruned, and the name of a parameter that keeps something lower."""
    everyone = agreement(candidates, scores.tasks, unanimous)
    pruned = [value[~mask] for value, mask in zip(everyone, alive, strict=True)]
    cut = max((float(values.max()) for values in pruned if values.numel()), default=0.0)
    lower = (bool((mask & (value < cut)).any()) for value, mask in zip(everyone, alive, strict=True))
    return cut, next((name for name, found in zip(scores.names, lower, strict=True) if found), None)
