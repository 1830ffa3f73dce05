"""Any importance of torch-pruning as the per-task criterion: run once per task, on that task's gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...criteria import Criterion
from ...parameters import qualified_names, unwrap
from ...scoring.losses import Batch, TaskLosses
from ...scoring.sums import ScoreSums
from ..groups import ChannelGroup
from .private import group_like, tp, unnormalized


class BaseScores:
    """Each task's gradients, and a base importance that is shown one task's at a time.

    A task reaches a parameter if autograd says so. Gradients that a task does not have are shown as zeros, because
    torch-pruning's criteria fail on None; groups that a task does not reach at all are never shown.
    """

    def __init__(self, base: Any, model: nn.Module, losses: TaskLosses, data: Iterable[Batch]) -> None:
        """Collect the gradients.

        Criteria that accumulate squared gradients (``GroupHessianImportance``) get the mean over the batches of the
        squared batch gradient; with batches of one that is what their authors describe. All others get the sum.

        Raises:
            TypeError: If ``base`` is not callable.
            ValueError: If it is an ``OBDCImportance``, or a loss or gradient is not finite.
        """
        if not callable(base):
            raise TypeError(f"base: must be an importance of torch-pruning, found {type(base).__name__}")
        if isinstance(base, tp.importance.OBDCImportance):
            raise ValueError(
                "base: must be a criterion that reads gradients, found OBDCImportance, which gathers values of its own "
                "from the summed loss; use criterion='fisher', the same idea per task"
            )
        self._base, self._model, root = base, model, unwrap(model)
        self._squared = hasattr(base, "accumulate_grad") and hasattr(base, "zero_grad")
        self._grads = _collect(root, losses, data, self._squared)
        self.tasks = tuple(self._grads)

    def of_group(self, channels: ChannelGroup, group: Any) -> dict[str, Tensor]:
        """Run the base on one group for each task that reaches it.

        Returns:
            For each such task, float64 scores on the CPU, one per channel.

        Raises:
            ValueError: If the base returns NaN or infinity for a group whose gradients are not all zero.
        """
        parameters = [parameter for follower in channels.followers for parameter in _parameters(follower.layer)]
        copied = _copy_of(group)
        scores = {}
        for task, grads in self._grads.items():
            if not any(parameter in grads for parameter in parameters):
                continue
            with _shown(self._model, parameters, grads):
                if self._squared:
                    self._base.zero_grad()
                    self._base.accumulate_grad(self._model)
                values = _called(self._base, copied, channels.size)
            if values is not None:
                scores[task] = _finite(values, task, channels)
        return scores


def _called(base: Any, group: Any, size: int) -> Tensor | None:
    """Run a base on a group.

    The criteria of torch-pruning make their result as long as the first layer that they score, which for the query, key
    and value of an attention is three times the channels; the rest stays empty, but is averaged over.
    """
    values: Tensor | None = base(group)
    if values is None or len(values) <= size or not hasattr(base, "normalizer"):
        return values
    with unnormalized(base) as normalize:
        normalized: Tensor = normalize(base(group)[:size])
    return normalized


def _parameters(layer: nn.Module | Tensor) -> list[nn.Parameter]:
    if isinstance(layer, nn.Module):
        return list(layer.parameters())
    return [layer] if isinstance(layer, nn.Parameter) else []


def _collect(
    root: nn.Module, losses: TaskLosses, data: Iterable[Batch], squared: bool
) -> dict[str, dict[nn.Parameter, Tensor]]:
    """Add up each task's gradients, or their squares: scoring with a criterion that ignores the weight."""
    owners = {p: (m, name) for m in root.modules() for name, p in m._parameters.items() if p is not None}
    parameters = [p for p in root.parameters() if p.is_floating_point()]
    keys = [owners[parameter] for parameter in parameters]
    rule = Criterion("base", _square if squared else _itself, elementwise=True)
    sums, batches = ScoreSums(keys, qualified_names(root, keys), rule, to_mask=False), list(data)
    if not batches:
        raise ValueError("data: must hold at least one batch, found none")
    sums.add_batches(root, losses, batches)
    return {
        task: {
            # The base squares what it is shown.
            parameters[index]: (total / len(batches)).sqrt() if squared else total
            for index, total in totals.items()
        }
        for task, totals in sums.by_task.items()
    }


def _itself(weight: Tensor, grad: Tensor) -> Tensor:  # noqa: ARG001
    return grad


def _square(weight: Tensor, grad: Tensor) -> Tensor:  # noqa: ARG001
    return grad.square()


@contextlib.contextmanager
def _shown(model: nn.Module, parameters: list[nn.Parameter], grads: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Put one task's gradients into ``.grad`` of the given parameters, and nothing into others, for a while."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.grad = None
        for parameter in parameters:
            grad = grads.get(parameter)
            parameter.grad = torch.zeros_like(parameter) if grad is None else grad.clone()
        yield
    finally:
        for parameter, grad in before:
            parameter.grad = grad


def _copy_of(group: Any) -> Any:
    """Copy a group with indices in ascending order, and with the LayerNorm function that the criteria look for.

    Some criteria sort the indices in place without moving the channels that they belong to.
    """
    copied = group_like(group)
    for number, item in enumerate(group.items):
        order = sorted(range(len(item.idxs)), key=item.idxs.__getitem__)
        dep, handler = item.dep, item.dep.handler
        if isinstance(dep.target.module, nn.LayerNorm):
            handler = tp.function.prune_layernorm_out_channels
        dep = tp.dependency.Dependency(dep.trigger, handler, dep.source, dep.target)
        copied.add_dep(dep, [item.idxs[place] for place in order])
        copied[number].root_idxs = [item.root_idxs[place] for place in order]
    return copied


def _finite(values: Tensor, task: str, channels: ChannelGroup) -> Tensor:
    values = values.detach().cpu().double()
    if values.shape != (channels.size,):
        raise ValueError(
            f"base: must return one score per channel, found shape {tuple(values.shape)} for {channels.size} channels "
            f"of {channels.name}"
        )
    if bool(values.isnan().all()):
        return torch.zeros_like(values)  # torch-pruning's normalisation of a group of zeros
    if not bool(values.isfinite().all()):
        raise ValueError(f"base: must return finite scores, found NaN or infinity for task {task!r}, {channels.name}")
    return values
