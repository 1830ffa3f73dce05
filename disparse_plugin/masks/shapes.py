"""Give a freshly built model the shapes of a smaller one: fewer channels or heads in the same architecture.

What whole-channel removal leaves behind is visible: smaller tensors, and modules whose plain numbers say so
(``out_channels``, ``num_heads``, ``normalized_shape``). Which positions went, the weights themselves say, so shapes and
numbers are all that is needed to build the smaller model again, whoever made it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .._support.stand_in import stand_in
from .._support.stored import is_number, set_number, stored_numbers
from ..parameters import module_names

# Module name to the plain numbers that it holds.
Numbers: TypeAlias = Mapping[str, Mapping[str, Any]]


def plain_numbers(root: nn.Module) -> dict[str, dict[str, Any]]:
    """Return, by module name, the numbers that modules hold as attributes, alone, in tuples or in lists.

    Example:
        >>> plain_numbers(nn.Sequential(nn.Linear(3, 2), nn.Flatten()))
        {'0': {'in_features': 3, 'out_features': 2}, '1': {'start_dim': 1, 'end_dim': -1}}
    """
    return {name: plain for module, name in module_names(root).items() if (plain := stored_numbers(module))}


def shrink(root: nn.Module, shapes: Mapping[str, tuple[int, ...]], numbers: Numbers) -> None:
    """Replace each parameter and buffer of another shape by an empty one; where there is any, set modules' numbers.

    As the removal of channels does, this sets whole numbers of modules that hold such a tensor, themselves or further
    inside, and of modules without parameters, which may hold nothing but a width (``nn.Unflatten``). Fractions (an
    attention's scale) are set only in modules that hold such a tensor, or whose child does. All else are settings.

    Parameters that are shared stay shared; ``requires_grad``, types, devices, memory formats and what is written on a
    Parameter stay. The values are undefined until they are loaded.

    Args:
        root: The model, unwrapped, without masks; changed in place.
        shapes: Shape by qualified name; names that are not in the model are passed over.
        numbers: From :func:`plain_numbers` of the smaller model.

    Raises:
        ValueError: If a number would change its type.
    """
    replaced: dict[int, Tensor] = {}
    resized: set[nn.Module] = set()
    names = module_names(root)
    for module, path in names.items():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            shape = shapes.get(f"{path}.{name}" if path else name)
            if tensor is None or shape is None or shape == tuple(tensor.shape):
                continue
            if id(tensor) not in replaced:
                replaced[id(tensor)] = stand_in(tensor, tensor.detach().new_empty(shape))
            setattr(module, name, replaced[id(tensor)])  # and not into the table: recurrent layers hold it twice
            resized.add(module)
    for module, path in names.items() if resized else ():
        if resized.isdisjoint(module.modules()) and next(module.parameters(), None) is not None:
            continue
        near = module in resized or not resized.isdisjoint(module.children())
        _set_numbers(module, path, numbers.get(path, {}), fractions=near)


@contextlib.contextmanager
def unchanged_on_error(root: nn.Module) -> Iterator[None]:
    """Replace tensors, hooks and attributes inside; if that fails, every module gets back those that it had.

    Values written into tensors in place stay written. New tensors are normal ones also inside ``torch.inference_mode``.

    Args:
        root: The model.

    Yields:
        Nothing.
    """
    before = []
    for module in root.modules():
        attributes = {name: list(value) if type(value) is list else value for name, value in vars(module).items()}
        tables: list[dict[Any, Any]] = [module._parameters, module._buffers, module._forward_pre_hooks]
        before.append((module, attributes, [(table, dict(table)) for table in tables]))
    try:
        with torch.inference_mode(False):
            yield
    except BaseException:
        for module, attributes, contents in before:
            for table, entries in contents:
                table.clear()
                table.update(entries)
            vars(module).clear()
            vars(module).update(attributes)
        raise


def _set_numbers(module: nn.Module, path: str, numbers: Mapping[str, Any], *, fractions: bool) -> None:
    own = stored_numbers(module)
    for name, saved in numbers.items():
        value = tuple(saved) if isinstance(saved, list) else saved
        if name in own and value != own[name] and (fractions or not isinstance(own[name], float)):
            if not is_number(value) or isinstance(value, tuple) != isinstance(own[name], tuple):
                raise ValueError(f"model: {path}.{name} must be like {own[name]!r}, found {value!r} in the file")
            set_number(module, name, value)
