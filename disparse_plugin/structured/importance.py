"""The unanimous rule as an importance of torch-pruning."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Self

from torch import Tensor

from ..arbiters import Arbiter
from ..criteria import Criterion, ScoreFunction
from ..criteria import resolve as resolve_criterion
from ..maskable import checked_pairs
from ..parameters import ParameterKey, module_names
from ..scoring.given import check_scores
from ..scoring.task_scores import TaskScores
from .adapter.graph import TRACE_ERRORS, fix_layer_norms
from .adapter.private import bounded, graph_of, tp
from .adapter.pruner import RankedGroup, prepare, ranked_groups, regularizes, root_of
from .adapter.reading import UnusableGroupError, block_counts, read_group
from .adapter.table import RemovalTable, ScoredGroup, removal_table
from .channel_scores import UNREACHED, UNSCORED, channel_magnitudes, normalized, why_unjudged
from .checks import check_joining, check_unmasked
from .groups import ChannelGroup
from .order import ChannelRule, removal_order
from .sources import Given, GivenFirst, Rescore, Rescored, RescoredByBase, Scorer, Source


class DiSparseImportance(tp.importance.Importance):  # type: ignore[misc]
    """Prune a channel only if every task that uses it ranks it low.

    For each task the score of a channel is a reduction, over all parameter slices that go with the channel, of the
    task's element scores; then its percentile among all channels of the ranking scope that the task reaches; then the
    arbiter over the tasks (:mod:`disparse_plugin.arbiters`; DiSparse is the largest percentile). What a pruner gets is
    the place of each channel in that order, so its cut is exact: no two channels tie. Of channels with equal agreement
    the smaller ``abs(w)``, summed over its slices, goes first.

    Use it as any importance of torch-pruning, and attach it to the pruner so that it ranks exactly the groups which the
    pruner ranks::

        importance = DiSparseImportance(rescore=(losses, data))
        pruner = tp.pruner.BasePruner(model, (x,), importance=importance, pruning_ratio=0.5, global_pruning=True,
                                      ignored_layers=[model.head_a, model.head_b])
        importance.attach(pruner)
        pruner.step()

    Without :meth:`attach` it ranks all groups of the graph together, knows nothing of ``ignored_layers``, heads or
    ``max_pruning_ratio``, and cannot keep the pruner from giving up a layer that would be emptied.

    Attributes:
        skipped: Layer name to the reason why its channels are left alone, as of the last table.

    Example:
        >>> import torch, torch_pruning
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> losses = lambda model, x: {"a": model(x)[:, 0].square().mean(), "b": model(x)[:, 1].square().mean()}
        >>> importance = DiSparseImportance(rescore=(losses, [torch.randn(8, 4)]))
        >>> pruner = torch_pruning.pruner.BasePruner(
        ...     net, (torch.randn(1, 4),), importance=importance, pruning_ratio=0.5, ignored_layers=[net[2]]
        ... )
        >>> importance.attach(pruner).skipped
        {}
        >>> pruner.step()
        >>> net[0].out_features
        4
    """

    def __init__(
        self,
        scores: TaskScores | Rescore | None = None,
        *,
        rescore: Rescore | None = None,
        base: Any = None,
        arbiter: str | Arbiter = "unanimous",
        across: str | Arbiter | None = "mean",
        criterion: str | Criterion | ScoreFunction = "taylor",
        reduction: str = "mean",
        normalizer: str | None = "mean",
        parameters: Iterable[ParameterKey] | None = None,
    ) -> None:
        """Take scores, or what is needed to make them.

        Args:
            scores: Scores of the present model, e.g. ``score_tasks(..., parameters=channel_parameters(model))``. They
                are used for one step; after channels were removed they are stale. ``(losses, data)`` here is the same
                as ``rescore``.
            rescore: ``(losses, data)`` as for :func:`~disparse_plugin.score_tasks`: scores are made afresh before each
                step. ``data`` must be readable again and again.
            base: Any importance of torch-pruning, used as the per-task criterion: it is run once per task with that
                task's gradients in ``.grad`` (not ``OBDCImportance``: use ``criterion="fisher"``). Needs ``rescore``;
                ``criterion``, ``reduction`` and ``parameters`` are then of no effect.
            arbiter: As in :meth:`TaskScores.importance`.
            across: As in :func:`~disparse_plugin.structured.remove_channels`.
            criterion: As in :func:`~disparse_plugin.score_tasks`, for ``rescore``.
            reduction: ``"mean"``, ``"sum"`` or ``"max"`` over the slices of a group.
            normalizer: Divide each task's scores by their ``"mean"``, ``"max"`` or ``"sum"`` in the group, so that
                layers compete by how evenly their score is spread. None leaves the scores as they are, so that a global
                removal first takes whole layers whose scores are small, down to one channel. In
                ``benchmarks/structured_normalizer.py`` that (and ``"sum"``) ruins a narrow network and is ahead on one
                with layers far too wide; ``"mean"`` is never far behind, which is why it is the default. With None,
                set ``max_pruning_ratio`` too.
            parameters: What ``rescore`` scores; by default :func:`~disparse_plugin.structured.channel_parameters`.

        Raises:
            TypeError: If ``scores`` or ``rescore`` are of another type.
            ValueError: If there is neither, ``base`` comes without ``rescore``, or an option is unknown.
        """
        if isinstance(scores, tuple):
            scores, rescore = None, scores
        _check_sources(scores, rescore, base)
        check_joining(reduction, normalizer)
        resolve_criterion(criterion)
        self.skipped: dict[str, str] = {}
        self._rule, self._normalizer = ChannelRule.of(arbiter, across), normalizer
        keys = None if parameters is None else tuple(checked_pairs(parameters))
        self._source = _source(scores, rescore, base, criterion, reduction, keys)
        self._pruner: Any = None
        self._initial: dict[str, int] = {}
        self._now: _Now | None = None

    def attach(self, pruner: Any) -> Self:
        """Learn from a pruner which groups it ranks together, what it ignores and how much it may take.

        Also repairs what would go wrong silently: the LayerNorm pruner that permutes weights, dictionaries shared
        between pruners, attention layers without a number of heads, and groups whose indices do not fit their layers
        (they are added to ``pruner.ignored_layers`` and reported in ``skipped``).

        Args:
            pruner: A pruner made with this importance, before its first step.

        Returns:
            Itself.

        Raises:
            ValueError: If the pruner has another importance, or settings that cannot work, or the model carries masks.
        """
        if pruner.importance is not self:
            raise ValueError(
                "pruner: must have been made with this importance, found another; pass importance=this to the pruner"
            )
        check_unmasked(pruner.model.modules())
        self.skipped = prepare(pruner)
        self._pruner, self._now, self._initial = pruner, None, {}
        if regularizes(pruner):
            # Such a pruner cannot take None for an answer, so groups that no task reaches must be known beforehand.
            unreached = {root for root, places in self._refreshed(pruner.DG).table.items() if places is None}
            pruner.ignored_layers += [module for module, _ in unreached]
            pruner.update_regularizer()
        return self

    def __call__(self, group: Any) -> Tensor | None:
        """Return the place of each channel of a group in the order of removal.

        Args:
            group: A group of torch-pruning.

        Returns:
            float64, one per index of the group's root, on the root's device; lower goes first. None for a group that
            no task reaches or that cannot be pruned: torch-pruning leaves it alone.

        Raises:
            ValueError: If the scores are stale and there is no ``rescore``, or are not finite.
        """
        now = self._refreshed(graph_of(group))
        root = root_of(group)
        if root in now.table:
            places = now.table[root]
            values = None if places is None else places[group[0].idxs]
        else:
            values = self._of_other_root(group, now)
        return None if values is None else values.to(next(root[0].parameters()).device)

    def task_scores(self, group: Any) -> dict[str, Tensor]:
        """Return each task's score of each channel of a group, before percentiles, for plots and own rules.

        Args:
            group: A group of torch-pruning over all channels of its root.

        Returns:
            For each task that reaches the group, float64, one per channel.
        """
        now = self._refreshed(graph_of(group))
        return self._channel_scores(now.scorer, _read(group, None), group)

    def invalidate(self) -> None:
        """Forget the order and, with ``rescore``, the scores: after training between two uses."""
        self._now = None
        self._source.forget()

    def _refreshed(self, graph: Any) -> _Now:
        """Make the order anew if the model or the step has changed since it was made."""
        state = (graph, len(graph.pruning_history()), getattr(self._pruner, "current_step", None))
        if self._now is None or self._now.state != state:
            scorer = self._source.scorer(graph)
            with bounded():
                self._now = _Now(state, scorer, self._table(graph, scorer))
        return self._now

    def _table(self, graph: Any, scorer: Scorer) -> RemovalTable:
        if self._pruner is not None and self._pruner.DG is graph:
            groups, unusable = ranked_groups(self._pruner), self.skipped
        else:
            groups, unusable = _all_groups(graph)
        scored = [
            ScoredGroup(
                ranked,
                self._channel_scores(scorer, ranked.channels, ranked.group),
                channel_magnitudes(ranked.channels, scorer.weights),
            )
            for ranked in groups
        ]
        others = [item.ranked.channels for item in scored if not item.scores]
        unjudged = {channels.name: why_unjudged(channels, scorer.unreached) for channels in others}
        known = {name: why for name, why in unusable.items() if why not in (UNREACHED, UNSCORED)}
        self.skipped = known | unjudged
        return removal_table(scored, scorer.tasks, self._rule, self._pruner, self._initial)

    def _channel_scores(self, scorer: Scorer, channels: ChannelGroup, group: Any) -> dict[str, Tensor]:
        scores = scorer.of_group(channels, group)
        return {task: normalized(values, self._normalizer) for task, values in scores.items()}

    def _of_other_root(self, group: Any, now: _Now) -> Tensor | None:
        """Rank the channels of a group that no pruner ranks (as regularisers do) among themselves."""
        try:
            channels = _read(group, None)
        except UnusableGroupError:
            return None
        scores = self._channel_scores(now.scorer, channels, group)
        if not scores:
            return None
        magnitudes = channel_magnitudes(channels, now.scorer.weights)
        return removal_order([scores], [0], now.scorer.tasks, self._rule, [magnitudes])[0]


@dataclasses.dataclass(frozen=True)
class _Now:
    """The order of removal, for one state of the model.

    Attributes:
        state: The graph, how often it was pruned, and the pruner's step.
        scorer: The scores.
        table: The place of every channel of every group.
    """

    state: tuple[Any, int, Any]
    scorer: Scorer
    table: RemovalTable


def _read(group: Any, blocks: Any) -> ChannelGroup:
    size, graph = len(group[0].idxs), graph_of(group)
    folds = 1 if blocks is None else None
    return read_group(graph, group, size, module_names(graph.model), blocks or {}, folds=folds)


def _all_groups(graph: Any) -> tuple[list[RankedGroup], dict[str, str]]:
    """Without a pruner, take all groups of the graph as one scope; return them, and why others are left alone."""
    fix_layer_norms(graph)
    found, unusable = list[RankedGroup](), dict[str, str]()
    for group in graph.get_all_groups():
        try:
            channels = _read(group, block_counts(graph))
        except TRACE_ERRORS as error:
            unusable[module_names(graph.model)[root_of(group)[0]]] = str(error)
            continue
        folds = channels.size // channels.num_units
        found.append(RankedGroup(channels, group, root_of(group), "all", folds, 1))
    return found, unusable


def _source(
    scores: TaskScores | None,
    rescore: Rescore | None,
    base: Any,
    criterion: str | Criterion | ScoreFunction,
    reduction: str,
    parameters: Sequence[ParameterKey] | None,
) -> Source:
    if base is not None and rescore is not None:
        return RescoredByBase(rescore, base)
    later = None if rescore is None else Rescored(rescore, criterion, reduction, parameters)
    given = None if scores is None else Given(scores, reduction)
    if given is not None and later is not None:
        return GivenFirst(given, later)
    source = given or later
    assert source is not None
    return source


def _check_sources(scores: object, rescore: object, base: object) -> None:
    if scores is not None:
        check_scores(scores)
    if rescore is not None and not (isinstance(rescore, tuple) and len(rescore) == 2 and callable(rescore[0])):
        raise TypeError("rescore: must be a pair (losses, data) as for score_tasks, found something else")
    if scores is None and rescore is None:
        raise ValueError("scores: scores or rescore=(losses, data) are needed, found neither")
    if base is not None and rescore is None:
        raise ValueError(
            "rescore: (losses, data) must be given with base, found None; the base importance needs each task's "
            "gradients"
        )
