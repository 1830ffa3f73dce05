"""How long one forward takes on the device that the model is on, as measured."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.benchmark import Timer

from .._support.example_inputs import Inputs, run
from .applying import Pruners
from .copies import copied
from .plan import RemovalPlan

# The shortest of a few medians: what else runs on a machine only ever adds time.
ROUNDS = 3
SECONDS_PER_ROUND = 0.15


def seconds(model: nn.Module, inputs: Inputs) -> float:
    """Measure one forward in evaluation mode, without gradients, with as many threads as torch has now.

    Args:
        model: The model; its mode is changed.
        inputs: From :func:`as_inputs`, on the model's device; they set the batch size.

    Returns:
        Seconds; the least of the medians of a few rounds.
    """
    model.eval()
    given = copy.deepcopy(inputs)
    with torch.inference_mode():
        names = {"run": run, "model": model, "inputs": given}
        timer = Timer("run(model, inputs)", globals=names, num_threads=torch.get_num_threads())
        run(model, given)
        return float(min(timer.blocked_autorange(min_run_time=SECONDS_PER_ROUND).median for _ in range(ROUNDS)))


def latency_of(model: nn.Module, inputs: Inputs, pruners: Pruners | None) -> Callable[[RemovalPlan], float]:
    """Make a function from a plan to the seconds that it leaves; each plan is measured once.

    Args:
        model: The model, which only copies stand in for.
        inputs: From :func:`as_inputs`.
        pruners: As in torch-pruning.
    """
    known: dict[tuple[tuple[str, str, int], ...], float] = {}

    def measure(plan: RemovalPlan) -> float:
        widths = tuple(sorted((cut.target, cut.side, len(cut.positions)) for cut in plan.cuts))
        if widths not in known:
            smaller = copied(model)
            plan.apply(smaller, customized_pruners=pruners)
            known[widths] = seconds(smaller, inputs)
        return known[widths]

    return measure
