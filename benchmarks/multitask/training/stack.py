"""Train many networks of one shape side by side: one step of all costs little more than one step of one.

Small networks spend their time on starting operations, on a GPU nearly all of it. Here every tensor of the networks is
stacked along a first axis, and ``torch.vmap`` runs them together. Each has its own weights, masks, batches and learning
rate, and is trained as :class:`.bench.Course` would train it alone, up to rounding.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from disparse_plugin.masks import attach_masks, masks_of

from ..problem.problem import Problem, Split
from .bench import Budget, Measured, factor
from .captured import captured
from .products import as_products

BETAS, EPSILON, MOMENTUM = (0.9, 0.999), 1e-8, 0.9


class Stack:
    """Networks of one shape: parameters in one table ``(networks, numbers)``, buffers stacked.

    Args:
        skeleton: A network of that shape, without masks.
        networks: How many there are; all are copies of ``skeleton`` at first.
        products: Whether convolutions are done as matrix products; if None, unless ``GROUPED_CONVOLUTIONS`` is set.
    """

    def __init__(self, skeleton: nn.Module, networks: int, *, products: bool | None = None) -> None:
        self._skeleton = copy.deepcopy(skeleton)
        self._runner = copy.deepcopy(skeleton)
        if not os.environ.get("GROUPED_CONVOLUTIONS") if products is None else products:
            as_products(self._runner)
        parameters = dict(skeleton.named_parameters())
        self._shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self._sizes = [parameter.numel() for parameter in parameters.values()]
        row = torch.cat([parameter.detach().flatten() for parameter in parameters.values()])
        self.values = row.repeat(networks, 1)
        self.masks = torch.ones_like(self.values)
        self.buffers = {
            name: buffer.unsqueeze(0).repeat(networks, *[1] * buffer.dim()) for name, buffer in skeleton.named_buffers()
        }

    def __len__(self) -> int:
        """Return the number of networks."""
        return len(self.values)

    def put(self, place: int, network: nn.Module) -> None:
        """Take over the weights, masks and buffers of a network, which may have masks or not."""
        masks, state = masks_of(network), dict(network.state_dict())
        for name, value in self._pieces(self.values[place]).items():
            value.copy_(state[f"{name}_orig" if name in masks else name])
        for name, mask in self._pieces(self.masks[place]).items():
            mask.copy_(masks[name]) if name in masks else mask.fill_(1)
        for name, buffer in self.buffers.items():
            buffer[place] = state[name]

    def mask(self, place: int, masks: Mapping[str, Tensor]) -> None:
        """Put masks, by parameter, on a network."""
        pieces = self._pieces(self.masks[place])
        for name, mask in masks.items():
            pieces[name].copy_(mask)

    def take(self, place: int) -> nn.Module:
        """Return a network of its own, with masks where something is masked, in training mode."""
        network = copy.deepcopy(self._skeleton)
        buffers = {name: buffer[place] for name, buffer in self.buffers.items()}
        network.load_state_dict({**self._pieces(self.values[place]), **buffers})
        masks = {name: mask != 0 for name, mask in self._pieces(self.masks[place]).items() if not bool(mask.all())}
        if masks:
            attach_masks(network, masks)
        return network.train()

    def _pieces(self, table: Tensor) -> dict[str, Tensor]:
        """View the parameters in the last axis of a table: ``(...,) + shape`` each."""
        parts = table.split(self._sizes, dim=-1)
        return {
            name: part.view(*table.shape[:-1], *shape)
            for part, (name, shape) in zip(parts, self._shapes.items(), strict=True)
        }

    def weights(self) -> dict[str, Tensor]:
        """Return the masked weights, each a leaf to differentiate by."""
        pieces = self._pieces(self.values * self.masks)
        return {name: piece.requires_grad_() for name, piece in pieces.items()}

    def outputs(
        self, weights: Mapping[str, Tensor], inputs: Tensor, *, train: bool, shared: bool = False
    ) -> dict[str, Tensor]:
        """Run all networks: ``inputs`` is ``(networks, n, ...)``, or ``(n, ...)`` if shared by all of them."""
        self._runner.train(train)

        def run(parameters: dict[str, Tensor], buffers: dict[str, Tensor], own: Tensor) -> dict[str, Tensor]:
            found: dict[str, Tensor] = functional_call(self._runner, (parameters, buffers), (own,))
            return found

        found: dict[str, Tensor] = torch.vmap(run, in_dims=(0, 0, None if shared else 0))(
            dict(weights), self.buffers, inputs
        )
        return found

    @torch.no_grad()
    def measure(self, problem: Problem, split: Split, size: int) -> list[Measured]:
        """Return every network's metrics on a split, ``size`` samples at a time."""
        weights = self._pieces(self.values * self.masks)
        parts: dict[str, list[Tensor]] = {task.name: [] for task in problem.tasks}
        targets: dict[str, list[Tensor]] = {task.name: [] for task in problem.tasks}
        for which in torch.arange(len(split), device=self.values.device).split(size):
            inputs, wanted = split.batch(which)
            for name, output in self.outputs(weights, inputs, train=False, shared=True).items():
                parts[name].append(output)
                targets[name].append(wanted[name])
        whole = {name: (torch.cat(parts[name], 1).cpu(), torch.cat(targets[name]).cpu()) for name in parts}
        return [
            _metrics(problem, {name: (out[place], to) for name, (out, to) in whole.items()})
            for place in range(len(self))
        ]


