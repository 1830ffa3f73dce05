"""One seed of one setting: the problem, a network's start, its dense training, and how everything is trained."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from disparse_plugin import TaskScores, score_tasks
from disparse_plugin.agreement.budgets import part_of
from disparse_plugin.masks import masks_of
from disparse_plugin.sparse_training import joint

from ..problem.problem import Batch, Problem, Split

Measured = dict[str, dict[str, float]]  # task -> metric -> value
Backward: TypeAlias = Callable[[nn.Module, Batch], None]  # fills the gradients


@dataclass(frozen=True)
class Budget:
    """How much of everything, for every method alike."""

    train: int  # optimizer steps of the dense network
    tune: int  # steps after pruning; methods that prune at the start or while training get both
    batch_size: int
    scored: int  # batches that weights are scored on
    rates: tuple[float, ...]  # learning rates to choose from, by validation
    optimizer: Literal["sgd", "adamw", "adam"] = "sgd"
    decay: float = 5e-4  # weight decay: decoupled in AdamW, an L2 penalty otherwise
    update_every: int = 25  # steps between the updates of dynamic methods
    tune_rates: tuple[float, ...] = ()  # to choose from after pruning, where not the same
    step_decay: tuple[float, int] | None = None  # the learning rate times a factor every so many steps; else one cycle
    evaluated: int = 256  # samples per batch of evaluation
    scored_size: int = 0  # samples in a batch that weights are scored on; 0 is the batch size

    def quick(self) -> Budget:
        """Return next to nothing, to see that everything runs."""
        return replace(
            self, train=6, tune=4, batch_size=min(self.batch_size, 16), scored=1, rates=self.rates[:2], update_every=2
        )


@dataclass(frozen=True)
class Setting:
    """A problem with its network and budget."""

    name: str
    load: Callable[[Path], Problem]
    network: Callable[[Problem], nn.Module]
    budget: Budget
    dense: Callable[[Bench], Backward] | None = None  # how the dense network is trained, if not on the summed loss
    trained: bool = False  # the network starts from weights that were trained long before
    long_rates: tuple[float, ...] = ()  # learning rates to choose from when trained longer, where not those of all


class Bench:
    """Everything that the methods of one seed have in common.

    All methods start from the same initial weights; those that prune a trained network from the same dense one. The
    order of the batches depends on the seed and the stage alone.
    """

    def __init__(self, setting: Setting, problem: Problem, seed: int, dense_rate: float, device: torch.device) -> None:
        self.budget, self.problem, self.seed = setting.budget, problem, seed
        self.dense_rate, self.device = dense_rate, device
        self._dense_backward = setting.dense(self) if setting.dense else None
        torch.manual_seed(seed)
        self._initial = setting.network(problem).to(device)
        self.scores_of_dense: dict[str, TaskScores] = {}  # filled by cuts that score the trained network
        self.summed = joint(self.losses, {task.name: task.weight for task in problem.tasks})

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Run the model once and return each task's own loss: what DiSparse sees."""
        inputs, targets = batch
        outputs = model(inputs)
        return {task.name: task.loss(outputs[task.name], targets[task.name]) for task in self.problem.tasks}

    def initial(self) -> nn.Module:
        """Return a fresh network in training mode, always the same."""
        return copy.deepcopy(self._initial).train()

    @cached_property
    def _dense(self) -> nn.Module:
        model = self.initial()
        with torch.random.fork_rng():  # whoever asks first must not find other random numbers than the next
            torch.manual_seed(self.seed)
            backward = self._dense_backward
            Course(self, model, self.budget.train, self.dense_rate, stage=0, backward=backward).run()
        return model.eval()

    def dense(self) -> nn.Module:
        """Return a copy of the dense trained network, in evaluation mode."""
        return copy.deepcopy(self._dense)

    @cached_property
    def dense_on_validation(self) -> Measured:
        """The dense trained network's metrics on the validation split."""
        return self.measure(self.dense(), self.problem.validation)

    @property
    def has_dense(self) -> bool:
        """Whether the dense network is there already, trained or taken over."""
        return "_dense" in vars(self)

    def set_dense(self, state: Mapping[str, Tensor]) -> None:
        """Take over a dense network that was trained before."""
        model = self.initial()
        model.load_state_dict(dict(state))
        self.__dict__["_dense"] = model.eval()

    @cached_property
    def scored(self) -> list[Batch]:
        """The training batches that weights are scored on."""
        size = self.budget.scored_size or self.budget.batch_size
        order = batch_order(len(self.problem.train), self.budget.scored, size, self._stream(9))
        return [self._to_device(self.problem.train.batch(which)) for which in order]

    @cached_property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """The tasks that reach each weight tensor, by its name."""
        scores = score_tasks(self.initial(), self.losses, self.scored[:1], criterion="magnitude")
        return {name: scores.tasks_reaching(*key) for name, key in zip(scores.names, scores.parameters, strict=True)}

    def run(self, procedure: Callable[[Bench, float, float], nn.Module], amount: float, rate: float) -> nn.Module:
        """Carry out a method; its random numbers do not depend on what was done before."""
        torch.manual_seed(self.seed)
        return procedure(self, amount, rate)

    def order(self, steps: int, stage: int) -> Tensor:
        """Return which samples each step of a stage trains on: int64 ``(steps, batch size)``."""
        return batch_order(len(self.problem.train), steps, self.budget.batch_size, self._stream(stage))

    def training_batch(self, which: Tensor) -> Batch:
        """Return training samples on the device."""
        return self._to_device(self.problem.train.batch(which))

    def _stream(self, stage: int) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * self.seed + stage)

    def _to_device(self, batch: Batch) -> Batch:
        inputs, targets = batch
        # Convolutions take over the layout of their input; channels last makes a step on the Rooms 1.3 times faster.
        layout = torch.channels_last if inputs.dim() == 4 else torch.contiguous_format
        moved = inputs.to(self.device, memory_format=layout)
        return moved, {task: target.to(self.device) for task, target in targets.items()}

    @torch.no_grad()
    def measure(self, model: nn.Module, split: Split) -> Measured:
        """Return every task's metrics on a split."""
        collections = {task.name: task.metrics().to(self.device) for task in self.problem.tasks}
        model.eval()
        for which in torch.arange(len(split)).split(self.budget.evaluated):
            inputs, targets = self._to_device(split.batch(which))
            for task, output in model(inputs).items():
                collections[task].update(output, targets[task])
        return {
            task: {name: float(value) for name, value in collection.compute().items()}
            for task, collection in collections.items()
        }

    def sparsity(self, model: nn.Module) -> dict[str, Any]:
        """Count weights masked or gone: in all, of the shared part and each task's own, and the tensors left empty."""
        masks, weights = masks_of(model), dict(model.named_parameters())
        sizes = {name: self._initial.get_parameter(name).numel() for name in self.parts}
        left = {name: int(masks[name].sum()) if name in masks else weights[name].numel() for name in self.parts}
        pruned = {name: size - left[name] for name, size in sizes.items()}
        members: dict[str, list[str]] = {}
        for name, tasks in self.parts.items():
            members.setdefault(part_of(tasks), []).append(name)
        return {
            "weights": sum(sizes.values()),
            "pruned": sum(pruned.values()),
            "sparsity": {
                part: sum(pruned[n] for n in names) / sum(sizes[n] for n in names) for part, names in members.items()
            },
            "emptied": [name for name, size in sizes.items() if pruned[name] == size],
        }


