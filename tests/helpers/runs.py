"""Helpers of the tests of sparse training: a training loop, layers with given gradients, and what is alive."""

from types import MappingProxyType

import torch
from torch import nn
from torch.nn.utils import prune

from disparse_plugin import prunable_parameters
from disparse_plugin.sparse_training import DiSparseScheduler
from networks import TwoHeads, digit_batches, digit_losses


class GivenGradients(nn.Module):
    """One linear layer per entry; with :func:`given_losses` the gradient of each weight is what one wants it to be."""

    def __init__(self, sizes):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, 1, bias=False) for size in sizes)

    def forward(self, _):
        return [layer(torch.eye(layer.in_features)).flatten() for layer in self.layers]


def given_losses(gradients):
    """``gradients[task][layer]`` is a list of numbers; a task does not reach the layers that it does not list."""

    def losses(model, batch):
        outputs = model(batch)
        return {
            task: sum((outputs[layer] * torch.tensor(row)).sum() for layer, row in rows.items())
            for task, rows in gradients.items()
        }

    return losses


def masked_model(weights, alive):
    """A :class:`GivenGradients` with these weights and masks, one list of numbers and of bools per layer."""
    model = GivenGradients([len(row) for row in weights])
    for layer, row, mask in zip(model.layers, weights, alive, strict=True):
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([row]))
        prune.custom_from_mask(layer, "weight", torch.tensor([mask]))
    return model


def frozen_steps(scheduler, optimizer, batches=(None,)):
    """Optimizer steps that change no weight (gradients are None), each followed by the scheduler's."""
    updates = []
    for batch in batches:
        optimizer.zero_grad()
        optimizer.step()
        updates.append(scheduler.step(batch))
    return updates


def alive_places(model):
    return [set(mask.reshape(-1).nonzero().flatten().tolist()) for mask in masks_of(model).values()]


def masks_of(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("weight_mask")}


def alive_count(model):
    return sum(int(mask.sum()) for mask in masks_of(model).values())


def weights_total(model):
    return sum(
        module._parameters.get("weight_orig", module._parameters.get("weight")).numel()
        for module, _ in prunable_parameters(model)
    )


class Run:
    """A training run of two heads on random digits: everything a script would have, in one place."""

    scheduler_class = DiSparseScheduler
    defaults = MappingProxyType({"amount": 0.8, "update_every": 2, "stop_at": 100})

    def __init__(self, optimizer=None, losses=digit_losses, model=None, **options):
        torch.manual_seed(0)
        self.model = TwoHeads() if model is None else model
        make = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-2))
        self.optimizer = make(self.model.parameters())
        self.losses = losses
        self.scheduler = self.scheduler_class(self.model, self.optimizer, losses, **{**self.defaults, **options})

    def train(self, steps, first=0):
        """Train on batches ``first`` to ``first + steps - 1`` and return the updates that happened."""
        updates = []
        for batch in digit_batches(first + steps)[first:]:
            self.optimizer.zero_grad()
            sum(self.losses(self.model, batch).values()).backward()
            self.optimizer.step()
            updates.append(self.scheduler.step(batch))
        return [update for update in updates if update is not None]

    def parts(self):
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