def _metrics(problem: Problem, found: Mapping[str, tuple[Tensor, Tensor]]) -> Measured:
    measured = {}
    for task in problem.tasks:
        collection = task.metrics()
        collection.update(*found[task.name])
        measured[task.name] = {name: float(value) for name, value in collection.compute().items()}
    return measured


class StackedCourse:
    """The training of a stack, to be stopped at a step and gone on with, as :class:`.bench.Course` for one network.

    Args:
        stack: The networks.
        problem: On the device of the stack.
        budget: Says the optimizer.
        rates: A learning rate per network.
        orders: Which samples each step trains on: int64 ``(networks, steps, batch size)``.

    Raises:
        ValueError: If the optimizer is another than SGD or AdamW.
    """

    def __init__(self, stack: Stack, problem: Problem, budget: Budget, rates: Sequence[float], orders: Tensor) -> None:
        if budget.optimizer == "adam":
            raise ValueError("optimizer: needs sgd or adamw, found adam; train one network at a time")
        self.stack, self.problem, self.budget = stack, problem, budget
        self.step, self.steps = 0, orders.shape[1]
        device = stack.values.device
        self._orders = orders.to(device)
        self._rates = torch.tensor(rates, device=device).unsqueeze(1)
        # What changes from step to step is looked up on the device, so that a recorded step can be replayed.
        table = [_of_step(budget, step, self.steps) for step in range(self.steps)]
        self._table = torch.tensor(table, dtype=torch.float64).to(device, stack.values.dtype)
        self._at = torch.zeros(1, dtype=torch.int64, device=device)
        self._first, self._second = torch.zeros_like(stack.values), torch.zeros_like(stack.values)
        self._advance: Callable[[], None] | None = None

    def run(self, until: int | None = None) -> None:
        """Train up to a step, the end by default."""
        end = self.steps if until is None else until
        if self._advance is None and self.step < end:
            state = [self.stack.values, *self.stack.buffers.values(), self._first, self._second, self._at]
            self._advance = captured(self._once, state)
        while self.step < end:
            assert self._advance is not None
            self._advance()
            self.step += 1

    def _once(self) -> None:
        """Take one step, without looking at a value on the host."""
        gradients = self._gradients(self._orders.index_select(1, self._at).squeeze(1))
        factor, first, second = self._table.index_select(0, self._at).unbind(1)
        with torch.no_grad():
            rates = self._rates * factor
            if self.budget.optimizer == "sgd":
                self._sgd(gradients, rates)
            else:
                self._adamw(gradients, rates, first, second)
            self._at.add_(1)

    def _gradients(self, which: Tensor) -> Tensor:
        """Return the gradient of each network's summed loss on its own batch: ``(networks, numbers)``."""
        inputs, targets = self.problem.train.batch(which.flatten())
        weights = self.stack.weights()
        outputs = self.stack.outputs(weights, inputs.unflatten(0, which.shape), train=True)
        total = torch.zeros((), device=which.device)
        for task in self.problem.tasks:
            each = torch.vmap(task.loss)(outputs[task.name], targets[task.name].unflatten(0, which.shape))
            total = total + task.weight * each.sum()  # a sum over networks that share nothing
        found = torch.autograd.grad(total, list(weights.values()))
        return torch.cat([gradient.flatten(1) for gradient in found], 1).mul_(self.stack.masks)

    def _sgd(self, gradients: Tensor, rates: Tensor) -> None:
        gradients.add_(self.stack.values, alpha=self.budget.decay)
        self._first.mul_(MOMENTUM).add_(gradients)
        self.stack.values.sub_(gradients.add_(self._first, alpha=MOMENTUM).mul_(rates))  # Nesterov's

    def _adamw(self, gradients: Tensor, rates: Tensor, first: Tensor, second: Tensor) -> None:
        self.stack.values.mul_(1 - rates * self.budget.decay)
        self._first.lerp_(gradients, 1 - BETAS[0])
        self._second.mul_(BETAS[1]).addcmul_(gradients, gradients, value=1 - BETAS[1])
        root = (self._second / second).sqrt_().add_(EPSILON)
        self.stack.values.sub_(self._first.div(root).mul_(rates / first))


def _of_step(budget: Budget, step: int, steps: int) -> tuple[float, float, float]:
    """Return the factor of the learning rate, and how far AdamW's two averages have come from their start at zero."""
    return factor(budget, step, steps), 1 - BETAS[0] ** (step + 1), 1 - BETAS[1] ** (step + 1)
