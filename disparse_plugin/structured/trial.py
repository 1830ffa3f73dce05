"""Trying a removal on a copy before it is done: what must run, and what must be equal to masking."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._support.double import knows_double
from .._support.example_inputs import Inputs, run
from .._support.stored import stored_numbers
from ..parameters import module_names
from ..scoring.losses import Batch, TaskLosses
from .adapter.graph import TRACE_ERRORS
from .adapter.observation import named_tensors
from .applying import Pruners
from .comparison import difference, narrowed
from .copies import copied, doubled, in_double
from .hooks import before_forward
from .layers import makes_channels, rule_of
from .masked_copy import mask
from .plan import RemovalPlan
from .reads import noting_reads
from .shrinking import kept_of

# Tensors by name. Names of what enters a layer begin with this.
_Found = list[tuple[str, Tensor]]
_ENTERS = "what enters "


@dataclasses.dataclass(frozen=True)
class Run:
    """One thing that must run, before and after.

    Attributes:
        what: In words.
        training: In which mode.
        call: Runs it on a model, and returns tensors by name; also what enters the layers of the given names.
        compared: Whether the values can be compared: not where every run draws other random numbers.
    """

    what: str
    training: bool
    call: Callable[[nn.Module, Collection[str]], _Found]
    compared: bool = True


@dataclasses.dataclass(frozen=True)
class Trial:
    """What a removal is tried on. Needs memory for two copies of the model, one after the other.

    Attributes:
        model: The model, never run.
        runs: What must run.
        last: Names of the layers that make the outputs.
        customized_pruners: As in torch-pruning.
        double: Whether the copies run in double precision, in which rounding cannot hide or feign a difference.
        tolerance: How far a removal may be from masking; None: any distance.
    """

    model: nn.Module
    runs: tuple[Run, ...]
    last: tuple[str, ...]
    customized_pruners: Pruners | None
    double: bool
    tolerance: float | None

    @functools.cached_property
    def read(self) -> Mapping[str, Collection[str]]:
        """The names of the numbers that modules hold and that the runs read, by module; of one that is unknown, all."""
        model = _fresh(self)
        every = {name: frozenset(stored_numbers(module)) for module, name in module_names(model).items()}
        with noting_reads(model) as read:
            if any(isinstance(_outcome(entry, model), str) for entry in self.runs):
                return every
        return {**every, **read}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a trial showed: what went wrong, or None; and how far the outputs were from masking."""

    failure: str | None
    deviation: float = 0.0


def prepare(
    model: nn.Module,
    inputs: Inputs,
    losses: TaskLosses,
    batches: Sequence[Batch],
    last: Sequence[str],
    *,
    compare: Callable[[Any], Any] | None,
    customized_pruners: Pruners | None,
    exact: bool,
) -> Trial:
    """Find out what runs on the model as it is, and in which precision.

    Args:
        model: The model; only copies of it run.
        inputs: Of one forward.
        losses: The user's losses.
        batches: What to run them on.
        last: Names of the layers that make the outputs.
        compare: From the outputs to what of them is compared; None: all tensors.
        customized_pruners: As in torch-pruning.
        exact: Whether a removal must equal masking.

    Returns:
        The trial. What does not run on the model before is not asked of it after.

    Raises:
        ValueError: If ``compare`` fails on what the model returns, or finds no tensor in it.
    """
    for double in (True, False) if all(knows_double(p.device) for p in model.parameters()) else (False,):
        give = doubled if double else copy.deepcopy
        runs = _runs(inputs, losses, batches, compare, give)
        dense = in_double(copied(model)) if double else copied(model)
        results = [_outcome(entry, dense) for entry in runs]
        if double and any(isinstance(result, str) for result in results):
            native = _runs(inputs, losses, batches, compare, copy.deepcopy)
            failing = [entry for entry, result in zip(native, results, strict=True) if isinstance(result, str)]
            if not all(isinstance(_outcome(entry, copied(model)), str) for entry in failing):
                continue  # something runs in the model's own precision only
        if compare is not None:
            _check_compare(results[0], partial(_outcome, _runs(inputs, losses, (), None, give)[0], dense))
        working = [entry for entry, result in zip(runs, results, strict=True) if not isinstance(result, str)]
        steady = tuple(
            dataclasses.replace(entry, compared=not entry.training or _repeats(entry, dense)) for entry in working
        )
        tolerance = _tolerance(model, double) if exact else None
        return Trial(model, steady, tuple(last), customized_pruners, double, tolerance)
    raise AssertionError("unreachable: the second round always returns")


