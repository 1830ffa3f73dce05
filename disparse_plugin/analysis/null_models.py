"""Score a model with and without its labels, and on two halves of the data: an overlap with all its controls."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from .._support.undisturbed import RandomStates, same_random_states
from ..agreement.amounts import check_amount, warn_of_percentage
from ..agreement.candidates import Candidates
from ..criteria import Criterion, ScoreFunction, resolve
from ..errors import wrong
from ..kinds import whole_number
from ..maskable import checked_pairs
from ..parameters import ParameterKey, prunable_parameters, qualified_names, unwrap
from ..scoring.batches import check_source, checked_count, length
from ..scoring.losses import Batch, TaskLosses, check_callable_losses
from ..scoring.score import score_tasks
from .controls import Controls
from .measures import Overlap, count_stratum
from .overlap import TaskOverlap, overlap_of_masks
from .permuted_labels import permute_labels
from .task_masks import AliveMasks, AmountOf, alive_masks

Permute: TypeAlias = Callable[[Batch, torch.Generator], Batch]


def overlap_with_controls(
    model: nn.Module,
    losses: TaskLosses,
    data: Iterable[Batch],
    amount: float,
    *,
    criterion: str | Criterion | ScoreFunction = "snip",
    parameters: Iterable[ParameterKey] | None = None,
    cut: AmountOf = "per_task",
    num_batches: int | None = None,
    permute: Permute = permute_labels,
    groups: int = 8,
    resamples: int = 20,
    seed: int = 0,
) -> TaskOverlap:
    """Score a model with and without its labels, and return the overlap with all its controls.

    Every batch is scored twice, once as it is and once with permuted labels. The batches are cut into ``groups`` whose
    scores are kept apart: every other group makes one half of the data, the rest the other. A resample draws, inside
    each half, as many groups with replacement. That takes ``(groups + 1) * tasks`` scores per weight, at 4 bytes each.

    Args:
        model: The model; left as it is found. As in :func:`~disparse_plugin.score_tasks` it runs in its present mode.
        losses: One scalar loss per task.
        data: Any iterable of batches, of at least two samples each for the default ``permute``.
        amount: As in :func:`task_overlap`.
        criterion: As in :func:`~disparse_plugin.score_tasks`.
        parameters: As in :func:`~disparse_plugin.score_tasks`.
        cut: As in :func:`task_overlap`.
        num_batches: How many batches to use; None for all of ``data``.
        permute: ``permute(batch, generator)`` gives every sample the labels of another.
        groups: Number of groups, at least 2; with fewer batches, one each. Below 4 there are no resamples.
        resamples: How many resamples the uncertainty of the watershed is taken from.
        seed: Of the permutations and resamples.

    Returns:
        The overlap, with ``controls``. A layer that one half has not run (experts, stochastic depth) is not compared
        between halves: NaN.

    Raises:
        TypeError: As :func:`~disparse_plugin.score_tasks`, or if ``permute`` cannot handle the batches.
        ValueError: As :func:`~disparse_plugin.score_tasks` and :func:`task_overlap`, or if there are fewer than two
            batches, or ``groups`` is below 2.

    Example:
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.trunk, self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        ...     def forward(self, x):
        ...         return {"a": self.a(self.trunk(x)), "b": self.b(self.trunk(x))}
        >>> def losses(model, batch):
        ...     outputs, target = model(batch[0]), batch[1]
        ...     return {task: nn.functional.cross_entropy(output, target) for task, output in outputs.items()}
        >>> data = [(torch.randn(4, 8), torch.randint(3, (4,))) for _ in range(4)]
        >>> overlap = overlap_with_controls(Net(), losses, data, 0.5)
        >>> [layer.name for layer in overlap.controls.ceiling]
        ['trunk.weight']
    """
    unwrap(model)
    check_callable_losses(losses)
    check_amount(amount)
    _check_groups(groups, resamples)
    rule = resolve(criterion)
    keys = None if parameters is None else checked_pairs(parameters)
    check_source(data)
    checked_count(num_batches)
    _check_permute(permute)
    generator = torch.Generator("cpu").manual_seed(whole_number("seed", seed, least=0))
    real, permuted, count = _scored(
        model, losses, _chunks(data, num_batches, groups), rule, keys, lambda batch: permute(batch, generator)
    )
    warn_of_percentage(amount, sum(weight.numel() for weight in real[0].weights.values()))
    analysis = _Analysis(rule, amount, cut, real[0].tasks)
    overlap = analysis.observed(_ScoreTables.sum(real))
    across, ceiling = analysis.between_halves(real[::2], real[1::2], overlap.names)
    below = analysis.observed(permuted, correlate=False)
    profiles = tuple(
        Controls((), *analysis.between_halves(first, second, overlap.names)).relative_agreement()
        for first, second in _resampled(real[::2], real[1::2], resamples, seed)
    )
    without = {layer.name: layer for layer in below.layers}
    permuted_layers = tuple(without.get(name, Overlap(name, ())) for name in overlap.names)
    controls = Controls(permuted_layers, across, ceiling, profiles)
    return dataclasses.replace(overlap, controls=controls, criterion=rule.name, num_batches=count)


def _scored(
    model: nn.Module,
    losses: TaskLosses,
    chunks: Iterable[list[Batch]],
    rule: Criterion,
    keys: list[ParameterKey] | None,
    permuted: Callable[[Batch], Batch],
) -> tuple[list[_ScoreTables], _ScoreTables, int]:
    """Score each group of batches, as it is and with permuted labels.

    Returns:
        The scores of each group, those with permuted labels added up, and the number of batches.
    """
    real: list[_ScoreTables] = []
    without_labels: list[_ScoreTables] = []
    count = 0
    with same_random_states(model):
        for chunk in chunks:
            count += len(chunk)
            noise = _Noise(model, losses)
            # Scoring goes back to the random numbers before it: both passes see the same noise (dropout).
            real.append(_ScoreTables.of(model, noise, chunk, rule, keys))
            _check_same_tasks(real)
            other = _ScoreTables.of(model, losses, [permuted(batch) for batch in chunk], rule, keys)
            without_labels = [_ScoreTables.sum([*without_labels, other])]
            noise.after.restore()  # but no two groups do
    if len(real) < 2:
        raise ValueError(f"data: must hold at least two batches, one for each half, found {len(real)}")
    return real, without_labels[0], count


def _check_groups(groups: int, resamples: int) -> None:
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 2:
        raise ValueError(f"groups: must be an int of at least 2, found {groups!r}")
    whole_number("resamples", resamples, least=0)


def _check_permute(permute: object) -> None:
    if not callable(permute) or isinstance(permute, type):
        raise TypeError(f"permute: must be a function of batch and generator, found {wrong(permute)}")


class _Noise:
    """Calls the losses, and keeps where the random numbers were after the last batch: scoring goes back before them."""

    def __init__(self, model: nn.Module, losses: TaskLosses) -> None:
        self._model, self._losses, self.after = model, losses, RandomStates.now(model)

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        try:
            return self._losses(model, batch)
        finally:
            self.after = RandomStates.now(self._model)


def _check_same_tasks(tables: Sequence[_ScoreTables]) -> None:
    first, last = sorted(tables[0].tasks), sorted(tables[-1].tasks)
    if first != last:
        raise ValueError(
            f"losses: every batch must return the same tasks, found {last} after {first}; return a zero loss for a "
            "task without labels, or leave the task out"
        )


@dataclasses.dataclass(frozen=True)
class _Analysis:
    """From added up scores to overlaps, with the per-layer step of the criterion in between."""

    rule: Criterion
    amount: float
    cut: AmountOf
    tasks: tuple[str, ...]

    def masks(self, tables: _ScoreTables) -> tuple[AliveMasks, Candidates]:
        scores = [
            {task: self.rule.complete(tables.weights[name], row[task]) for task in self.tasks if task in row}
            for name, row in tables.rows.items()
        ]
        candidates = Candidates(scores, [tables.weights[name] for name in tables.rows])
        return alive_masks(candidates, self.tasks, self.amount, self.cut), candidates

    def observed(self, tables: _ScoreTables, *, correlate: bool = True) -> TaskOverlap:
        masks, candidates = self.masks(tables)
        scores = candidates.scores if correlate else None
        return overlap_of_masks(tuple(tables.rows), self.tasks, self.amount, self.cut, masks, scores)

    def between_halves(
        self, first: Sequence[_ScoreTables], second: Sequence[_ScoreTables], names: Sequence[str]
    ) -> tuple[tuple[Overlap, ...], tuple[Overlap, ...]]:
        """Compare tasks across the halves, and each task with itself, in the named layers."""
        sums = _ScoreTables.sum(first), _ScoreTables.sum(second)
        one, other = (dict(zip(half.rows, self.masks(half)[0], strict=True)) for half in sums)
        across, ceiling = [], []
        for name in names:
            a, b = one.get(name, {}), other.get(name, {})  # where a half has not run a layer, it is not compared
            between = [count_stratum({s: a[s], t: b[t]}) for s, t in itertools.permutations(a, 2) if t in b]
            across.append(Overlap(name, tuple(between)))
            ceiling.append(Overlap(name, tuple(count_stratum({t: a[t], f"{t} again": b[t]}) for t in a if t in b)))
        return tuple(across), tuple(ceiling)


def _resampled(
    first: Sequence[_ScoreTables], second: Sequence[_ScoreTables], count: int, seed: int
) -> Iterator[list[list[_ScoreTables]]]:
    """Draw groups with replacement, inside each half; nothing where a half is a single group."""
    generator = np.random.default_rng(seed)
    for _ in range(count if len(second) > 1 else 0):
        yield [[half[place] for place in generator.integers(len(half), size=len(half))] for half in (first, second)]


@dataclasses.dataclass(frozen=True)
class _ScoreTables:
    """Scores of the alive entries, before any per-layer step, so that sums of them are scores too.

    Attributes:
        tasks: Task names.
        rows: For each parameter, by its qualified name, the scores of each task that reaches it, flat.
        weights: For each parameter, its alive weights, flat.
        order: All names in the order of the parameters; the batches of one group need not reach every one.
    """

    tasks: tuple[str, ...]
    rows: dict[str, dict[str, Tensor]]
    weights: dict[str, Tensor]
    order: tuple[str, ...]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        losses: TaskLosses,
        batches: Sequence[Batch],
        rule: Criterion,
        keys: Sequence[ParameterKey] | None,
    ) -> _ScoreTables:
        """Score a model on some batches."""
        plain = dataclasses.replace(rule, finish=None, per_layer=None)
        scores = score_tasks(model, losses, batches, criterion=plain, parameters=keys)
        candidates = scores.candidates()
        rows = dict(zip(scores.names, map(dict, candidates.scores), strict=True))
        weights = dict(zip(scores.names, candidates.magnitudes or (), strict=True))
        order = qualified_names(model, prunable_parameters(model) if keys is None else keys)
        return cls(scores.tasks, rows, weights, tuple(order))

    @classmethod
    def sum(cls, tables: Sequence[_ScoreTables]) -> _ScoreTables:
        """Add up the scores of several groups of batches; the tables themselves are not changed.

        Scores that do not depend on the data (magnitudes) are added up as well, which does not change their order.
        """
        rows: dict[str, dict[str, Tensor]] = {}
        weights: dict[str, Tensor] = {}
        for table in tables:
            weights |= table.weights
            for name, row in table.rows.items():
                total = rows.setdefault(name, {})
                for task, score in row.items():
                    total[task] = total[task] + score if task in total else score
        first = tables[0]
        return cls(first.tasks, {name: rows[name] for name in first.order if name in rows}, weights, first.order)


def _chunks(data: Iterable[Batch], num_batches: int | None, groups: int) -> Iterator[list[Batch]]:
    """Cut the batches into near-equal groups, holding one group at a time where the number of batches is known."""
    known = length(data) if num_batches is None else num_batches
    source: Iterable[Batch] = data
    if known is None:
        source = list(data)
        known = len(source)
    batches = iter(source)
    groups = min(groups, known)
    for group in range(groups):
        chunk = list(itertools.islice(batches, known * (group + 1) // groups - known * group // groups))
        if not chunk:
            what = "num_batches: must be" if num_batches is not None else "data: its length must be"
            raise ValueError(
                f"{what} at most the number of batches in data, found {known} with fewer in data; pass num_batches= as "
                "many as there are"
            )
        yield chunk
