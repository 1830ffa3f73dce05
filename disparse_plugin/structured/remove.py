"""Remove channels in one call."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._support.distributed import failing_together
from .._support.example_inputs import Inputs, as_inputs
from .._support.undisturbed import same_random_states
from .._support.user_warning import warn_user
from ..arbiters import Arbiter
from ..criteria import Criterion, ScoreFunction
from ..criteria import resolve as resolve_criterion
from ..kinds import check_flag, check_kind
from ..maskable import checked_pairs
from ..parameters import Exclude, ParameterKey, check_not_synced, keys_by_name, left_in, listed, module_names, unwrap
from ..scoring.losses import Batch, TaskLosses, check_callable_losses
from ..scoring.score import score_for_removal
from .adapter.graph import TRACE_ERRORS
from .adapter.groups import find_groups
from .alike import check_counted, check_same_plan, check_same_steps
from .budget import Quantity
from .checks import check_options, check_plain, checked_steps
from .contest import Options, contest_of
from .groups import channel_parameters
from .latency import latency_of
from .layer_rule import Side
from .layers import has_own_inputs
from .order import ChannelRule
from .report import RemovalReport, tally
from .search import Removal, search_wider
from .spare import Spares
from .steps import amount_of_step, joined, naming_inputs
from .trial import prepare
from .witnesses import Witnesses, peeked


def remove_channels(
    model: nn.Module,
    losses: TaskLosses,
    data: Iterable[Batch],
    example_inputs: Any,
    amount: float | Mapping[str, float],
    *,
    of: Quantity = "channels",
    criterion: str | Criterion | ScoreFunction = "taylor",
    arbiter: str | Arbiter = "unanimous",
    across: str | Arbiter | None = "mean",
    reduction: str = "mean",
    normalizer: str | None = "mean",
    max_pruning_ratio: float = 1.0,
    round_to: int | Literal["auto"] | None = None,
    isomorphic: bool = False,
    exclude: Exclude = (),
    parameters: Iterable[ParameterKey] | None = None,
    num_batches: int | None = None,
    exact: bool = True,
    customized_pruners: Mapping[type[nn.Module], Any] | None = None,
    compare: Callable[[Any], Any] | None = None,
    steps: int = 1,
    between: Callable[[nn.Module, int], None] | None = None,
    schedule: Callable[[int], float] | None = None,
    ignored_layers: Collection[nn.Module] | None = None,
) -> RemovalReport:
    """Remove the channels that all tasks rank low, with everything that depends on them.

    The layers that make the outputs of every head keep theirs. Private heads are judged by their own task alone. Which
    channels go together is read from torch-pruning's dependency graph, on a copy; the removal is tried on another copy:
    forward and losses, in evaluation and training mode, must run, and give what they give with the same channels
    masked. Groups that break it are left alone and reported. Only then is the model changed.

    The peak of memory is the model, two copies of it (in double precision where it runs in that) and a tensor of scores
    for each task: about seven times the weights for two tasks (``benchmarks/structured_memory.py``).

    Args:
        model: The model; changed in place, on any device. Optimizers must be made anew afterwards.
        losses: ``losses(model, batch)`` runs the model once and returns one scalar loss per task.
        data: Any iterable of batches.
        example_inputs: Arguments of one forward, on the model's device: a tensor, a tuple or a dict.
        amount: How much to remove: a fraction (float in [0, 1]) or a number (int); or one for each part, as in
            ``{"shared": 0.5, "depth": 0.2}``, where a part is ``"shared"`` or the name of the only task that reaches
            it, and parts that are not listed keep all.
        of: What ``amount`` counts. ``"channels"``: of the groups that can be removed from, met exactly where channels
            can go one by one. ``"parameters"``, ``"macs"``: of the whole model, exceeded by less than one unit.
            ``"latency"``: of one forward's seconds on the example inputs, measured on copies until enough has gone.
        criterion: As in :func:`~disparse_plugin.score_tasks`.
        arbiter: As in :meth:`~disparse_plugin.TaskScores.importance`.
        across: The arbiter of how many channels each group loses, while ``arbiter`` says which. None: the same.
            Unanimity takes more from layers in which the tasks agree, mostly the first, whatever those are worth;
            ``"mean"`` does not (``docs/accuracy.md`` compares both).
        reduction: ``"mean"``, ``"sum"`` or ``"max"`` over the parameter slices of a channel.
        normalizer: As in :class:`~disparse_plugin.structured.DiSparseImportance`.
        max_pruning_ratio: No group loses a larger share of its channels; one channel stays in any case.
        round_to: Groups that lose channels keep a multiple of this. ``"auto"``: of what the kernels of the device are
            made for (16 or 8), in narrow layers of less. What that brings on a device,
            ``benchmarks/structured_latency.py`` shows.
        isomorphic: Rank groups of channels among those of their kind alone (the same types of layers follow), so that
            each kind loses the same share, as torch-pruning does with the option of that name. By default all compete.
        exclude: What must keep its outputs: modules (with everything inside them), names or glob patterns, as in
            :func:`~disparse_plugin.prunable_parameters`.
        parameters: What is scored; by default :func:`~disparse_plugin.structured.channel_parameters`, without tensors
            that layers share.
        num_batches: As in :func:`~disparse_plugin.score_tasks`.
        exact: Leave alone what cannot be removed without changing more than masking would: layers that torch-pruning
            maps wrongly, and what computes with the number or the sum of its channels. With False those are removed,
            and ``report.deviation`` says how far the outputs are off. Layers that take means over their channels
            (LayerNorm, RMSNorm, the norm of ConvNeXt V2) take them over those that are left.
        customized_pruners: As in torch-pruning: ``{class: tp.pruner.BasePruningFunc}``.
        compare: ``compare(outputs)`` returns what of the model's outputs must be equal to masking, where not all of it
            need be; by default every tensor.
        steps: In how many steps to remove: score, remove a share, score anew, and so on.
        between: ``between(model, step)`` is called after each step but the last, to train what is left (with a new
            optimizer). An error in it, or in a later step, leaves the model as the steps before made it.
        schedule: From a step (1 to ``steps``) to the share of the amount that is gone after it; by default
            ``step / steps``.
        ignored_layers: The old name of ``exclude``, for modules.

    Returns:
        The report, of all steps together.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the model carries masks or parametrizations, is in ``DistributedDataParallel`` (which would not
            sync the new parameters: wrap it afterwards), does not run on the example inputs, cannot be traced, has no
            removable group, the amount cannot be reached, the ranks of ``torch.distributed`` do not all find the same
            channels, or as :func:`~disparse_plugin.score_tasks`. The model is unchanged.
        RuntimeError: If another rank has failed. The model is unchanged.

    Warns:
        DeprecationWarning: If ``ignored_layers`` is given.

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
    with failing_together():
        check_options(amount, of, reduction, normalizer, max_pruning_ratio, round_to, isomorphic)
        check_counted(of)
        rule = ChannelRule.of(arbiter, across)
        options = Options(
            amount, of, rule, reduction, normalizer, max_pruning_ratio, round_to, customized_pruners, isomorphic
        )
        resolve_criterion(criterion)
        check_plain(root)
        check_not_synced(model)
        check_flag("exact", exact)
        check_kind("customized_pruners", customized_pruners, Mapping | None, "a mapping of classes to pruners, or None")
        check_callable_losses(losses)
        parameters = None if parameters is None else checked_pairs(parameters)
        left_out = _left_out(exclude, ignored_layers)
        source = _Source(
            losses, data, as_inputs(example_inputs), criterion, parameters, num_batches, left_out, compare, exact
        )
        shares = checked_steps(steps, between, schedule, data)
    check_same_steps(shares)
    with torch.inference_mode(False):
        return _removed(root, source, options, shares, between or _nothing)


