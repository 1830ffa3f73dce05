"""Timing several models in turns, so that what else runs on a machine falls on all of them alike."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


@torch.no_grad()
def shares(models: Mapping[str, Callable[[Tensor], object]], x: Tensor, rounds: int) -> dict[str, tuple[float, float]]:
    """Time forwards of several models, one of each in every round.

    Args:
        models: By name; the first is what the others are compared with.
        x: The input.
        rounds: How many rounds; two more come before, to warm up.

    Returns:
        For each model the median of its seconds, and the median over the rounds of its share of the first one's.
    """
    found: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 2):
        for name, model in models.items():
            start = time.perf_counter()
            model(x)
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            found[name].append(time.perf_counter() - start)
    first = next(iter(found.values()))[2:]
    return {
        name: (
            statistics.median(seconds[2:]),
            statistics.median(own / other for own, other in zip(seconds[2:], first, strict=True)),
        )
        for name, seconds in found.items()
    }


def variants(model: nn.Module, x: Tensor, *, compiled: bool) -> dict[str, tuple[Callable[[Tensor], object], Tensor]]:
    """Return a model as it is, with channels last, and compiled, each with its input."""
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    found: dict[str, tuple[Callable[[Tensor], object], Tensor]] = {
        "plain": (model, x),
        "channels_last": (last, x.to(memory_format=torch.channels_last)),
    }
    if compiled:
        found["torch.compile"] = (torch.compile(copy.deepcopy(model)), x)
    return found
