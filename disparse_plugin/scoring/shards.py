"""Scores of weights that are spread over ranks: gradients through ``backward``, sums of what lies here.

``torch.autograd.grad`` goes around what ``fully_shard`` does after a backward: it averages the gradients of all ranks
and leaves each its share. So each task's loss runs a backward of its own, over the one graph of the batch, and the
gradient is taken off ``.grad``, which is as before in the end. Between tasks the gathered weights are freed again, as
in training. The mean is taken before the absolute value: one batch of a score is the batches of all ranks together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .._support.distributed import averaged, gathered
from .._support.shards import is_sharded, local
from ..parameters import ParameterKey, stored
from .gradients import UsedWeights, _Weight
from .hidden import refuse_hidden


def any_sharded(parameters: Sequence[ParameterKey]) -> bool:
    """Tell whether one of the parameters is a DTensor.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> any_sharded([(layer, "weight")])
        False
    """
    return any(is_sharded(stored(*key)) for key in parameters)


class ShardedWeights(UsedWeights):
    """The listed weights during one forward, and their gradients, of which each rank gets its share.

    Unlike its base it does not look for weights that a parent reads: what masks a sharded weight is zeros in the weight
    itself, wherever it is read.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[ParameterKey], names: Sequence[str]) -> None:
        """Take what is scored.

        Args:
            model: The model, unwrapped.
            parameters: The ``(module, name)`` pairs.
            names: Their qualified names.
        """
        super().__init__(parameters, names)
        # Taken now: during a forward, what fully_shard has gathered stands in their place.
        self._stored = [stored(*key) for key in parameters]
        self._every = list(model.parameters())

    def begin(self) -> None:
        """Drop what was recorded."""
        self._weights = [_Weight() for _ in self._parameters]
        self.unfit = {}

    def gradients(self, losses: dict[str, Tensor]) -> Iterator[tuple[str, dict[int, Tensor]]]:
        """Run one backward for each task, all ranks together; the graph is freed after the last.

        Args:
            losses: As in :meth:`UsedWeights.gradients`; the same tasks on all ranks.

        Yields:
            ``(task, {index: gradient})`` with what of each gradient lies here: the mean over all ranks.
        """
        self.unfit.update(self._uses.unfit)
        refuse_hidden({self._names[index]: weight.hidden_in for index, weight in enumerate(self._weights)})
        # A task without a graph on one rank must not leave the others waiting for its gradients.
        flags = gathered({task: bool(loss.requires_grad) for task, loss in losses.items()})
        differentiable = [task for task in losses if all(of_rank[task] for of_rank in flags)]
        for task in list(losses):
            loss = losses.pop(task)
            if task not in differentiable:
                yield task, {}
                continue
            with _gradients_apart(self._every):
                loss.backward(retain_graph=task != differentiable[-1])
                del loss
                found = self._taken()
            yield task, found

    def _taken(self) -> dict[int, Tensor]:
        """Return the gradients of the listed parameters, averaged where ``fully_shard`` has not done so."""
        weights = self._stored
        plain = [index for index, weight in enumerate(weights) if not is_sharded(weight)]
        reached = {index for index, weight in enumerate(weights) if weight.grad is not None}
        if plain:
            reached |= {index for of_rank in gathered([i for i in plain if i in reached]) for index in of_rank}
        found = {}
        for index in sorted(reached - self.unfit.keys()):
            weight, grad = weights[index], weights[index].grad
            if not is_sharded(weight):
                found[index] = averaged(torch.zeros_like(weight) if grad is None else grad.detach())
            elif grad is not None:
                found[index] = local(grad.redistribute(placements=weight.placements))  # type: ignore[attr-defined]
        return found


@contextlib.contextmanager
def _gradients_apart(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Give every parameter a fresh ``.grad`` inside; afterwards each has again the one that it had.

    What was to happen to a gradient (masks, an optimizer in the backward) does not happen inside.
    """
    before = [parameter.grad for parameter in parameters]
    # The table that Tensor.register_post_accumulate_grad_hook writes to; None where it never did.
    tables = [table for p in parameters if (table := getattr(p, "_post_accumulate_grad_hooks", None))]
    hooks = [dict(table) for table in tables]
    try:
        for parameter in parameters:
            parameter.grad = None
        for table in tables:
            table.clear()
        yield
    finally:
        for parameter, grad in zip(parameters, before, strict=True):
            parameter.grad = grad
        for table, entries in zip(tables, hooks, strict=True):
            table.update(entries)
