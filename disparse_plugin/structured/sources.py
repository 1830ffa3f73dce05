"""Where an importance has its channel scores from: given once, made anew before each step, or by another importance."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from ..criteria import Criterion, ScoreFunction
from ..parameters import ParameterKey, keys_by_name, stored
from ..scoring.losses import Batch, TaskLosses
from ..scoring.score import score_for_removal
from ..scoring.task_scores import TaskScores
from .adapter.base_scores import BaseScores
from .adapter.graph import traced_parameters
from .channel_scores import channel_scores
from .groups import ChannelGroup

# What is needed to make scores: losses and data.
Rescore: TypeAlias = tuple[TaskLosses, Iterable[Batch]]


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Scores of the model as it is now.

    Attributes:
        tasks: All tasks.
        of_group: From a group, ours and torch-pruning's, to each reaching task's score of each channel.
        weights: The weights that were scored, by name: between equal scores their magnitudes decide.
        unreached: Names of the parameters that would have been scored if a task reached them.
    """

    tasks: tuple[str, ...]
    of_group: Callable[[ChannelGroup, Any], dict[str, Tensor]]
    weights: Mapping[str, Tensor]
    unreached: Container[str]


class Source(Protocol):
    """What gives the scores of a model."""

    def scorer(self, graph: Any) -> Scorer:
        """Return the scores of the model of a dependency graph, as it is now."""

    def forget(self) -> None:
        """Take back that scores were given: the model was trained."""


def scorer_of(scores: TaskScores, reduction: str) -> Scorer:
    """Score channels by the element scores of their slices."""
    named = dict(zip(scores.names, scores.by_parameter(), strict=True))
    weights = {name: stored(*key) for key, name in zip(scores.parameters, scores.names, strict=True)}
    return Scorer(
        scores.tasks, lambda channels, _: channel_scores(channels, named, reduction), weights, scores.unreached
    )


class Given:
    """Scores that were made before: for one step."""

    def __init__(self, scores: TaskScores, reduction: str) -> None:
        self._scores, self._reduction = scores, reduction
        self._used_for: tuple[Any, int] | None = None

    def scorer(self, graph: Any) -> Scorer:
        """Return them.

        Raises:
            ValueError: If channels were removed since they were used first.
        """
        state = (graph, len(graph.pruning_history()))
        if self._used_for not in (None, state):
            raise ValueError(
                "scores: are stale, found that channels were removed since they were made; pass rescore=(losses, data) "
                "to score afresh before each step, or make a new importance from new scores"
            )
        self._used_for = state
        return scorer_of(self._scores, self._reduction)

    def forget(self) -> None:
        """Let them be used for the model as it is then."""
        self._used_for = None


class Rescored:
    """Scores that are made afresh whenever they are asked for."""

    def __init__(
        self,
        rescore: Rescore,
        criterion: str | Criterion | ScoreFunction,
        reduction: str,
        parameters: Sequence[ParameterKey] | None,
    ) -> None:
        self._rescore, self._criterion = rescore, criterion
        self._reduction, self._parameters = reduction, parameters

    def scorer(self, graph: Any) -> Scorer:
        """Score the model."""
        losses, data = self._rescore
        keys = traced_parameters(graph) if self._parameters is None else self._parameters
        return scorer_of(
            score_for_removal(graph.model, losses, data, criterion=self._criterion, parameters=keys), self._reduction
        )

    def forget(self) -> None:
        """Nothing is kept."""


class RescoredByBase:
    """Scores of another importance of torch-pruning, which is shown one task's gradients at a time."""

    def __init__(self, rescore: Rescore, base: Any) -> None:
        self._rescore, self._base = rescore, base

    def scorer(self, graph: Any) -> Scorer:
        """Collect each task's gradients."""
        scores = BaseScores(self._base, graph.model, *self._rescore)
        weights = {name: stored(*key) for name, key in keys_by_name(graph.model).items()}
        return Scorer(scores.tasks, scores.of_group, weights, weights)

    def forget(self) -> None:
        """Nothing is kept."""


class GivenFirst:
    """Scores that were made before for the first step, and fresh ones for all later ones."""

    def __init__(self, given: Given, later: Source) -> None:
        self._given: Given | None = given
        self._later = later

    def scorer(self, graph: Any) -> Scorer:
        """Return those that were given, once; then fresh ones."""
        given, self._given = self._given, None
        return (given or self._later).scorer(graph)

    def forget(self) -> None:
        """Those that were given are of the model as it was."""
        self._given = None
