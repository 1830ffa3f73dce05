"""Every pruning method of this package, and every kind of module, in one form each: for tests that cross the two."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune

from disparse_plugin import (
    DiSparsePretrained,
    DiSparseSemiStructured,
    DiSparseStatic,
    DiSparseStructured,
    TaskScores,
)
from disparse_plugin.sparse_training import DiSparseDynamic


def random_like(module, name):
    value = getattr(module, name, None)
    sized = isinstance(value, torch.Tensor) and not is_lazy(value)
    return torch.rand(value.shape if sized else (4, 4))


def with_scores(method):
    def put(module, name, amount=0.5):
        return method.apply(module, name, amount, importance_scores=random_like(module, name))

    return put


def bound(module, name, amount=0.5):
    scores = TaskScores(module, {"a": {(module, name): random_like(module, name)}})
    return DiSparseStatic.bind(scores).apply(module, name, amount)


def two_of_four(module, name):
    return DiSparseSemiStructured.apply(module, name, importance_scores=random_like(module, name))


def dynamic(module, name):
    return DiSparseDynamic.apply(module, name, random_like(module, name) > 0.5)


# method(module, name) prunes about half of one tensor, as ``prune.random_unstructured(module, name, 0.5)`` does.
METHODS = {
    "static": with_scores(DiSparseStatic),
    "pretrained": with_scores(DiSparsePretrained),
    "bound": bound,
    "structured": with_scores(DiSparseStructured),
    "two of four": two_of_four,
    "dynamic": dynamic,
}
CLASSES = {
    "static": DiSparseStatic,
    "pretrained": DiSparsePretrained,
    "bound": DiSparseStatic,
    "structured": DiSparseStructured,
    "two of four": DiSparseSemiStructured,
    "dynamic": DiSparseDynamic,
}


def first_output(module, x):
    return module(x)[0]


def attend(module, x):
    return module(x, x, x)[0]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of module: how it is made, which of its tensors is pruned, what goes in, and how it is run."""

    make: Callable[[], nn.Module]
    name: str
    shape: tuple[int, ...]
    run: Callable = nn.Module.__call__


# Sizes are multiples of four, so that every pattern fits.
KINDS = {
    "Linear": Kind(lambda: nn.Linear(8, 4), "weight", (2, 8)),
    "Conv2d": Kind(lambda: nn.Conv2d(4, 8, 3), "weight", (2, 4, 5, 5)),
    "ConvTranspose1d": Kind(lambda: nn.ConvTranspose1d(4, 8, 3), "weight", (2, 4, 5)),
    "RNN": Kind(lambda: nn.RNN(8, 4, bidirectional=True), "weight_ih_l0_reverse", (3, 2, 8), first_output),
    "GRU": Kind(lambda: nn.GRU(8, 4), "weight_ih_l0", (3, 2, 8), first_output),
    "LSTM": Kind(lambda: nn.LSTM(8, 4, num_layers=2), "weight_hh_l1", (3, 2, 8), first_output),
    "LSTMCell": Kind(lambda: nn.LSTMCell(8, 4), "weight_ih", (2, 8), first_output),
    "MultiheadAttention": Kind(lambda: nn.MultiheadAttention(8, 2), "in_proj_weight", (3, 2, 8), attend),
}

each_method = pytest.mark.parametrize("method", METHODS)
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


class Pruned:
    """A module of one kind with one of its tensors pruned by one method, and what it was before."""

    def __init__(self, kind, method):
        self.kind, self.name = kind, kind.name
        self.module = kind.make()
        self.parameter = self.module._parameters[kind.name]
        self.x = torch.randn(kind.shape)
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.5)
        self.hook = METHODS[method](self.module, kind.name)

    @property
    def mask(self):
        return self.module._buffers[f"{self.name}_mask"]

    def run(self, module=None):
        return self.kind.run(module or self.module, self.x)

    def expected(self):
        """The output of a plain module whose weight is the original times the mask."""
        plain = self.kind.make()
        values = self.module.state_dict()
        values[self.name] = values.pop(f"{self.name}_orig") * values.pop(f"{self.name}_mask")
        plain.load_state_dict(values)
        return self.run(plain)

    def train(self):
        self.optimizer.zero_grad()
        self.run().square().sum().backward()
        self.optimizer.step()


def pruning_hooks(module):
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, prune.BasePruningMethod)]
