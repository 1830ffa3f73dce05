"""Tensors of a graph that modules keep after a forward: activations, and what an evaluation computes once for all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn


def of_graph(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors that are no leaves among values, and in lists, tuples and dicts of them.

    Example:
        >>> import torch
        >>> leaf = torch.ones(1, requires_grad=True)
        >>> len(list(of_graph([leaf, {"kept": [2 * leaf]}])))
        1
    """
    for value in values:
        if isinstance(value, Tensor) and not value.is_leaf:
            yield value
        elif isinstance(value, list | tuple):
            yield from of_graph(value)
        elif type(value) is dict:
            yield from of_graph(value.values())


@contextlib.contextmanager
def no_graph_kept(model: nn.Module) -> Iterator[None]:
    """Let modules keep, on the way out, nothing of the graphs of the forwards in between.

    What a module keeps would be computed from weights of another time, from a graph that is freed, and could not be
    copied. In attributes, and in dicts and lists among them: what stood there before comes back, what was not there
    goes.

    Example:
        >>> import torch
        >>> class Keeps(nn.Linear):
        ...     def forward(self, x):
        ...         self.last = super().forward(x)
        ...         return self.last
        >>> layer = Keeps(1, 1)
        >>> with no_graph_kept(layer):
        ...     output = layer(torch.ones(1))
        >>> "last" in vars(layer)
        False
    """
    modules = list(model.modules())
    tables = [(table, table.copy()) for module in modules for table in _tables(module)]
    lists = [(kept, kept.copy()) for module in modules for kept in vars(module).values() if isinstance(kept, list)]
    try:
        yield
    finally:
        for kept, before in lists:
            if _holds_graph(kept):
                kept[:] = before
        for table, entries in tables:
            for key in [key for key, value in table.items() if value is not entries.get(key) and _holds_graph(value)]:
                if key in entries:
                    table[key] = entries[key]
                else:
                    del table[key]


def _holds_graph(value: object) -> bool:
    return next(of_graph([value]), None) is not None


def _tables(module: nn.Module) -> Iterator[dict[Any, Any]]:
    yield vars(module)
    yield from (value for value in vars(module).values() if type(value) is dict)
