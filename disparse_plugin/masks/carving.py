"""The sub-networks of single tasks inside the masks of all."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from ..agreement.percentiles import agreement
from ..arbiters import unanimous
from ..parameters import ParameterKey, alive_mask, qualified_names, stored
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
        ValueError: If ``tasks`` is empty or holds an unknown name, or the masks of the model were not cut from these
            scores by the unanimous rule.

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
    unknown = sorted(set(tasks) - set(scores.tasks))
    if unknown or not tasks:
        raise ValueError(f"tasks: must be some of {', '.join(scores.tasks)}, found {', '.join(unknown) or 'none'}")
    qualified_names(model, scores.parameters)
    chosen = [scores.tasks.index(task) for task in tasks]
    flat = [{task: scores[task][key].reshape(-1) for task in scores.tasks_reaching(*key)} for key in scores.parameters]
    everyone = agreement(flat, scores.tasks, unanimous)
    # Unreached is NaN, which the maximum passes over; where none of the chosen tasks reaches, nothing is above the cut.
    ours = agreement(flat, scores.tasks, lambda table: table[chosen].nan_to_num(nan=0.0).amax(0))
    alive = [mask if (mask := alive_mask(*key)) is not None else None for key in scores.parameters]
    cut = max((_highest(value, mask) for value, mask in zip(everyone, alive, strict=True)), default=0.0)
    keep = {}
    for key, name, all_tasks, value, mask in zip(scores.parameters, scores.names, everyone, ours, alive, strict=True):
        living = torch.ones_like(value, dtype=torch.bool) if mask is None else mask.reshape(-1)
        if bool((living & (all_tasks < cut)).any()):
            raise ValueError(
                f"scores: must be those that the model was pruned with by the unanimous rule, found that {name} keeps "
                "weights which they rank below others that are pruned"
            )
        keep[key] = (living & (value > 0) & (value >= cut)).reshape(stored(*key).shape)
    return keep


def _highest(values: Tensor, alive: Tensor | None) -> float:
    """Return the highest agreement score among the entries that are pruned; 0 if none is."""
    pruned = values[:0] if alive is None else values[~alive.reshape(-1)]
    return float(pruned.max()) if pruned.numel() else 0.0
