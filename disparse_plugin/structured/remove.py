"""Remove channels in one call."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..agreement.amounts import check_amount
from ..arbiters import Arbiter
from ..criteria import Criterion, ScoreFunction
from ..criteria import resolve as resolve_criterion
from ..parameters import ParameterKey, is_masked, keys_by_name, module_names, unwrap
from ..scoring.losses import Batch, TaskLosses
from ..scoring.score import score_tasks
from ..scoring.task_scores import TaskScores
from .adapter.groups import find_groups
from .adapter.observation import Inputs, Observation, as_inputs
from .budget import QUANTITIES, Budget, Quantity, choose, units_to_keep
from .cuts import Cut, merge_cuts
from .groups import NORMALIZERS, REDUCTIONS, ChannelGroup, channel_parameters, channel_scores, normalized
from .order import ChannelRule, removal_order
from .plan import RemovalPlan
from .report import Change, GroupChange, PartChange, RemovalReport
from .trial import Trial, copied, tolerance_of


def remove_channels(
    model: nn.Module,
    losses: TaskLosses,
    data: Iterable[Batch],
    example_inputs: Any,
    amount: float,
    *,
    of: Quantity = "channels",
    criterion: str | Criterion | ScoreFunction = "taylor",
    arbiter: str | Arbiter = "unanimous",
    across: str | Arbiter | None = None,
    reduction: str = "mean",
    normalizer: str | None = "mean",
    max_pruning_ratio: float = 1.0,
    round_to: int | None = None,
    ignored_layers: Collection[nn.Module] = (),
    parameters: Iterable[ParameterKey] | None = None,
    num_batches: int | None = None,
    exact: bool = True,
    customized_pruners: Mapping[type[nn.Module], Any] | None = None,
) -> RemovalReport:
    """Remove the channels that all tasks rank low, with everything that depends on them.

    The layers that make the outputs of every head keep theirs. Each task's private head is judged by its own task
    alone. Which channels go together is read from torch-pruning's dependency graph, on a copy; the removal is tried on
    another copy, and groups that break it are left alone and reported. Only then is the model changed.

    Args:
        model: The model; changed in place, on any device. Optimizers must be made anew afterwards.
        losses: ``losses(model, batch)`` runs the model once and returns one scalar loss per task.
        data: Any iterable of batches.
        example_inputs: Arguments of one forward, on the model's device: a tensor, a tuple or a dict.
        amount: How much to remove: a fraction (float in [0, 1]) or a number (int).
        of: What ``amount`` counts. ``"channels"``: of the groups that can be removed from, met exactly where channels
            can go one by one. ``"parameters"`` or ``"macs"``: of the whole model, exceeded by less than one unit.
        criterion: As in :func:`~disparse_plugin.score_tasks`.
        arbiter: As in :meth:`~disparse_plugin.TaskScores.importance`.
        across: The arbiter of how many channels each group loses, while ``arbiter`` says which; by default the same.
            Unanimity takes more from layers in which the tasks agree, mostly the first, whatever those are worth;
            ``across="mean"`` does not (``docs/accuracy.md`` compares both).
        reduction: ``"mean"``, ``"sum"`` or ``"max"`` over the parameter slices of a channel.
        normalizer: As in :class:`~disparse_plugin.structured.DiSparseImportance`.
        max_pruning_ratio: No group loses a larger share of its channels; one channel stays in any case.
        round_to: Groups that lose channels keep a multiple of this.
        ignored_layers: Further modules that must keep their outputs, with everything inside them.
        parameters: What is scored; by default :func:`~disparse_plugin.structured.channel_parameters`.
        num_batches: As in :func:`~disparse_plugin.score_tasks`.
        exact: Leave alone what cannot be removed without changing more than masking would: layers that torch-pruning
            maps wrongly, and those that compute with the number or the mean of their channels (as the
            GlobalResponseNorm of ConvNeXt V2 does). With False those are removed, and ``report.deviation`` says how
            far the outputs are off.
        customized_pruners: As in torch-pruning: ``{class: tp.pruner.BasePruningFunc}``.

    Returns:
        The report.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the model carries masks or parametrizations, does not run on the example inputs, cannot be
            traced, has no removable group, the amount cannot be reached, or as :func:`~disparse_plugin.score_tasks`.
            The model is unchanged.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 2, 1)).eval()
        >>> losses = lambda model, x: {"a": model(x)[:, 0].square().mean(), "b": model(x)[:, 1].square().mean()}
        >>> x = torch.randn(2, 3, 8, 8)
        >>> report = remove_channels(net, losses, [x], x, amount=0.75)
        >>> net[0].out_channels, net(x).shape, report.skipped
        (4, torch.Size([2, 2, 6, 6]), {'3': 'makes an output of the model'})
    """
    root = unwrap(model)
    _check_options(amount, of, reduction, normalizer, max_pruning_ratio, round_to)
    rule = ChannelRule.of(arbiter, across)
    resolve_criterion(criterion)
    _check_plain(root)
    pristine, inputs = copied(root), as_inputs(example_inputs)
    groups, seen = find_groups(copied(pristine), inputs, root, ignored_layers, customized_pruners)
    keys = _scored_parameters(root, groups.idle) if parameters is None else tuple(parameters)
    scores = score_tasks(root, losses, data, criterion=criterion, parameters=keys, num_batches=num_batches)
    work = _Work(root, pristine, inputs, scores, rule, reduction, normalizer, max_pruning_ratio, round_to)
    work.customized_pruners, work.exact = customized_pruners, exact
    for group in groups.usable:
        work.admit(group, groups.skipped)
    choice, plan, deviation = work.search(of, amount, seen, groups.skipped)
    report = work.report(choice, plan, seen, groups.skipped, deviation, of, amount)
    plan.apply(root, customized_pruners=customized_pruners)
    return report


def _check_options(
    amount: float, of: str, reduction: str, normalizer: str | None, max_pruning_ratio: float, round_to: int | None
) -> None:
    """Check the options of a removal as far as that is possible without the model.

    Raises:
        TypeError: If ``amount`` is no number.
        ValueError: If an option is unknown or out of range.
    """
    check_amount(amount)
    if of not in QUANTITIES:
        raise ValueError(f"of: must be one of {', '.join(QUANTITIES)}, found {of!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: must be one of {', '.join(REDUCTIONS)}, found {reduction!r}")
    if normalizer is not None and normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer: must be None or one of {', '.join(NORMALIZERS)}, found {normalizer!r}")
    if not 0 <= max_pruning_ratio <= 1:
        raise ValueError(f"max_pruning_ratio: must be in [0, 1], found {max_pruning_ratio}")
    if round_to is not None and (not isinstance(round_to, int) or round_to < 1):
        raise ValueError(f"round_to: must be a positive int or None, found {round_to!r}")


def _check_plain(root: nn.Module) -> None:
    """Check that a model's weights are plain trainable parameters.

    Raises:
        ValueError: If there is a mask, a parametrization, or nothing that wants gradients.
    """
    for module in root.modules():
        for name in list(module._parameters):
            if is_masked(module, name.removesuffix("_orig")) and name.endswith("_orig"):
                raise ValueError(
                    f"model: must carry no masks, found one on {type(module).__name__}.{name.removesuffix('_orig')}; "
                    "make them permanent first with torch.nn.utils.prune.remove(module, name), or remove channels "
                    "before pruning weights"
                )
        if parametrize.is_parametrized(module) or any(
            type(hook).__name__ in ("WeightNorm", "SpectralNorm") for hook in module._forward_pre_hooks.values()
        ):
            raise ValueError(
                f"model: weights must be plain parameters, found a parametrization on {type(module).__name__}; call "
                "torch.nn.utils.parametrize.remove_parametrizations first"
            )
    if not any(parameter.requires_grad for parameter in root.parameters()):
        raise ValueError(
            "model: at least one parameter must require gradients, found all frozen; unfreeze what is used"
        )


def _scored_parameters(root: nn.Module, idle: Collection[str]) -> list[ParameterKey]:
    """List what to score: not the layers that never run, whose weights a parent may read."""
    names = module_names(root)
    return [(module, name) for module, name in channel_parameters(root) if names[module] not in idle]


@dataclasses.dataclass
class _Work:
    """The groups of one removal with their scores, up to the choice of channels."""

    root: nn.Module
    pristine: nn.Module
    inputs: Inputs
    scores: TaskScores
    rule: ChannelRule
    reduction: str
    normalizer: str | None
    max_pruning_ratio: float
    round_to: int | None

    def __post_init__(self) -> None:
        self.groups: list[ChannelGroup] = []
        self.by_task: list[dict[str, Tensor]] = []
        self.customized_pruners: Any = None
        self.exact = True
        self._named = {
            name: {task: self.scores[task][key] for task in self.scores.tasks_reaching(*key)}
            for key, name in zip(self.scores.parameters, self.scores.names, strict=True)
        }

    def admit(self, group: ChannelGroup, skipped: dict[str, str]) -> None:
        """Score a group, or note why it is left alone."""
        scores = channel_scores(group, self._named, self.reduction)
        if group.num_units < 2:
            skipped[group.name] = "all its channels go together"
        elif not scores:
            skipped[group.name] = "reached by no task"
        else:
            self.groups.append(group)
            self.by_task.append({t: group.per_unit(normalized(v, self.normalizer)) for t, v in scores.items()})

    def search(
        self, of: Quantity, amount: float, seen: Observation, skipped: dict[str, str]
    ) -> tuple[list[Tensor], RemovalPlan, float]:
        """Choose the units, try the removal on a copy, and choose again without the groups that break it."""
        tolerance = tolerance_of(self.pristine) if self.exact else None
        while True:
            if not self.groups:
                raise ValueError(
                    f"model: at least one group of channels must be removable, found none; left alone: {skipped}"
                )
            keep = [units_to_keep(group, self.max_pruning_ratio) for group in self.groups]
            order = removal_order(self.by_task, keep, self.scores.tasks, self.rule)
            budget = Budget(self.groups, self._sizes(), seen.uses)
            choice = choose(budget, self.groups, order, keep, of=of, amount=amount, round_to=self.round_to)
            losing = [number for number, gone in enumerate(choice) if bool(gone.any())]
            trial = Trial(
                self.pristine, self.inputs, functools.partial(self.plan, choice), self.customized_pruners, tolerance
            )
            if trial.failure(losing) is None:
                return choice, self.plan(choice, losing), trial.deviation
            self._drop(trial.culprits(losing), skipped)

    def plan(self, choice: Sequence[Tensor], groups: Sequence[int]) -> RemovalPlan:
        """Make the plan that removes the chosen units of some groups."""
        cuts = []
        for number in groups:
            group = self.groups[number]
            gone = choice[number][group.units]
            for follower in group.followers:
                positions = follower.positions[gone[follower.channels]]
                if positions.numel():
                    cuts.append(Cut(follower.target, follower.side, follower.dim, follower.count, positions))
        return RemovalPlan(merge_cuts(cuts))

    def _drop(self, culprits: Mapping[int, str], skipped: dict[str, str]) -> None:
        for number in sorted(culprits, reverse=True):
            skipped[self.groups[number].name] = f"a removal breaks the model: {culprits[number]}"
            del self.groups[number], self.by_task[number]

    def _sizes(self) -> dict[str, int]:
        return {name: m._parameters[key].numel() for name, (m, key) in keys_by_name(self.root).items()}  # type: ignore[union-attr]

    def report(
        self,
        choice: Sequence[Tensor],
        plan: RemovalPlan,
        seen: Observation,
        skipped: Mapping[str, str],
        deviation: float,
        of: str,
        amount: float,
    ) -> RemovalReport:
        """Count what changes."""
        budget = Budget(self.groups, self._sizes(), seen.uses)
        left, sizes = budget.entries(choice), self._sizes()
        parts: dict[str, list[int]] = {}
        for name, size in sizes.items():
            counts = parts.setdefault(self._part(name), [0, 0, 0, 0])
            uses = seen.uses.get(name, 0)
            for place, value in enumerate((size, left[name], size * uses, left[name] * uses)):
                counts[place] += value
        total = [sum(counts[place] for counts in parts.values()) for place in range(4)]
        groups = {
            group.name: GroupChange(Change(group.size, group.size - int(group.unit_sizes()[gone].sum())), tuple(scores))
            for group, gone, scores in zip(self.groups, choice, self.by_task, strict=True)
        }
        channels = Change(budget.total("channels"), budget.left("channels", choice))
        by_part = {name: PartChange(Change(c[0], c[1]), Change(c[2], c[3])) for name, c in parts.items()}
        return RemovalReport(
            of, amount, channels, Change(total[0], total[1]), Change(total[2], total[3]), by_part, groups,
            dict(skipped), deviation, plan,
        )  # fmt: skip

    def _part(self, name: str) -> str:
        """Name the part of a parameter by the tasks that reach its layer, or else the channels that it follows."""
        layer = name.rpartition(".")[0]
        tasks = {task for other, table in self._named.items() if other.rpartition(".")[0] == layer for task in table}
        if not tasks and name not in self.scores.unreached:
            following = [
                n for n, group in enumerate(self.groups) if any(piece.name == name for piece in group.slices())
            ]
            tasks = {task for number in following for task in self.by_task[number]}
        if len(tasks) == 1:
            return tasks.pop()
        return "shared" if tasks else "unreached" if name in self.scores.unreached else "not scored"