@dataclasses.dataclass(frozen=True)
class _Source:
    """What a removal reads: losses, data, inputs, and how."""

    losses: TaskLosses
    data: Iterable[Batch]
    inputs: Inputs
    criterion: str | Criterion | ScoreFunction
    parameters: Iterable[ParameterKey] | None
    num_batches: int | None
    exclude: tuple[nn.Module | str, ...]
    compare: Callable[[Any], Any] | None
    exact: bool


def _left_out(exclude: Exclude, ignored_layers: Collection[nn.Module] | None) -> tuple[nn.Module | str, ...]:
    """Join what is excluded and what is so by the old name of the argument."""
    left_out = listed("exclude", exclude)
    if ignored_layers is None:
        return tuple(left_out)
    warn_user("ignored_layers: is called exclude now; pass exclude=[...]", DeprecationWarning)
    return (*left_out, *listed("ignored_layers", ignored_layers))


def _nothing(*_: Any) -> None:
    return None


def _removed(
    root: nn.Module,
    source: _Source,
    options: Options,
    shares: Sequence[float],
    between: Callable[[nn.Module, int], None],
) -> RemovalReport:
    """Remove in steps, each with scores of its own; return one report of all."""
    report: RemovalReport | None = None
    apart = [layer for layer in root.modules() if has_own_inputs(layer)]
    first: dict[tuple[str, Side], int] = {}
    for number, share in enumerate(shares):
        if report is not None:
            with failing_together():
                between(root, number)
        amount = amount_of_step(options.amount, share, report)
        whole = options.amount if report is None else None
        with same_random_states(root):
            removal = _found(root, source, dataclasses.replace(options, amount=amount, whole=whole, first=dict(first)))
        with failing_together():
            found = tally(removal, options.amount)
            found = dataclasses.replace(found, plan=naming_inputs(found.plan, root, apart))
            removal.plan.apply(root, customized_pruners=options.customized_pruners)
        report = found if report is None else joined(report, found, first.keys())
        for group in removal.contest.groups:
            first.setdefault(group.root, group.size)
    assert report is not None
    return report