class Course:
    """One course of training, that can be stopped at a step, taken back to it and gone on with.

    The learning rate is a function of the step: linear warm-up over a tenth of the course, then a cosine to zero; or
    steps down, where the budget says so. ``backward(model, batch)`` fills the gradients, by default with those of the
    summed loss.
    """

    def __init__(
        self,
        bench: Bench,
        model: nn.Module,
        steps: int,
        rate: float,
        *,
        stage: int,
        backward: Backward | None = None,
    ) -> None:
        self.bench, self.model, self.steps, self.rate = bench, model, steps, rate
        self.step = 0
        self._backward = backward or (lambda model, batch: bench.summed(model, batch)["joint"].backward())
        self.optimizer = _optimizer(model, rate, bench.budget)
        self._order = bench.order(steps, stage)

    def run(self, until: int | None = None, after_step: Callable[[Batch], Any] | None = None) -> None:
        """Train up to a step, the end by default; ``after_step`` is called with the batch of each step."""
        self.model.train()
        end = self.steps if until is None else until
        while self.step < end:
            batch = self.bench.training_batch(self._order[self.step])
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * factor(self.bench.budget, self.step, self.steps)
            self.optimizer.zero_grad()
            self._backward(self.model, batch)
            self.optimizer.step()
            if after_step is not None:
                after_step(batch)
            self.step += 1


def factor(budget: Budget, step: int, steps: int) -> float:
    """Return what the learning rate is multiplied by at a step of so many, in (0, 1]."""
    if budget.step_decay is None:
        return one_cycle(step, steps)
    share, every = budget.step_decay
    return share ** (step // every)


def one_cycle(step: int, steps: int) -> float:
    """Return the factor of the learning rate at a step, in (0, 1]."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def batch_order(samples: int, steps: int, batch_size: int, generator: torch.Generator) -> Tensor:
    """Go through the samples in a new random order again and again: int64 ``(steps, batch size)``."""
    needed = steps * batch_size
    passes: list[Tensor] = []
    for epoch in count():
        if epoch * samples >= needed:
            break
        passes.append(torch.randperm(samples, generator=generator))
    return torch.cat(passes)[:needed].view(steps, batch_size)


def _optimizer(model: nn.Module, rate: float, budget: Budget) -> Optimizer:
    if budget.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=budget.decay)
    kind = torch.optim.AdamW if budget.optimizer == "adamw" else torch.optim.Adam
    return kind(model.parameters(), lr=rate, weight_decay=budget.decay, fused=True)  # a quarter of the time on a core