def _check_compare(found: _Found | str, without: Callable[[], _Found | str]) -> None:
    """Refuse a ``compare`` that fails on the model as it is, or finds nothing: then nothing would be compared."""
    if isinstance(found, str):
        if not isinstance(without(), str):
            raise ValueError(f"compare: must take the outputs of the model as it is, found {found}; mend the function")
    elif not found:
        raise ValueError(
            "compare: must return at least one tensor of the outputs, found none; return what must be equal"
        )


def _tolerance(model: nn.Module, double: bool) -> float:
    """How far a removal may be from masking; in double precision 1e-11 is usual, more where a layer rounds to float."""
    if double:
        return 1e-5
    floating = [p for p in model.parameters() if p.is_floating_point()]
    coarse = sum(p.numel() for p in floating if torch.finfo(p.dtype).eps > 1e-5)
    return 1e-3 if coarse * 2 < sum(p.numel() for p in floating) else 0.1


def _runs(
    inputs: Inputs,
    losses: TaskLosses,
    batches: Sequence[Batch],
    compare: Callable[[Any], Any] | None,
    give: Callable[[Any], Any],
) -> list[Run]:
    def forward(model: nn.Module, watched: Collection[str]) -> _Found:
        with torch.no_grad(), _entering(model, watched) as entered:
            outputs = run(model, give(inputs))
        return [*named_tensors(compare(outputs) if compare else outputs), *entered]

    def losses_on(batch: Batch) -> Callable[[nn.Module, Collection[str]], _Found]:
        def call(model: nn.Module, _: Collection[str]) -> _Found:
            with torch.enable_grad():
                return [(f"the loss of task {task!r}", v.detach()) for task, v in losses(model, give(batch)).items()]

        return call

    found = []
    for training, mode in ((False, "evaluation"), (True, "training")):
        found.append(Run(f"the forward in {mode} mode", training, forward))
        found += [Run(f"the losses in {mode} mode", training, losses_on(batch)) for batch in batches]
    return found


@contextlib.contextmanager
def _entering(model: nn.Module, watched: Collection[str]) -> Iterator[_Found]:
    """Note what enters some layers in evaluation mode."""
    found: _Found = []
    modules = {name: module for module, name in module_names(model).items()}
    with contextlib.ExitStack() as stack:
        for name in watched if not model.training else ():

            def note(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                found.extend((f"{_ENTERS}{name}", x.detach()) for x in inputs[:1] if isinstance(x, Tensor))

            stack.callback(before_forward(modules[name], note).remove)
        yield found


def _outcome(entry: Run, model: nn.Module, seed: int = 0, watched: Collection[str] = ()) -> _Found | str:
    model.train(entry.training)
    try:
        # Seeding reaches every card, also those that the model is not on.
        cards = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices=cards):
            torch.manual_seed(seed)
            return entry.call(model, watched)
    except TRACE_ERRORS as error:
        return f"an error in {entry.what}: {' '.join(str(error).split())[:120]}"


def _repeats(entry: Run, model: nn.Module) -> bool:
    """Tell whether two runs with other random numbers agree."""
    first, second = _outcome(entry, model, 1), _outcome(entry, model, 2)
    if isinstance(first, str) or isinstance(second, str) or len(first) != len(second):
        return False
    return all(difference(a, b, floor=0.05).size < 1e-6 for (_, a), (_, b) in zip(first, second, strict=True))