def _found(root: nn.Module, source: _Source, options: Options) -> Removal:
    """Find what to remove from a model, which stays as it is."""
    with failing_together():
        data, watched = peeked(source.data), Witnesses(source.losses)
        first, kept = _first_losses(root, source.losses, data.first), _kept(root, source.exclude)
        groups, seen = find_groups(root, source.inputs, first, kept, options.customized_pruners)
        keys = _scored_parameters(root, groups.idle) if source.parameters is None else source.parameters
    scores = score_for_removal(
        root, watched, data, criterion=source.criterion, parameters=keys, num_batches=source.num_batches
    )
    with failing_together():
        names = module_names(root)
        late = {names[layer] for layer in watched.ran} & groups.idle
        untraced = dict.fromkeys(late, "runs in some batches only, which were not traced")
        own = {name for layer, name in names.items() if type(layer) in (options.customized_pruners or {})}
        spares = Spares(root, source.inputs, first if seen.only_in_losses else None, groups.kept | own)
        trial = prepare(
            root, source.inputs, source.losses, watched.batches, groups.last,
            compare=source.compare, customized_pruners=options.customized_pruners, exact=source.exact,
        )  # fmt: skip
        skipped = {**groups.skipped, **untraced}
        contest = contest_of(root, options, scores, groups.usable, seen.uses, skipped, lambda: trial.read)
        measure = latency_of(root, source.inputs, options.customized_pruners) if options.of == "latency" else None
        removal = search_wider(contest, trial, spares, measure)
    check_same_plan(removal.plan)
    return removal


def _first_losses(
    root: nn.Module, losses: TaskLosses, first: list[Batch]
) -> Callable[[nn.Module], list[Tensor]] | None:
    """Make what runs the losses on the first batch, in the mode of the model; None if they do not run."""

    def call(model: nn.Module) -> list[Tensor]:
        model.train(root.training)
        try:
            found = losses(model, copy.deepcopy(first[0]))
            return [loss for loss in found.values() if isinstance(loss, Tensor)]
        except TRACE_ERRORS:
            return []  # scoring says what is wrong

    return call if first else None


def _kept(root: nn.Module, exclude: Exclude) -> set[nn.Module | nn.Parameter]:
    """Return the layers and bare parameters that a user excludes."""
    everything = list(keys_by_name(root).values())
    gone = set(everything) - set(left_in(root, everything, exclude))
    kept: set[nn.Module | nn.Parameter] = {module for module, _ in gone if module is not root}
    return kept | {parameter for module, name in gone if (parameter := module._parameters[name]) is not None}


def _scored_parameters(root: nn.Module, idle: Collection[str]) -> list[ParameterKey]:
    """List what to score: not the layers that never run, whose weights a parent may read, and no shared Parameter."""
    names = module_names(root)
    owners: dict[int, int] = {}
    for module in root.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return [
        (module, name)
        for module, name in channel_parameters(root)
        if names[module] not in idle and owners[id(module._parameters[name])] == 1
    ]
