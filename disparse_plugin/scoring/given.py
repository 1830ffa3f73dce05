"""Scores that a user passes on."""

from __future__ import annotations

from ..errors import wrong
from .task_scores import TaskScores


def check_scores(scores: object) -> None:
    """Check that an argument is scores of tasks.

    Raises:
        TypeError: If it is something else, such as a model, or the class.

    Example:
        >>> check_scores(None)
        Traceback (most recent call last):
        TypeError: scores: must be TaskScores, found NoneType; make them with score_tasks(...)
    """
    if not isinstance(scores, TaskScores):
        what = wrong(scores) if isinstance(scores, type) else type(scores).__name__
        raise TypeError(f"scores: must be TaskScores, found {what}; make them with score_tasks(...)")
