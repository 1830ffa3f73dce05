"""What a row of ``structured_coverage.py`` is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from disparse_plugin._support.example_inputs import as_inputs, run
from disparse_plugin.structured.adapter.observation import named_tensors


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and what to run it on.

    Attributes:
        model: With random weights, in the mode in which its losses are computed.
        inputs: Example inputs of one forward.
        batch: A batch for the losses.
        losses: One scalar per task.
    """

    model: nn.Module
    inputs: Any
    batch: Any
    losses: Callable[[nn.Module, Any], Mapping[str, Tensor]]


def loss_per_output(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """Make one loss of each output that has gradients."""
    outputs = named_tensors(run(model, as_inputs(batch)))
    return {name: out.square().mean() + out.mean() for name, out in outputs if out.grad_fn is not None}


def plain(model: nn.Module, inputs: Any) -> Case:
    """Make the case of a model whose outputs are its tasks."""
    return Case(model.eval(), inputs, inputs, loss_per_output)


def randomize(model: nn.Module) -> nn.Module:
    """Draw what starts as zeros and ones, which would hide errors: norms, running statistics, layer scales."""
    with torch.no_grad():
        for module in model.modules():
            for name in ("weight", "bias", "running_mean"):
                tensor = getattr(module, name, None)
                if isinstance(tensor, Tensor) and tensor.dim() == 1:
                    tensor.uniform_(-0.5, 0.5).add_(name == "weight")
            for name, parameter in module.named_parameters(recurse=False):
                if name not in ("weight", "bias") and parameter.numel() == max(parameter.shape, default=0):
                    parameter.uniform_(0.5, 1.5)
            if isinstance(getattr(module, "running_var", None), Tensor):
                module.running_var.uniform_(0.5, 2)
    return model
