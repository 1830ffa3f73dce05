"""One procedure of benchmarks/scoring.py, run and measured in a process of its own; prints its figures as JSON.

===============  ====================================================================================================
``floor``        what no method can avoid: one forward and T ``autograd.grad`` calls per batch, nothing kept
``package``      ``score_tasks`` by ``abs(w * g)`` and ``TaskScores.masks``
``recommended``  the same by ``layer_adaptive(damped(taylor, 0.5))``
``authors``      the procedure of the DiSparse authors, written from its description: a deep copy of the network with a
                 mask of ones on every weight; T full forwards and T backwards per batch; the absolute mask gradients
                 summed; then, per task, ``torch.cat`` and a sorted ``torch.topk``, and the union of the tasks' masks.
                 Where it changes no mask, the cheaper way is taken: no division by the sum of the scores, bool masks
                 where theirs are int32, no printing, no pruning hooks.
===============  ====================================================================================================
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disparse_plugin import prunable_parameters, score_tasks
from models.paper_network import TASK_SETS, DenseBatch, PaperNetwork, random_batches, task_loss, task_losses

# The variants of this package, and by which criterion they score.
CRITERIA = {"package": "snip", "recommended": "layer_adaptive(damped(taylor, 0.5))"}
# The authors' scores: for each task, those of the trunk and then those of its own head, in the order of the modules.
MaskScores = dict[str, list[Tensor]]


class Meter:
    """Seconds and peak memory of named steps, on a CPU or a CUDA device."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self.peak_mib: dict[str, float] = {}

    def measure(self, step: str, work: Callable[[], Any]) -> Any:
        """Run ``work`` and add its seconds to ``step``; the peak is that of the process so far."""
        self._synchronize()
        start, cpu_start = time.perf_counter(), time.process_time()
        result = work()
        self._synchronize()
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start
        self.cpu_seconds[step] = self.cpu_seconds.get(step, 0.0) + time.process_time() - cpu_start
        if self._cuda:
            self.peak_mib[step] = torch.cuda.max_memory_allocated() / 2**20
        else:
            unit = 2**20 if sys.platform == "darwin" else 2**10
            self.peak_mib[step] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        return result

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


def floor(network: nn.Module, batches: Sequence[DenseBatch]) -> None:
    """Differentiate every task's loss with respect to all prunable weights, and drop the gradients."""
    weights = [module.get_parameter(name) for module, name in prunable_parameters(network)]
    for batch in batches:
        losses = list(task_losses(network, batch).values())
        for number, loss in enumerate(losses, 1):
            torch.autograd.grad(loss, weights, retain_graph=number < len(losses), allow_unused=True)
        del loss, losses  # or the heads of this batch would live on during the next forward


def count_weights(part: nn.Module) -> int:
    """Count the prunable weights of a module."""
    return sum(module.get_parameter(name).numel() for module, name in prunable_parameters(part))


def masked_copy(network: PaperNetwork) -> PaperNetwork:
    """Copy a network and multiply every weight in the forward by a trainable mask of ones; the weights are frozen."""
    copied = copy.deepcopy(network)
    for module, name in prunable_parameters(copied):
        weight = module.get_parameter(name).requires_grad_(False)
        module.register_parameter("mask", nn.Parameter(torch.ones_like(weight)))
        module.forward = MethodType(_masked_convolution, module)
    return copied


def _masked_convolution(self: nn.Conv2d, x: Tensor) -> Tensor:
    weight = self.weight * self.get_parameter("mask")
    return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def authors_scores(network: PaperNetwork, batches: Sequence[DenseBatch]) -> MaskScores:
    """Sum the absolute mask gradients of each task over the batches, with one full forward per task and batch."""
    copied = masked_copy(network)
    masks = {task: _masks(copied.trunk) + _masks(head) for task, head in copied.heads.items()}
    scores: MaskScores = {}
    for images, targets in batches:
        for task, of_task in masks.items():
            copied.zero_grad()
            outputs = copied(images)
            task_loss(task, outputs[task], targets[task]).backward()
            found = [mask.grad.abs() for mask in of_task if mask.grad is not None]
            if task in scores:
                for total, score in zip(scores[task], found, strict=True):
                    total += score
            else:
                scores[task] = found
    return scores


def _masks(part: nn.Module) -> list[nn.Parameter]:
    return [module.get_parameter("mask") for module, _ in prunable_parameters(part)]


def authors_masks(scores: MaskScores, shared: int, keep: float, meter: Meter) -> tuple[list[Tensor], MaskScores]:
    """Keep each task's top fraction, and on the trunk what any task keeps.

    Args:
        scores: As :func:`authors_scores` returns them.
        shared: How many parameters the trunk has.
        keep: The fraction that each task keeps.
        meter: Told how long ``topk`` takes, of all that is done here.

    Returns:
        The masks of the trunk, and for each task those of its head.
    """
    kept: MaskScores = {}
    for task, parts in scores.items():
        joined = torch.cat([part.flatten() for part in parts])
        size = int(keep * joined.numel())
        top, _ = meter.measure("topk", partial(torch.topk, joined, size, sorted=True))
        kept[task] = [part >= top[-1] for part in parts]
    union = []
    for masks in zip(*(parts[:shared] for parts in kept.values()), strict=True):
        dropped = ~masks[0]
        for mask in masks[1:]:
            dropped = dropped & ~mask
        union.append(~dropped)
    return union, {task: parts[shared:] for task, parts in kept.items()}


def measured(variant: str, network: PaperNetwork, batches: Sequence[DenseBatch], amount: float, meter: Meter) -> None:
    """Run one procedure under the meter."""
    if variant == "floor":
        meter.measure("scoring", lambda: floor(network, batches))
    elif variant in CRITERIA:
        rule = CRITERIA[variant]
        scores = meter.measure("scoring", lambda: score_tasks(network, task_losses, batches, criterion=rule))
        meter.measure("masks", lambda: scores.masks(amount))
    else:
        found = meter.measure("scoring", lambda: authors_scores(network, batches))
        shared = len(prunable_parameters(network.trunk))
        meter.measure("masks", lambda: authors_masks(found, shared, 1 - amount, meter))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Build the network, warm up, run one procedure, and return what it took."""
    torch.manual_seed(0)
    tasks, device = TASK_SETS[arguments.tasks], arguments.device
    small = PaperNetwork(tasks, width=2, hidden=4).to(device)
    small_batches = random_batches(tasks, batches=1, batch=1, size=33, device=device)
    network = PaperNetwork(tasks, width=arguments.width, hidden=arguments.hidden).to(device)
    batches = random_batches(
        tasks, batches=arguments.batches, batch=arguments.batch, size=arguments.size, device=device
    )
    # At their first use kernels are loaded, and those of convolutions chosen and compiled for the shape.
    measured(arguments.variant, small, small_batches, arguments.amount, Meter(device))
    floor(network, batches[:1])
    meter = Meter(device)
    measured(arguments.variant, network, batches, arguments.amount, meter)
    return {
        "seconds": meter.seconds,
        "cpu_seconds": meter.cpu_seconds,
        "peak_mib": meter.peak_mib,
        "weights": count_weights(network),
        "scores": sum(count_weights(network.trunk) + count_weights(head) for head in network.heads.values()),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "",
    }


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line that benchmarks/scoring.py writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=("floor", *CRITERIA, "authors"), required=True)
    parser.add_argument("--tasks", type=int, choices=sorted(TASK_SETS), default=2)
    parser.add_argument("--size", type=int, default=129)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--amount", type=float, default=0.9)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(words)


if __name__ == "__main__":
    print(json.dumps(run(parse())))
