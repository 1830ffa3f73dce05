"""What a user passes as ``example_inputs``: the arguments of one forward."""

from __future__ import annotations

from typing import Any, TypeAlias

from torch import nn

Inputs: TypeAlias = tuple[Any, ...] | dict[str, Any]


def as_inputs(example_inputs: Any) -> Inputs:
    """Make arguments of what a user passes: a tensor is one argument, never a sequence of images.

    Example:
        >>> as_inputs("a tensor"), as_inputs(["image", "mask"]), as_inputs({"x": "a tensor"})
        (('a tensor',), ('image', 'mask'), {'x': 'a tensor'})
    """
    if isinstance(example_inputs, dict):
        return example_inputs
    return tuple(example_inputs) if isinstance(example_inputs, list | tuple) else (example_inputs,)


def run(model: nn.Module, inputs: Inputs) -> Any:
    """Run a model on what :func:`as_inputs` made."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)
