"""Masks on all parameters of a call, or on none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from ..parameters import ParameterKey


@contextlib.contextmanager
def all_or_nothing(parameters: Iterable[ParameterKey]) -> Iterator[None]:
    """Attach masks inside; if that fails half-way, every module gets back its parameters, masks and hooks.

    Args:
        parameters: The parameters whose masks the block changes.

    Yields:
        Nothing.
    """
    before = []
    for module, name in parameters:
        mask, effective = module._buffers.get(f"{name}_mask"), vars(module).get(name)
        tables = [(table, dict(table)) for table in (module._parameters, module._buffers, module._forward_pre_hooks)]
        before.append((module, name, effective, mask, None if mask is None else mask.clone(), tables))
    try:
        yield
    except BaseException:
        for module, name, effective, mask, values, tables in reversed(before):
            for table, entries in tables:
                table.clear()
                table.update(entries)
            vars(module).pop(name, None)
            if effective is not None:
                vars(module)[name] = effective
            if mask is not None and values is not None:
                mask.copy_(values)
        raise
