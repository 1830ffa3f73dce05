"""What scores made elsewhere must be before anything is asked of them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .._support.shards import local
from ..errors import wrong
from ..parameters import ParameterKey, stored
from .finite import finite_tensors


def check_tasks(scores: Mapping[str, Mapping[ParameterKey, Tensor]]) -> None:
    """Check that there is a task, and that every task reaches something.

    Args:
        scores: What a user has made.

    Raises:
        TypeError: If the scores are no mapping from task name to mappings.
        ValueError: If not.
    """
    if not isinstance(scores, Mapping):
        raise TypeError(
            f"scores: must be a mapping from task to the scores of its parameters, found {type(scores).__name__}"
        )
    if not scores:
        raise ValueError("scores: at least one task is needed, found none")
    for task, table in scores.items():
        if not isinstance(task, str):
            raise TypeError(f"scores: task names must be str, found {wrong(task)}")
        if not isinstance(table, Mapping):
            raise TypeError(
                f"scores: those of task {task!r} must be a mapping from (module, name) to tensor, found "
                f"{type(table).__name__}"
            )
        if not table:
            raise ValueError(f"scores: every task must reach at least one parameter, found none for task {task!r}")


def check_tables(scores: Mapping[str, Mapping[ParameterKey, Tensor]], names: Mapping[ParameterKey, str]) -> None:
    """Check each score against its parameter.

    Raises:
        TypeError: If a score is not a floating point tensor.
        ValueError: If a score is of no listed parameter, of another shape, or not finite.
    """
    for task, table in scores.items():
        for key, score in table.items():
            if key not in names:
                raise ValueError(
                    f"scores: every scored pair must be in parameters, found one of task {task!r} that is not"
                )
            _check_score(score, stored(*key), _called(task, names[key]))
    entries = [(task, key) for task, table in scores.items() for key in table]
    for (task, key), good in zip(
        entries, finite_tensors([local(scores[task][key]) for task, key in entries]), strict=True
    ):
        if not good:
            raise ValueError(
                f"{_called(task, names[key])}: must be finite, found NaN or infinity; check the task's loss and the "
                "criterion"
            )


def _called(task: str, name: str) -> str:
    return f"scores of task {task!r} for {name}"


def _check_score(score: Tensor, parameter: Tensor, what: str) -> None:
    if not isinstance(score, Tensor) or not score.is_floating_point():
        raise TypeError(
            f"{what}: must be a floating point tensor, found {getattr(score, 'dtype', type(score).__name__)}"
        )
    if score.shape != parameter.shape:
        raise ValueError(
            f"{what}: must have the weight's shape {tuple(parameter.shape)}, found {tuple(score.shape)}; were they "
            "made for another model?"
        )
