"""Do the tasks pull the shared weights the same way? Collected while scoring, without a backward of its own.

For two tasks with gradients ``g_a`` and ``g_b`` of one layer on one batch (alive entries only):

``cosine``
    ``<g_a, g_b> / (|g_a| |g_b|)``, negative where a step for one task undoes the other's (Yu et al., Gradient Surgery,
    NeurIPS 2020).
``conflicting``
    The share of weights with ``g_a * g_b < 0``. Half of them for unrelated gradients.

Both are means over the batches, with standard deviations, because the gradient of one batch is noisy.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._support.double import comparable
from .._support.text_table import Table, Tabular
from ..parameters import ParameterKey, alive_mask, score_dtype, stored


@dataclasses.dataclass(frozen=True)
class LayerConflict:
    """How two tasks' gradients of one layer relate, over the batches.

    Attributes:
        name: The layer's qualified name.
        tasks: The two tasks.
        cosine: Mean cosine; NaN if a gradient was zero in every batch.
        cosine_std: Its standard deviation over batches; 0 for one batch.
        conflicting: Mean share of weights with opposite signs.
        conflicting_std: Its standard deviation over batches.
        batches: In how many batches both tasks reached the layer.
    """

    name: str
    tasks: tuple[str, str]
    cosine: float
    cosine_std: float
    conflicting: float
    conflicting_std: float
    batches: int


class GradientConflict(Tabular):
    """Collects the conflict of the tasks' gradients: ``score_tasks(..., observe=GradientConflict())``.

    Holds on to a task's gradient of a layer only until the last task that shares the layer has had its turn, so the
    memory grows by the shared weights of all tasks but one. Criteria must not change the gradient they are given.

    Example:
        >>> from disparse_plugin import score_tasks
        >>> layer = torch.nn.Linear(4, 1, bias=False)
        >>> def losses(model, x):
        ...     return {"up": model(x).mean(), "down": -model(x).mean()}
        >>> conflict = GradientConflict()
        >>> scores = score_tasks(layer, losses, [torch.ones(2, 4)], observe=conflict)
        >>> [(found.name, found.tasks, round(found.cosine, 3), found.conflicting) for found in conflict.layers()]
        [('weight', ('up', 'down'), -1.0, 1.0)]
    """

    def __init__(self) -> None:
        self._keys: Sequence[ParameterKey] = ()
        self._names: Sequence[str] = ()
        self._waiting: dict[int, list[str]] = {}
        self._held: dict[int, dict[str, Tensor]] = {}
        self._found: dict[tuple[int, str, str], list[Tensor]] = {}

    def begin(self, keys: Sequence[ParameterKey], names: Sequence[str], losses: Mapping[str, Tensor]) -> None:
        """Look up in the graph of a new batch which tasks will reach which layers.

        Raises:
            ValueError: If these are not the parameters of what was collected so far.
        """
        if self._found and list(keys) != list(self._keys):
            raise ValueError(
                "observe: a GradientConflict must be of the same parameters of one model, found others than those of "
                "the scoring before; make a new one"
            )
        self._keys, self._names, self._held = keys, names, {}
        leaves = {task: _leaves(loss) for task, loss in losses.items()}
        reaching = [[task for task in losses if id(stored(*key)) in leaves[task]] for key in keys]
        self._waiting = {index: tasks for index, tasks in enumerate(reaching) if len(tasks) > 1}

    def add(self, task: str, grads: Mapping[int, Tensor]) -> None:
        """Compare one task's gradients with those of the tasks before it."""
        for index, grad in grads.items():
            if index not in self._waiting:
                continue
            flat = self._alive(index, grad)
            earlier = self._held.setdefault(index, {})
            for other, its in earlier.items():
                self._found.setdefault((index, other, task), []).append(_compare(its, flat))
            self._waiting[index] = [name for name in self._waiting[index] if name != task]
            if self._waiting[index]:
                earlier[task] = flat
            else:
                del self._held[index]

    def _alive(self, index: int, grad: Tensor) -> Tensor:
        weight, alive = stored(*self._keys[index]), alive_mask(*self._keys[index])
        values = grad.detach() if alive is None else grad.detach()[alive]
        return comparable(values.reshape(-1).to(score_dtype(weight)))

    def layers(self) -> list[LayerConflict]:
        """Return what was found: one entry per shared layer and pair of tasks, in the order of the parameters."""
        found = []
        for (index, first, second), batches in sorted(self._found.items(), key=lambda item: item[0][0]):
            cosines, shares = torch.stack(batches).T.tolist()
            defined = [cosine for cosine in cosines if not math.isnan(cosine)]
            found.append(
                LayerConflict(
                    self._names[index],
                    (first, second),
                    statistics.fmean(defined) if defined else math.nan,
                    statistics.pstdev(defined) if defined else math.nan,
                    statistics.fmean(shares),
                    statistics.pstdev(shares),
                    len(batches),
                )
            )
        return found

    def rows(self) -> list[dict[str, Any]]:
        """Return :meth:`layers` as flat rows, as :meth:`to_dataframe` takes them."""
        return [{**dataclasses.asdict(found), "tasks": " & ".join(found.tasks)} for found in self.layers()]

    def _table(self) -> Table:
        layers = self.layers()
        rows = [("layer", "tasks", "cosine (std)", "conflicting signs")]
        for found in layers:
            cosine = f"{found.cosine:+.3f} ({found.cosine_std:.3f})"
            rows.append((found.name, " & ".join(found.tasks), cosine, f"{100 * found.conflicting:.1f} %"))
        return Table(rows, left=2)


def _compare(a: Tensor, b: Tensor) -> Tensor:
    """Return cosine and share of conflicting signs as two numbers on the device."""
    # Signs are multiplied, not values: the product of two tiny gradients would round to zero.
    conflicting = (a.sign() * b.sign() < 0).double().mean()
    a, b = _scaled(a), _scaled(b)
    lengths = torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b)
    return torch.stack([(torch.dot(a, b) / lengths).double(), conflicting])


def _scaled(values: Tensor) -> Tensor:
    """Divide by the largest, so that squares neither vanish nor overflow at any scale of the loss; NaN for zeros."""
    return values / values.abs().amax() if values.numel() else values


def _leaves(loss: Tensor) -> set[int]:
    """Return the identities of the leaf tensors that a loss was computed from."""
    waiting, seen, found = [loss.grad_fn], set(), {id(loss)}
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found.add(id(leaf))
        waiting += [following for following, _ in node.next_functions]
    return found
