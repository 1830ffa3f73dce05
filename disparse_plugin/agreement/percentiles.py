"""From the tasks' scores to one agreement score per weight: percentiles inside each task, then the arbiter.

The percentile of a weight for task k is ``(rank + 1) / n_k``: its rank among the ``n_k`` alive entries that the task
reaches, so in ``(0, 1]`` whatever the scale of the task's loss. The union over the tasks of their top-rho masks is one
cut on the largest percentile, hence the arbiter of DiSparse is the maximum. Percentiles are float64: float32 has 2^24
steps and networks have more weights than that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from ..arbiters import Arbiter, any_task, ignores_absent_tasks, scale_of, stays_in_range, unanimous
from ..criteria import lamp_scores
from .candidates import Candidates, first_of

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def agreement(candidates: Candidates, tasks: Sequence[str], arbiter: Arbiter) -> list[Tensor]:
    """Reduce the tasks' scores to agreement scores.

    Args:
        candidates: What is ranked.
        tasks: All task names; the order of the axis that the arbiter sees.
        arbiter: The reduction over tasks.

    Returns:
        float64 in [0, 1], 1-D, one per parameter, on the parameter's device.

    Raises:
        ValueError: If the arbiter returns another shape or a value outside [0, 1].
    """
    if scale_of(arbiter) == "share":

        def share(index: int, task: str) -> Tensor:
            row = candidates.scores[index][task]
            return row if candidates.shares else lamp_scores(row)

        return over_tasks(candidates, tasks, arbiter, share)
    if arbiter in (unanimous, any_task):
        return _extremes(candidates, tasks, torch.maximum if arbiter is unanimous else torch.minimum)
    ranked = dict(zip(tasks, in_threads(candidates.ranks, tasks, candidates.devices), strict=True))
    totals = candidates.totals(tasks)
    return over_tasks(candidates, tasks, arbiter, lambda index, task: fractions(ranked[task].pop(index), totals[task]))


def _extremes(
    candidates: Candidates, tasks: Sequence[str], farther: Callable[[Tensor, Tensor], Tensor]
) -> list[Tensor]:
    """Keep the largest (or smallest) percentile while the tasks are ranked one after the other."""
    result: dict[int, Tensor] = {}
    workers, totals = _workers(candidates.devices), candidates.totals(tasks)
    for start in range(0, len(tasks), workers):
        some = tasks[start : start + workers]
        for task, ranked in zip(some, in_threads(candidates.ranks, some, candidates.devices), strict=True):
            for index in list(ranked):
                found = fractions(ranked.pop(index), totals[task])
                result[index] = farther(result[index], found) if index in result else found
    return [result[index] for index in range(len(candidates.scores))]


def percentiles_of(candidates: Candidates, task: str) -> dict[int, Tensor]:
    """Return one task's percentiles, by the index of the parameter: 1-D, float64, on its device."""
    total = candidates.totals([task])[task]
    return {index: fractions(part, total) for index, part in candidates.ranks(task).items()}


def over_tasks(
    candidates: Candidates, tasks: Sequence[str], arbiter: Arbiter, value: Callable[[int, str], Tensor]
) -> list[Tensor]:
    """Tabulate what the tasks that reach a parameter say of its units, and let the arbiter join it.

    Args:
        candidates: What is ranked.
        tasks: All task names; the order of the axis that the arbiter sees.
        arbiter: The reduction over tasks.
        value: From a parameter's index and a task that reaches it to its percentiles or shares, 1-D; asked once for
            each, parameter by parameter in the order of the tasks.

    Returns:
        As :func:`agreement`.

    Raises:
        TypeError: As :func:`checked_form`.
        ValueError: As :func:`checked_form` and :func:`check_range`.
    """
    result = []
    for index, rows in enumerate(candidates.scores):
        wanted = [task for task in tasks if task in rows] if ignores_absent_tasks(arbiter) else tasks
        like = first_of(rows)
        table = torch.full((len(wanted), like.numel()), torch.nan, dtype=torch.float64, device=like.device)
        for axis, task in enumerate(wanted):
            if task in rows:
                table[axis] = value(index, task)
        found = arbiter(table)
        result.append(found if stays_in_range(arbiter) else checked_form(found, like))
    if not stays_in_range(arbiter):
        check_range(result)
    return result


def fractions(ranks: Tensor, total: int) -> Tensor:
    """Turn ranks among ``total`` entries, counted from 0, into percentiles in (0, 1], float64.

    Example:
        >>> fractions(torch.tensor([0, 3]), 4)
        tensor([0.2500, 1.0000], dtype=torch.float64)
    """
    counted = ranks.double().add_(1)
    # By a number CUDA multiplies with its reciprocal, which differs in the last bit from what a CPU divides.
    return counted.div_(torch.full_like(counted[:1], total))


def checked_form(values: Tensor, like: Tensor) -> Tensor:
    """Return what an arbiter returned for entries like the given scores, as float64.

    Raises:
        TypeError: If it is not a floating point tensor.
        ValueError: If its shape is not that of the entries.
    """
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise TypeError(
            f"arbiter: must return a floating point tensor, found {getattr(values, 'dtype', type(values).__name__)}"
        )
    if values.shape != like.shape:
        raise ValueError(
            f"arbiter: must reduce the task axis only, to shape {tuple(like.shape)}, found {tuple(values.shape)}; "
            "reduce over dim 0"
        )
    return values.double()


def check_range(values: Sequence[Tensor]) -> None:
    """Check what an arbiter returned for several parameters, with one wait for each accelerator.

    Raises:
        ValueError: If an entry is NaN or outside [0, 1].
    """
    for device in {part.device for part in values}:
        there = [part for part in values if part.device == device]
        if not bool(torch.stack([((part >= 0) & (part <= 1)).all() for part in there]).all()):
            every = torch.cat(there)
            worst = every[~((every >= 0) & (every <= 1))][0].item()
            raise ValueError(
                f"arbiter: must return values in [0, 1], found {worst}; tasks that do not reach a weight are NaN (use "
                "nanmean, nan_to_num, ...), and weighted arbiters must have weights of at most 1"
            )


def in_threads(
    function: Callable[[_Item], _Result], items: Iterable[_Item], on: Iterable[torch.device] = ()
) -> list[_Result]:
    """Map a function that spends its time outside the interpreter lock, on as many threads as torch may use.

    Args:
        function: What to do.
        items: With what.
        on: The devices that it works on. An accelerator does one thing after the other, from whatever thread it is
            asked, and would only hold the temporaries of all at once: so it is asked from one.

    Returns:
        The results, in the order of the items.
    """
    workers = _workers(on)
    if workers == 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, items))


def _workers(on: Iterable[torch.device]) -> int:
    if any(device.type != "cpu" for device in on):
        return 1
    return min(torch.get_num_threads(), os.cpu_count() or 1)
