"""Trying a removal on a copy before it is done: all must run that ran, and be equal to masking."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..parameters import module_names
from .adapter.graph import TRACE_ERRORS
from .comparison import difference, narrowed
from .layers import makes_channels, rule_of
from .masked_copy import mask
from .plan import RemovalPlan
from .shrinking import kept_of
from .trial import ENTERS, Found, Run, Trial, outcome


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a trial showed: what went wrong, or None; and how far the outputs were from masking."""

    failure: str | None
    deviation: float = 0.0


def verdict(trial: Trial, plan: RemovalPlan) -> Verdict:
    """Try a plan on a copy, and compare with another copy in which the same positions are masked.

    Returns:
        What went wrong first, or None, and the largest difference.
    """
    smaller = trial.copy()
    try:
        plan.apply(smaller, customized_pruners=trial.customized_pruners)
    except TRACE_ERRORS as error:
        return Verdict(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
    removed, watched = [], _watched(trial, plan)
    for entry in trial.runs:
        result = outcome(entry, smaller, watched=watched)
        if isinstance(result, str):
            return Verdict(result)
        removed.append(result)
    del smaller
    masked = mask(trial.copy().eval(), list(plan.cuts), trial.customized_pruners)
    kept: dict[tuple[str, str], tuple[int, Tensor]] = {
        (cut.target, cut.side): (cut.count, kept_of(cut.count, cut.positions)) for cut in plan.cuts
    }
    largest = 0.0
    for entry, result in zip(trial.runs, removed, strict=True):
        expected = outcome(entry, masked, watched=watched)
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


def _narrowed(
    masked: nn.Module, found: Found, removed: Found, kept: Mapping[tuple[str, str], tuple[int, Tensor]]
) -> Found:
    """Take the channels that are left out of what enters the watched layers of the masked copy.

    Those that a layer loses are its own. Others may be gone beside them: a layer over tokens is given channels, too.
    """
    modules = {name: module for module, name in module_names(masked).items()}
    narrow = []
    for (what, tensor), (_, left) in zip(found, removed, strict=False):
        name = what.removeprefix(ENTERS)
        if name != what and (name, "in") in kept:
            rule = rule_of(modules[name])
            assert rule is not None
            _, places = kept[name, "in"]
            tensor = tensor.index_select(rule.channel_dim(modules[name], tensor), places.to(tensor.device))
        if name != what:
            tensor = narrowed(tensor, left, kept.values())
        narrow.append((what, tensor))
    return [*narrow, *found[len(narrow) :]]


def _compared(trial: Trial, entry: Run, expected: Found, found: Found) -> tuple[str | None, float]:
    """Compare one run; return what went wrong, or None, and the largest difference."""
    if [name for name, _ in expected] != [name for name, _ in found]:
        return f"{entry.what} gives {len(found)} tensors instead of {len(expected)}", math.inf
    floor, largest = 1e-3 if trial.double else 0.05, 0.0
    for (name, masked), (_, removed) in zip(expected, found, strict=True):
        if masked.shape != removed.shape:
            changed = f"from {tuple(masked.shape)} to {tuple(removed.shape)}"
            return f"the outputs change {changed} ({name} of {entry.what})", math.inf
        if not entry.compared or (name.startswith(ENTERS) and _is_noise(masked, removed, double=trial.double)):
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
