"""Public classes say where users import them from, so that a pickle of one outlives every move of its file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module

_homes: dict[type, str] = {}  # published classes, and the modules that define them


def publish(namespace: Mapping[str, object]) -> None:
    """Set ``__module__`` of the classes that a public room hands on to the room's own name.

    A pickle names a class by its ``__module__``: a whole model, by the classes of its pruning hooks. A class that
    several rooms hand on belongs to the first of them.

    Args:
        namespace: ``globals()`` of the room, with ``__name__`` and ``__all__``.

    Example:
        >>> from disparse_plugin.masks import SparsityReport
        >>> SparsityReport.__module__
        'disparse_plugin.masks'
    """
    room, names = str(namespace["__name__"]), namespace["__all__"]
    assert isinstance(names, list)
    for name in names:
        thing = namespace[name]
        # An alias may name a class of somebody else: Batch is typing.Any.
        if isinstance(thing, type) and thing.__module__.startswith("disparse_plugin.") and thing not in _homes:
            _homes[thing], thing.__module__ = thing.__module__, room


def home(cls: type) -> str:
    """Return the name of the module that defines a class, published or not.

    Example:
        >>> from disparse_plugin.masks import SparsityReport
        >>> home(SparsityReport)
        'disparse_plugin.masks.sparsity'
    """
    return _homes.get(cls, cls.__module__)


def keep_old_paths(package: str, moved: Mapping[str, str]) -> None:
    """Let modules be imported by the names that they had, because pickles hold those names.

    Args:
        package: The package's name.
        moved: Old name to new name, both inside the package.

    Example:
        >>> import disparse_plugin.masks.in_place as moved
        >>> import_module("disparse_plugin.dynamic_method") is moved
        True
    """
    for old, new in moved.items():
        sys.modules[f"{package}.{old}"] = import_module(f"{package}.{new}")
