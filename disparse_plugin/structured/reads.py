"""Which numbers that modules hold are read while a model runs: one that nothing reads says nothing of a shape."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from .._support.stored import stored_numbers
from ..parameters import module_names


@contextlib.contextmanager
def noting_reads(model: nn.Module) -> Iterator[dict[str, set[str]]]:
    """Note which numbers of which modules are read inside the ``with`` block.

    Modules are given a class of their own meanwhile, derived from theirs, that looks on.

    Args:
        model: A copy: what asks for the exact type of a module may go wrong in it.

    Yields:
        Module name to the names of the attributes that were read so far, of modules that hold numbers.

    Example:
        >>> pool = nn.AvgPool2d(2)
        >>> with noting_reads(pool) as read:
        ...     kernel = pool.kernel_size
        >>> read
        {'': {'kernel_size'}}
    """
    read: dict[str, set[str]] = {}
    with contextlib.ExitStack() as stack:
        for module, name in module_names(model).items():
            if numbers := frozenset(stored_numbers(module)):
                own = type(module)
                with contextlib.suppress(TypeError):  # a class of which none can be derived: its numbers are not noted
                    seen: set[str] = set()
                    object.__setattr__(module, "__class__", _watched(own, numbers, seen))
                    stack.callback(object.__setattr__, module, "__class__", own)
                    read[name] = seen
        yield read


def _watched(own: type[nn.Module], numbers: frozenset[str], read: set[str]) -> type[nn.Module]:
    def look(self: nn.Module, name: str) -> Any:
        if name in numbers:
            read.add(name)
        return own.__getattribute__(self, name)

    facts = {"__getattribute__": look, "__module__": own.__module__}
    return types.new_class(own.__name__, (own,), exec_body=lambda space: space.update(facts))