def verdict(trial: Trial, plan: RemovalPlan) -> Verdict:
    """Try a plan on a copy, and compare with another copy in which the same positions are masked.

    Returns:
        What went wrong first, or None, and the largest difference.
    """
    smaller = _fresh(trial)
    try:
        plan.apply(smaller, customized_pruners=trial.customized_pruners)
    except TRACE_ERRORS as error:
        return Verdict(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
    removed, watched = [], _watched(trial, plan)
    for entry in trial.runs:
        result = _outcome(entry, smaller, watched=watched)
        if isinstance(result, str):
            return Verdict(result)
        removed.append(result)
    del smaller
    masked = mask(_fresh(trial).eval(), list(plan.cuts), trial.customized_pruners)
    kept: dict[tuple[str, str], tuple[int, Tensor]] = {
        (cut.target, cut.side): (cut.count, kept_of(cut.count, cut.positions)) for cut in plan.cuts
    }
    largest = 0.0
    for entry, result in zip(trial.runs, removed, strict=True):
        expected = _outcome(entry, masked, watched=watched)
        if isinstance(expected, str):
            return Verdict(f"with masked channels, {expected}")
        failure, size = _compared(trial, entry, _narrowed(masked, expected, result, kept), result)
        largest = max(largest, size)
        if failure is not None:
            return Verdict(failure, largest)
    return Verdict(None, largest)


def _watched(trial: Trial, plan: RemovalPlan) -> list[str]:
    """Name the layers before which a removal is compared with masking, beside the outputs.

    Those that make the outputs, which may be constant; and those that lose inputs, which may end in a branch that
    gives nothing yet: a last layer or a scale that starts at zero hides behind it that other channels were taken.
    """
    modules = {name: module for module, name in module_names(trial.model).items()}
    losing = [cut.target for cut in plan.cuts if cut.side == "in" and makes_channels(modules.get(cut.target))]
    return list(dict.fromkeys([*trial.last, *losing]))


def _fresh(trial: Trial) -> nn.Module:
    return in_double(copied(trial.model)) if trial.double else copied(trial.model)


def _narrowed(
    masked: nn.Module, found: _Found, removed: _Found, kept: Mapping[tuple[str, str], tuple[int, Tensor]]
) -> _Found:
    """Take the channels that are left out of what enters the watched layers of the masked copy.

    Those that a layer loses are its own. Others may be gone beside them: a layer over tokens is given channels, too.
    """
    modules = {name: module for module, name in module_names(masked).items()}
    narrow = []
    for (what, tensor), (_, left) in zip(found, removed, strict=False):
        name = what.removeprefix(_ENTERS)
        if name != what and (name, "in") in kept:
            rule = rule_of(modules[name])
            assert rule is not None
            _, places = kept[name, "in"]
            tensor = tensor.index_select(rule.channel_dim(modules[name], tensor), places.to(tensor.device))
        if name != what:
            tensor = narrowed(tensor, left, kept.values())
        narrow.append((what, tensor))
    return [*narrow, *found[len(narrow) :]]


def _compared(trial: Trial, entry: Run, expected: _Found, found: _Found) -> tuple[str | None, float]:
    """Compare one run; return what went wrong, or None, and the largest difference."""
    if [name for name, _ in expected] != [name for name, _ in found]:
        return f"{entry.what} gives {len(found)} tensors instead of {len(expected)}", math.inf
    floor, largest = 1e-3 if trial.double else 0.05, 0.0
    for (name, masked), (_, removed) in zip(expected, found, strict=True):
        if masked.shape != removed.shape:
            changed = f"from {tuple(masked.shape)} to {tuple(removed.shape)}"
            return f"the outputs change {changed} ({name} of {entry.what})", math.inf
        if not entry.compared or (name.startswith(_ENTERS) and _is_noise(masked, removed, double=trial.double)):
            continue
        found_difference = difference(masked, removed, floor=floor)
        largest = max(largest, found_difference.size)
        if trial.tolerance is not None and not found_difference.size <= trial.tolerance:
            return (
                f"the outputs differ from those with masked channels by {found_difference.size:.1e} ({name} of "
                f"{entry.what}: {found_difference.where})"
            ), largest
    return None, largest


def _is_noise(first: Tensor, second: Tensor, *, double: bool) -> bool:
    """Tell whether two tensors differ by rounding alone, as sums do that would be zero; layers expect values near 1."""
    return bool(torch.allclose(first, second, rtol=0, atol=1e-10 if double else 1e-5))


def _differ(one: RemovalPlan, other: RemovalPlan) -> bool:
    return one.attributes != other.attributes


def culprits(
    trial: Trial,
    plan_of: Callable[[Sequence[int], frozenset[int]], RemovalPlan],
    groups: Sequence[int],
    numbered: frozenset[int],
) -> tuple[dict[int, str], frozenset[int]]:
    """Find groups without which the removal works, by trying halves on top of what is known to work.

    Args:
        trial: What to try on.
        plan_of: Makes the plan for some groups, given by their numbers; the second are those for which numbers that
            modules hold of their width change too.
        groups: Numbers of groups that fail together.
        numbered: For which of them numbers change already.

    Returns:
        Number of each culprit to what goes wrong with it, and the groups for which numbers must change.
    """
    accepted: list[int] = []
    found: dict[int, str] = {}

    def admit(part: Sequence[int]) -> None:
        nonlocal numbered
        failure = verdict(trial, plan_of([*accepted, *part], numbered)).failure
        if failure is not None and len(part) == 1:
            otherwise = numbered ^ {part[0]}
            plan = plan_of([*accepted, *part], otherwise)
            if _differ(plan, plan_of([*accepted, *part], numbered)) and verdict(trial, plan).failure is None:
                numbered, failure = otherwise, None
        if failure is None:
            accepted.extend(part)
        elif len(part) == 1:
            found[part[0]] = failure
        else:
            admit(part[: len(part) // 2])
            admit(part[len(part) // 2 :])

    admit(list(groups))
    return found, numbered
