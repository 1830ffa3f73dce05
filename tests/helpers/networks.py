"""Small multi-task models, their losses, and a way to see that a model was left alone."""

import copy
import random

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class TwoHeads(nn.Module):
    """A convolutional trunk with BatchNorm and dropout, and one linear head per task."""

    def __init__(self, tasks=("a", "b"), width=6):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.Dropout(0.2),
            nn.Flatten(),
        )
        self.heads = nn.ModuleDict({task: nn.Linear(width * 16, 3) for task in tasks})

    def forward(self, x):
        features = self.trunk(x)
        return {task: head(features) for task, head in self.heads.items()}


class PartlyShared(nn.Module):
    """Four tasks: ``ab`` is shared by two of them, ``abc`` by three, ``d`` stands alone, ``unused`` serves nobody."""

    def __init__(self):
        super().__init__()
        self.abc = nn.Linear(5, 6)
        self.ab = nn.Linear(6, 4)
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 3), "c": nn.Linear(6, 2)})
        self.d = nn.Linear(5, 3)
        self.unused = nn.Linear(5, 5)

    def forward(self, x):
        abc = self.abc(x).tanh()
        ab = self.ab(abc).tanh()
        return {"a": self.heads["a"](ab), "b": self.heads["b"](ab), "c": self.heads["c"](abc), "d": self.d(x)}


class Around(nn.Module):
    """Two heads of five inputs behind whatever comes first."""

    def __init__(self, first):
        super().__init__()
        self.first, self.heads = first, nn.ModuleDict({"a": nn.Linear(5, 4), "b": nn.Linear(5, 4)})

    def forward(self, x):
        x = self.first(x).tanh()
        return {task: head(x) for task, head in self.heads.items()}


def square_losses(model, batch):
    """One smooth loss per output; works for every model here that returns a dict."""
    outputs = model(batch).items()
    return {task: (output - 0.3 * position).square().mean() for position, (task, output) in enumerate(outputs)}


def digit_losses(model, batch):
    images, labels = batch
    return {task: F.cross_entropy(output, labels) for task, output in model(images).items()}


def digit_batches(count=3, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 1, 4, 4, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def vectors(count=3, size=4, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, width, generator=generator) for _ in range(count)]


class Snapshot:
    """Everything about a model, and about the random generators, that nobody may change behind a user's back."""

    def __init__(self, model):
        self.model = model
        self.identities = {name: id(tensor) for name, tensor in self._tensors()}
        self.values = {name: tensor.detach().clone() for name, tensor in self._tensors()}
        self.grads = {name: copy.deepcopy(p.grad) for name, p in model.named_parameters()}
        self.facts = self._facts()

    def _tensors(self):
        yield from self.model.named_parameters()
        yield from self.model.named_buffers()

    def _facts(self):
        return {
            "modes": [module.training for module in self.model.modules()],
            "requires_grad": [p.requires_grad for p in self.model.parameters()],
            "pre_hooks": [list(module._forward_pre_hooks.values()) for module in self.model.modules()],
            "hooks": [list(module._forward_hooks.values()) for module in self.model.modules()],
            "attributes": [sorted(vars(module)) for module in self.model.modules()],
            "effective": [id(vars(module).get("weight")) for module in self.model.modules()],
            "torch": torch.get_rng_state().tolist(),
            "numpy": str(np.random.get_state()),
            "python": random.getstate(),
        }

    def check(self):
        assert {name: id(tensor) for name, tensor in self._tensors()} == self.identities
        for name, tensor in self._tensors():
            assert torch.equal(tensor, self.values[name]), name
        for name, parameter in self.model.named_parameters():
            before = self.grads[name]
            assert (parameter.grad is None) if before is None else torch.equal(parameter.grad, before), name
        for what, value in self._facts().items():
            assert value == self.facts[what], what


class Standardised(nn.Linear):
    """Multiplies with its weight less the mean, as timm's StdConv2d does."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight - self.weight.mean(), self.bias)


class WithStandardised(nn.Module):
    """A trunk whose first layer cannot be masked, and two heads."""

    def __init__(self):
        super().__init__()
        self.std, self.trunk = Standardised(5, 5), nn.Linear(5, 5)
        self.a, self.b = nn.Linear(5, 2), nn.Linear(5, 3)

    def forward(self, x):
        x = self.trunk(self.std(x).relu()).tanh()
        return {"a": self.a(x), "b": self.b(x)}
