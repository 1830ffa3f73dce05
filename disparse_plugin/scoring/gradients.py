"""From one batch to one gradient per task: a single forward, and one backward for each task."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..maskable import Obstacle, read_by_parent
from ..parameters import ParameterKey, is_masked, is_masked_by_hook, is_masked_in_place, stored
from .hidden import hiding_function, refuse_hidden
from .uses import FirstUses, NotCopied


@dataclasses.dataclass
class _Weight:
    """What one forward does with one listed weight.

    Attributes:
        used: The tensors that its module computed with.
        ran: Whether the module ran.
        marker: A leaf in place of the weight until its module runs; what gets a gradient through it was read earlier.
        hidden_in: The autograd function inside which the module ran unseen, if any.
    """

    used: list[Tensor] = dataclasses.field(default_factory=list)
    ran: bool = False
    marker: Tensor | None = None
    hidden_in: str | None = None


class UsedWeights:
    """The tensors that the listed modules computed with during one forward.

    For a plain module that is its Parameter. For a module pruned by ``torch.nn.utils.prune`` it is the effective weight
    ``mask * weight_orig`` that the pruning hook makes anew at every call, and there is one per call if a module runs
    several times.

    Until a module runs, a marked leaf stands where its weight is read, as a pruning hook's product of the forward
    before would. If a loss reaches the leaf, a parent read the weight before the hook could fire. What a module does
    with its weight is watched the first time it runs.

    Attributes:
        unfit: What of the last forward shows that a mask would not do, by the index of the parameter.
    """

    def __init__(self, parameters: Sequence[ParameterKey], names: Sequence[str], *, to_mask: bool = True) -> None:
        """Take what is scored.

        Args:
            parameters: The ``(module, name)`` pairs.
            names: Their qualified names.
            to_mask: Whether the weights are to be masked, so that it matters how they are used.
        """
        self._parameters = parameters
        self._names = names
        self._by_module: dict[nn.Module, list[int]] = {}
        for index, (module, _) in enumerate(parameters):
            self._by_module.setdefault(module, []).append(index)
        self._to_mask = to_mask
        self._uses = FirstUses(parameters)
        self._weights = [_Weight() for _ in parameters]
        self._own = [None if is_masked_by_hook(*key) else stored(*key) for key in parameters]
        self.unfit: dict[int, Obstacle] = {}

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record while the block runs; the hooks that do so, and the marked leaves, are gone afterwards."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._unmark)
            for module in self._by_module:
                stack.callback(module.register_forward_pre_hook(NotCopied(self._record)).remove)
            if self._to_mask:
                stack.callback(self._uses.stop)
                self._uses.start()
            yield

    def begin(self) -> None:
        """Drop what was recorded, and mark the weights for the next forward."""
        self._unmark()
        self._weights = [_Weight() for _ in self._parameters]
        self.unfit = {}
        for weight, (module, name) in zip(self._weights, self._parameters, strict=True):
            if self._to_mask and not is_masked_in_place(module, name):  # which counts wherever it is read
                weight.marker = _leaf_like(getattr(module, name, None))
            if weight.marker is not None:
                module.__dict__[name] = weight.marker

    def _record(self, module: nn.Module, _: Any) -> None:
        for index in self._by_module[module]:
            weight, name = self._weights[index], self._parameters[index][1]
            self._take_mark(weight, module, name)
            own = self._own[index]
            # What functional_call puts in the place of a Parameter (a step of MAML) is made from it, or has no score.
            tensor = getattr(module, name) if own is None else own
            weight.ran = True
            if not torch.is_grad_enabled():
                weight.hidden_in = weight.hidden_in or hiding_function()
            if tensor.requires_grad and not any(tensor is seen for seen in weight.used):
                weight.used.append(tensor)

    def _unmark(self) -> None:
        for weight, key in zip(self._weights, self._parameters, strict=True):
            self._take_mark(weight, *key)

    @staticmethod
    def _take_mark(weight: _Weight, module: nn.Module, name: str) -> None:
        """Let a plain weight be read again; over that of a pruned module its hook has written already."""
        if weight.marker is not None and module.__dict__.get(name) is weight.marker and not is_masked(module, name):
            del module.__dict__[name]

    def gradients(self, losses: dict[str, Tensor]) -> Iterator[tuple[str, dict[int, Tensor]]]:
        """Differentiate each task's loss with respect to the used weights; the graph is freed after the last task.

        Args:
            losses: One scalar loss per task, made by the forward that was recorded. It is emptied on the way, so that
                what only one task uses of the graph (its head) is freed as soon as its gradients are there.

        Yields:
            ``(task, {index: gradient})`` with the indices of the parameters that this task's loss reaches, without
            those that turn out to be unfit. A task whose loss depends on no parameter in this batch (a constant) yields
            an empty dict.

        Raises:
            ValueError: If an autograd function hid the gradients of modules that ran inside it.
        """
        self.unfit.update(self._uses.unfit)
        refuse_hidden({self._names[index]: weight.hidden_in for index, weight in enumerate(self._weights)})
        owners, tensors = [], []
        for index, weight in enumerate(self._weights):
            # To be masked, not the Parameter of a module that does not run in this batch: a penalty on all reaches it.
            used = weight.used if weight.ran or self._to_mask else [stored(*self._parameters[index])]
            marked = [] if weight.marker is None else [weight.marker]
            for tensor in [*used, *marked]:
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
            yield task, self._by_parameter(owners, tensors, grads)

    def _by_parameter(
        self, owners: Sequence[int], tensors: Sequence[Tensor], grads: list[Tensor | None]
    ) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
        for position, index in enumerate(owners):
            grad, grads[position] = grads[position], None
            if grad is None:
                continue
            if grad.layout is not torch.strided:  # of an embedding with sparse=True
                grad = grad.to_dense()
            weight = self._weights[index]
            if tensors[position] is weight.marker:
                self.unfit.setdefault(index, self._misread(index))
            found[index] = grad if index not in found else found[index] + grad
        return {index: grad for index, grad in found.items() if index not in self.unfit}

    def _misread(self, index: int) -> Obstacle:
        key = self._parameters[index]
        return read_by_parent(key[0], ran=self._weights[index].ran, stale=is_masked(*key))


def _leaf_like(weight: object) -> Tensor | None:
    """Return a leaf with the values of a weight; None of what is no tensor."""
    if not isinstance(weight, Tensor):
        return None
    values = weight.detach()
    # Evaluation in inference mode leaves a product of a pruning hook that asks for no gradients.
    return (values.clone() if values.is_inference() else values).requires_grad_()
