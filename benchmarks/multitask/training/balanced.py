"""Dense networks trained by dedicated multi-task methods instead of the plain sum of the losses.

The shared trunk follows what torchjd's aggregators make of the tasks' gradients, every head its own task. Uncertainty
weighting learns a weight per loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from .bench import Backward, Batch, Bench, Course
from .networks import SharedTrunk

Procedure: TypeAlias = Callable[[Bench, float, float], nn.Module]


def aggregator(name: str, **options: float) -> Callable[[Bench], Backward]:
    """Return what makes an aggregator of torchjd the backward pass of a bench.

    It does what ``torchjd.autojac.mtl_backward`` and ``jac_to_grad`` do, in half of the time with many tasks: every
    head sees features of its own, so that one pass through all heads finds the gradients of all tasks.

    Args:
        name: Of a class in ``torchjd.aggregation``.
        options: Of the aggregator.

    Raises:
        ValueError: In training, if the network is no :class:`.networks.SharedTrunk`.
    """

    def of(bench: Bench) -> Backward:
        try:
            from torchjd import aggregation
        except ImportError as error:
            raise ImportError(f"{error}; needs: pip install 'torchjd[cagrad,quadprog_projector]>=0.18'") from error

        combine = getattr(aggregation, name)(**options)

        def backward(model: nn.Module, batch: Batch) -> None:
            if not isinstance(model, SharedTrunk):
                raise ValueError(
                    "setting: needs a network with one trunk that all heads follow, found "
                    f"{type(model).__name__}; train it with the plain sum or uncertainty weighting"
                )
            inputs, targets = batch
            features = model.trunk(inputs)
            maps = features if isinstance(features, list) else [features]
            own = [[each.detach().requires_grad_() for each in maps] for _ in bench.problem.tasks]
            losses = [
                task.weight * task.loss(model.heads[task.name](its if maps is features else its[0]), targets[task.name])
                for task, its in zip(bench.problem.tasks, own, strict=True)
            ]
            torch.stack(losses).sum().backward()
            _follow(list(model.trunk.parameters()), maps, own, combine)

        return backward

    return of


def _follow(
    parameters: list[nn.Parameter], maps: list[Tensor], own: list[list[Tensor]], combine: Callable[[Tensor], Tensor]
) -> None:
    """Give the trunk the gradient that is combined of those that each task's own feature maps ask for."""
    rows = [torch.autograd.grad(maps, parameters, [each.grad for each in its], retain_graph=True) for its in own]
    combined = combine(torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]))
    pieces = combined.split([parameter.numel() for parameter in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.grad = piece.view_as(parameter)


def aggregated(name: str, **options: float) -> Procedure:
    """Train the shared trunk by an aggregator for the steps of both stages; see :func:`aggregator`."""
    of = aggregator(name, **options)

    def procedure(bench: Bench, _: float, rate: float) -> nn.Module:
        model = bench.initial()
        Course(bench, model, bench.budget.train + bench.budget.tune, rate, stage=0, backward=of(bench)).run()
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
