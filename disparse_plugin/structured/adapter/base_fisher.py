"""The Fisher information that torch-pruning's ``OBDCImportance`` reads, per task.

torch-pruning's own collection hooks every backward pass of the summed loss, reads the last use of a layer only, and
fails on layers with a bias, grouped and transposed convolutions, and on tokens. Here the same sums are made per task.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..._support.undisturbed import undisturbed
from ...parameters import ParameterKey
from ...scoring.losses import Batch, TaskLosses, check_losses
from .private import tp

# For each layer that a task reaches, the Fisher information of its weight.
Fisher: TypeAlias = dict[nn.Module, Tensor]

# The uses of a layer in one forward: what came in, what went out.
_Uses: TypeAlias = list[tuple[nn.Module, Tensor, Tensor]]


def fisher_per_task(
    root: nn.Module, losses: TaskLosses, data: Iterable[Batch], layers: Iterable[nn.Module]
) -> dict[str, Fisher]:
    """Estimate the diagonal of each task's Fisher information as ``OBDCImportance.step`` does.

    ``F_k[w] = mean over batches of sum over samples b of (B g_kb)^2``, where ``B`` is the number of samples and
    ``g_kb`` the part of the gradient of task k's loss that comes from sample b. With a loss that is a mean over the
    batch, ``B g_kb`` is the gradient of one sample's loss.

    Args:
        root: The model; left as it was.
        losses: As for :func:`~disparse_plugin.score_tasks`.
        data: Batches.
        layers: Convolutions and linear layers of the model; dimension 0 of what they read is taken for the samples.

    Returns:
        By task, then layer: a tensor of the weight's shape.

    Raises:
        ValueError: If there is no batch, or a value is not finite.
    """
    wanted = list(layers)
    keys: list[ParameterKey] = [(layer, "weight") for layer in wanted]
    sums: dict[str, Fisher] = {}
    count, tasks = 0, None
    with undisturbed(root, keys):
        for batch in data:
            with _recorded(wanted) as uses:
                by_task = check_losses(losses(root, batch), tasks, count)
            tasks, count = tuple(by_task), count + 1
            for number, (task, loss) in enumerate(by_task.items()):
                _add(sums.setdefault(task, {}), uses, loss, retain=number + 1 < len(by_task))
    if not count:
        raise ValueError("data: must hold at least one batch, found none")
    for task, fisher in sums.items():
        for layer, value in fisher.items():
            if not bool(value.isfinite().all()):
                raise ValueError(f"losses: every gradient must be finite, found NaN or infinity for task {task!r}")
            fisher[layer] = value / count
    return sums


@contextlib.contextmanager
def _recorded(layers: Iterable[nn.Module]) -> Iterator[_Uses]:
    uses: _Uses = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        uses.append((layer, inputs[0].detach(), output))
        return output.clone()  # what follows may write into it

    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield uses
    finally:
        for handle in handles:
            handle.remove()


def _add(sums: Fisher, uses: _Uses, loss: Tensor, *, retain: bool) -> None:
    outputs = [output for _, _, output in uses]
    if not loss.requires_grad or not outputs:
        return
    grads = torch.autograd.grad(loss, outputs, retain_graph=retain, allow_unused=True)
    by_layer: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
    for (layer, inputs, _), grad in zip(uses, grads, strict=True):
        if grad is not None:
            by_layer.setdefault(layer, []).append((inputs, grad))
    for layer, pairs in by_layer.items():
        value = _sum_of_squares(layer, pairs)
        sums[layer] = sums[layer] + value if layer in sums else value


def _sum_of_squares(layer: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Square each sample's gradient of the weight, summed over the uses of the layer, and add the samples up."""
    weight = layer.get_parameter("weight")
    total, samples = torch.zeros_like(weight), len(pairs[0][0])
    for sample in range(samples):
        grad = torch.zeros_like(weight)
        for inputs, outer in pairs:
            part = slice(sample, sample + 1)
            grad += torch.autograd.grad(layer.forward(inputs[part]), weight, outer[part])[0]
        total += (samples * grad).square()
    return total.detach()


@contextlib.contextmanager
def fisher_shown(base: Any, group: Any, fisher: Mapping[nn.Module, Tensor]) -> Iterator[None]:
    """Let an ``OBDCImportance`` read one task's values for a group.

    It multiplies the values with the weights of the outputs that a group lists, so they are cut to those. Layers that
    the task does not reach have none. ``num_classes``, by which torch-pruning skips the layers whose values its
    collection lacks, is without effect: here none is lacking.
    """
    before = {name: getattr(base, name) for name in ("Fisher", "steps", "num_classes")}
    shown: dict[nn.Module, Tensor] = {}
    for dep, idxs in [item for item in group if isinstance(item.dep.target.module, tuple(base.target_types))]:
        layer = dep.target.module
        shown.setdefault(layer, torch.zeros(1, device=layer.weight.device))  # looked up for inputs too, but not used
        if dep.handler in (tp.function.prune_conv_out_channels, tp.function.prune_linear_out_channels):
            value = fisher.get(layer, torch.zeros_like(layer.weight))
            shown[layer] = (value.transpose(0, 1) if getattr(layer, "transposed", False) else value)[idxs].flatten(1)
    try:
        base.Fisher, base.steps, base.num_classes = shown, 1, -1
        yield
    finally:
        for name, value in before.items():
            setattr(base, name, value)
