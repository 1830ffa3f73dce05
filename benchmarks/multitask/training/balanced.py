"""Dense networks trained by dedicated multi-task methods instead of the plain sum of the losses.

The shared trunk follows what torchjd's aggregators make of the tasks' gradients, every head its own task. Uncertainty
weighting learns a weight per loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import nn

from .bench import Batch, Bench, Course
from .networks import SharedTrunk

Procedure: TypeAlias = Callable[[Bench, float, float], nn.Module]


def aggregated(name: str, **options: float) -> Procedure:
    """Train the shared trunk by an aggregator of torchjd.

    Args:
        name: Of a class in ``torchjd.aggregation``.
        options: Of the aggregator.

    Returns:
        A procedure that trains for the steps of both stages. It needs a :class:`.networks.SharedTrunk`, whose tasks
        share the trunk's output, and raises a ``ValueError`` for any other network.
    """

    def procedure(bench: Bench, _: float, rate: float) -> nn.Module:
        try:
            from torchjd import aggregation, autojac
        except ImportError as error:
            raise ImportError(f"{error}; needs: pip install 'torchjd[cagrad,quadprog_projector]>=0.18'") from error

        aggregator = getattr(aggregation, name)(**options)

        def backward(model: nn.Module, batch: Batch) -> None:
            assert isinstance(model, SharedTrunk)
            inputs, targets = batch
            features = model.trunk(inputs)
            outputs = model.heads(features)
            losses = [task.weight * task.loss(outputs[task.name], targets[task.name]) for task in bench.problem.tasks]
            autojac.mtl_backward(losses, features)
            autojac.jac_to_grad(model.trunk.parameters(), aggregator)

        model = _shared_trunk(bench)
        Course(bench, model, bench.budget.train + bench.budget.tune, rate, stage=0, backward=backward).run()
        return model

    return procedure


def uncertainty(bench: Bench, _: float, rate: float) -> nn.Module:
    """Train with learned weights of the losses (Kendall et al., CVPR 2018, of classification).

    The loss is the sum over the tasks of ``exp(-s) L + s / 2``, with ``s`` learnt, 0 at first.
    """
    model = bench.initial()
    logs = torch.zeros(len(bench.problem.tasks), device=bench.device, requires_grad=True)

    def backward(model: nn.Module, batch: Batch) -> None:
        losses = bench.losses(model, batch)
        weighted = torch.stack([task.weight * losses[task.name] for task in bench.problem.tasks])
        ((-logs).exp() * weighted + logs / 2).sum().backward()

    course = Course(bench, model, bench.budget.train + bench.budget.tune, rate, stage=0, backward=backward)
    course.optimizer.add_param_group({"params": [logs], "weight_decay": 0.0})
    course.run()
    return model


def summed(bench: Bench, _: float, rate: float) -> nn.Module:
    """Train with the plain sum, in one course as the others here."""
    model = bench.initial()
    Course(bench, model, bench.budget.train + bench.budget.tune, rate, stage=0).run()
    return model


def _shared_trunk(bench: Bench) -> SharedTrunk:
    model = bench.initial()
    if not isinstance(model, SharedTrunk):
        raise ValueError(
            f"setting: needs a network with one trunk that all heads follow, found {type(model).__name__}; "
            "train it with the plain sum or uncertainty weighting"
        )
    return model
