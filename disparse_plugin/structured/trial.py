"""Trying a removal on a copy, and finding the groups that break the model."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .adapter.graph import TRACE_ERRORS
from .adapter.observation import Inputs, call
from .masked_copy import masked_copy
from .plan import RemovalPlan


@dataclasses.dataclass
class Trial:
    """Runs plans on copies of a model that itself stays as it is.

    Attributes:
        model: The model, never run.
        inputs: What to run it on.
        plan: Makes the plan for a choice of groups, given by their numbers.
        customized_pruners: As in torch-pruning.
        tolerance: How far, relative to the size of an output, a removal may be from masking; None: any distance.
        deviation: How far the last removal that ran was from masking.
    """

    model: nn.Module
    inputs: Inputs
    plan: Callable[[Sequence[int]], RemovalPlan]
    customized_pruners: Any = None
    tolerance: float | None = None
    deviation: float = 0.0

    def __post_init__(self) -> None:
        """Note the shapes of the outputs in each mode that the model can run in."""
        self._expected = {}
        for training in (False, True):
            result = self._run(copy.deepcopy(self.model), training)
            if not isinstance(result, str):
                self._expected[training] = result

    def smaller(self, groups: Sequence[int]) -> nn.Module:
        """Return a copy of the model after the removal from the given groups."""
        smaller = copy.deepcopy(self.model)
        self.plan(groups).apply(smaller, customized_pruners=self.customized_pruners)
        return smaller

    def failure(self, groups: Sequence[int]) -> str | None:
        """Say what goes wrong when the given groups lose their channels; None if nothing does."""
        try:
            smaller = self.smaller(groups)
        except TRACE_ERRORS as error:
            return _one_line(error)
        # In evaluation mode first: a forward in training mode changes the statistics of BatchNorm.
        for training, expected in sorted(self._expected.items()):
            result = self._run(smaller, training)
            if isinstance(result, str):
                return result
            if result != expected:
                return f"the outputs change from {_shapes(expected)} to {_shapes(result)}"
            if not training:
                self.deviation = self._deviation(groups, smaller)
                if self.tolerance is not None and not self.deviation <= self.tolerance:
                    return f"the outputs differ from those with masked channels by {self.deviation:.1e}"
        return None

    def _deviation(self, groups: Sequence[int], smaller: nn.Module) -> float:
        masked = masked_copy(self.model, self.plan(groups).cuts)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            firsts = call(masked, copy.deepcopy(self.inputs))
            seconds = call(smaller.eval(), copy.deepcopy(self.inputs))
        return max((_difference(a, b) for a, b in zip(firsts, seconds, strict=True)), default=0.0)

    def culprits(self, groups: Sequence[int]) -> dict[int, str]:
        """Find groups without which the removal works, by trying halves on top of what is known to work.

        Args:
            groups: Numbers of groups that fail together.

        Returns:
            Number of each culprit to what goes wrong with it.
        """
        accepted: list[int] = []
        found: dict[int, str] = {}

        def admit(part: Sequence[int]) -> None:
            failure = self.failure([*accepted, *part])
            if failure is None:
                accepted.extend(part)
            elif len(part) == 1:
                found[part[0]] = failure
            else:
                admit(part[: len(part) // 2])
                admit(part[len(part) // 2 :])

        admit(list(groups))
        return found

    def _run(self, model: nn.Module, training: bool) -> list[torch.Size] | str:
        model.train(training)
        inputs = copy.deepcopy(self.inputs)
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                return [tensor.shape for tensor in call(model, inputs)]
        except TRACE_ERRORS as error:
            return _one_line(error)


def tolerance_of(model: nn.Module) -> float:
    """Return how large rounding errors may become, relative to the output, in the model's precision."""
    return max((1e-3 if p.dtype in (torch.float32, torch.float64) else 0.1) for p in model.parameters())


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy of a model."""
    try:
        return copy.deepcopy(model)
    except RuntimeError:
        # Some models cache tensors of a graph in their evaluation mode; a change of mode drops them.
        modes = [(module, module.training) for module in model.modules()]
        model.train(not model.training)
        model.train(not model.training)
        for module, mode in modes:
            module.training = mode
        return copy.deepcopy(model)


def _one_line(error: BaseException) -> str:
    return f"the forward fails: {' '.join(str(error).split())[:120]}"


def _difference(first: Tensor, second: Tensor) -> float:
    scale = float(first.abs().max()) if first.numel() else 0.0
    return float((first - second).abs().max()) / scale if scale > 0 else 0.0


def _shapes(sizes: Sequence[torch.Size]) -> str:
    return ", ".join(str(tuple(size)) for size in sizes)
