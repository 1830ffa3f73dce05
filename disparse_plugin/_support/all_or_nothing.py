"""Masks on all parameters of a call, or on none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch

from ..parameters import ParameterKey


@contextlib.contextmanager
def all_or_nothing(parameters: Iterable[ParameterKey]) -> Iterator[None]:
    """Attach masks inside; if that fails half-way, every module gets back its parameters, masks and hooks.

    Masks are normal tensors also if the caller is in ``torch.inference_mode``, so that the model can be used outside.

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
        with torch.inference_mode(False):
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
