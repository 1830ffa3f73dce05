"""From one batch to one gradient per task: a single forward, and one backward for each task."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..parameters import ParameterKey, is_masked, stored


class UsedWeights:
    """The tensors that the listed modules computed with during one forward.

    For a plain module that is its Parameter. For a module pruned by ``torch.nn.utils.prune`` it is the effective weight
    ``mask * weight_orig`` that the pruning hook makes anew at every call, and there is one per call if a module runs
    several times. A module that never runs has none: if a loss reaches its weight all the same, a parent read it
    directly, and a pruning hook would never fire.
    """

    def __init__(self, parameters: Sequence[ParameterKey], names: Sequence[str]) -> None:
        self._parameters = parameters
        self._names = names
        self._used: list[list[Tensor]] = [[] for _ in parameters]
        self._ran = [False] * len(parameters)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record while the block runs; the hooks that do so are gone afterwards."""
        with contextlib.ExitStack() as stack:
            for index, (module, name) in enumerate(self._parameters):
                stack.callback(module.register_forward_pre_hook(self._recorder(index, name)).remove)
            yield

    def _recorder(self, index: int, name: str) -> Callable[[nn.Module, Any], None]:
        def record(module: nn.Module, _: Any) -> None:
            tensor = getattr(module, name)
            self._ran[index] = True
            if tensor.requires_grad and not any(tensor is seen for seen in self._used[index]):
                self._used[index].append(tensor)

        return record

    def forget(self) -> None:
        """Drop what was recorded, before the next forward."""
        self._used = [[] for _ in self._parameters]
        self._ran = [False] * len(self._parameters)

    def gradients(self, losses: dict[str, Tensor]) -> Iterator[tuple[str, dict[int, Tensor]]]:
        """Differentiate each task's loss with respect to the used weights; the graph is freed after the last task.

        Args:
            losses: One scalar loss per task, made by the forward that was recorded. It is emptied on the way, so that
                what only one task uses of the graph (its head) is freed as soon as its gradients are there.

        Yields:
            ``(task, {index: gradient})`` with the indices of the parameters that this task's loss reaches. A task whose
            loss depends on no parameter in this batch (a constant) yields an empty dict.

        Raises:
            ValueError: If a loss reaches the weight of a module that did not run.
        """
        owners, tensors = [], []
        for index, used in enumerate(self._used):
            for tensor in used if self._ran[index] else [stored(*self._parameters[index])]:
                owners.append(index)
                tensors.append(tensor)
        differentiable = [task for task, loss in losses.items() if loss.requires_grad]
        for task in list(losses):
            loss = losses.pop(task)
            if task not in differentiable:
                yield task, {}
                continue
            retain = task != differentiable[-1]
            grads: list[Tensor | None] = []
            grads.extend(torch.autograd.grad(loss, tensors, retain_graph=retain, allow_unused=True))
            del loss  # the last that holds the part of the graph that only this task uses
            yield task, self._by_parameter(owners, grads)

    def _by_parameter(self, owners: Sequence[int], grads: list[Tensor | None]) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
        for position, index in enumerate(owners):
            grad, grads[position] = grads[position], None
            if grad is None:
                continue
            if not self._ran[index]:
                self._refuse_bypassed(index)
            found[index] = grad if index not in found else found[index] + grad
        return found

    def _refuse_bypassed(self, index: int) -> None:
        module, name = self._parameters[index]
        state = "already carries a mask that is stale" if is_masked(module, name) else "would never be masked"
        raise ValueError(
            f"parameters: {self._names[index]} must be used by its own module's forward, found that a parent reads it "
            f"directly ({type(module).__name__}.forward never ran, as in nn.MultiheadAttention), so torch's pruning "
            f"hook does not fire and the weight {state}; leave it out: parameters=prunable_parameters(model, "
            "exclude=[that module])"
        )
