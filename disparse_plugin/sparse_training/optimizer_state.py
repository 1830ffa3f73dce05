"""Forget what an optimizer remembers about single weights.

A weight that regrows starts at 0, so its running moments must start afresh too; and a masked weight whose momentum is
not cleared would drift under its mask. Only optimizers whose every state is known to be per weight (or one number) are
accepted: resetting part of an unknown state would be a silent error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, NAdam, Optimizer, RAdam, RMSprop, Rprop

from .._support.shards import local

# What a state has for a weight that has never been updated: a number, or a function of the parameter group.
Fresh: TypeAlias = float | Callable[[Mapping[str, Any]], float]

_FRESH: dict[type[Optimizer], dict[str, Fresh]] = {
    SGD: {"momentum_buffer": 0.0},
    Adam: {"exp_avg": 0.0, "exp_avg_sq": 0.0, "max_exp_avg_sq": 0.0},  # AdamW is a subclass in newer versions
    torch.optim.AdamW: {"exp_avg": 0.0, "exp_avg_sq": 0.0, "max_exp_avg_sq": 0.0},
    NAdam: {"exp_avg": 0.0, "exp_avg_sq": 0.0},
    RAdam: {"exp_avg": 0.0, "exp_avg_sq": 0.0},
    Adamax: {"exp_avg": 0.0, "exp_inf": 0.0},
    RMSprop: {"square_avg": 0.0, "momentum_buffer": 0.0, "grad_avg": 0.0},
    Adagrad: {"sum": lambda group: float(group["initial_accumulator_value"])},
    Adadelta: {"square_avg": 0.0, "acc_delta": 0.0},
    ASGD: {"ax": 0.0},
    Rprop: {"prev": 0.0, "step_size": lambda group: float(group["lr"])},
}


def register_optimizer(kind: type[Optimizer], **fresh: Fresh) -> None:
    """Make another optimizer known to the sparse training of this package.

    Only for optimizers that update each weight by its own gradient and state: one that mixes the entries of a tensor
    (Muon, Shampoo, Adafactor, LBFGS) would move masked weights.

    Args:
        kind: The class; its subclasses are covered as well.
        **fresh: For each state tensor of the parameter's shape, the value of a weight that was never updated: a number,
            or a function of the parameter group.

    Raises:
        TypeError: If ``kind`` is no class of optimizers.

    Example:
        >>> class Lion(torch.optim.Optimizer):
        ...     '''Keeps exp_avg for every weight.'''
        >>> register_optimizer(Lion, exp_avg=0.0)
        >>> "exp_avg" in fresh_values(Lion([torch.zeros(1)], {}))
        True
    """
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise TypeError(f"kind: must be a class of optimizers, found {kind!r}")
    _FRESH[kind] = dict(fresh)


def fresh_values(optimizer: Optimizer) -> Mapping[str, Fresh]:
    """Return the names of the per-weight states of an optimizer, and their initial values.

    Raises:
        TypeError: If it is not a ``torch.optim.Optimizer`` or of a kind that is not known.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: must be a torch.optim.Optimizer, found {type(optimizer).__name__}")
    for kind in type(optimizer).__mro__:
        if kind in _FRESH:
            return _FRESH[kind]
    if isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        raise TypeError(
            f"optimizer: must be the torch.optim.Optimizer itself, found {type(optimizer).__name__} around one; pass "
            "optimizer.optimizer"
        )
    raise TypeError(
        f"optimizer: must keep its state per weight in a known way, found {type(optimizer).__name__}; known are "
        f"{', '.join(sorted(kind.__name__ for kind in _FRESH))}; add it with disparse_plugin.sparse_training."
        "register_optimizer if it updates every weight by itself"
    )


def check_optimizer(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> None:
    """Check that an optimizer trains the given parameters and that all it remembers of them can be reset.

    Args:
        optimizer: The optimizer.
        parameters: The parameters by qualified name.

    Raises:
        TypeError: As :func:`fresh_values`.
        ValueError: If a parameter is not in it, or there is a state that is neither known nor a single number.
    """
    known = fresh_values(optimizer)
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in parameters.items() if id(parameter) not in trained]
    if missing:
        frozen = f", or leave frozen layers out with exclude={missing}" if len(missing) < len(parameters) else ""
        raise ValueError(
            f"optimizer: must train every pruned parameter, found {len(missing)} of {len(parameters)} missing (first: "
            f"{missing[0]}); build it from the same model object{frozen}"
        )
    for name, parameter in parameters.items():
        for state, value in optimizer.state.get(parameter, {}).items():
            if state not in known and isinstance(value, Tensor) and value.numel() > 1:
                raise ValueError(
                    f"optimizer: every state must be known or a single number, found {state!r} of shape "
                    f"{tuple(value.shape)} for {name} in {type(optimizer).__name__}; see register_optimizer"
                )


def forget(optimizer: Optimizer, parameter: Tensor, where: Tensor) -> None:
    """Set the state of some entries of one parameter to that of weights which were never updated.

    Args:
        optimizer: An optimizer that :func:`check_optimizer` has accepted.
        parameter: One of its parameters.
        where: bool, of its shape; the entries to forget. Of a sharded parameter what of it lies on this rank.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> sgd = SGD([weight], lr=0.1, momentum=0.9)
        >>> weight.sum().backward(); sgd.step()
        >>> forget(sgd, weight, torch.tensor([True, False]))
        >>> sgd.state[weight]["momentum_buffer"]
        tensor([0., 1.])
    """
    known, group = fresh_values(optimizer), _group_of(optimizer.param_groups, parameter)
    with torch.no_grad():
        for state, value in optimizer.state.get(parameter, {}).items():
            if state in known and isinstance(value, Tensor):
                fresh = known[state]
                local(value).masked_fill_(where, fresh(group) if callable(fresh) else fresh)


def remembered(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Copy what an optimizer remembers of single entries of one parameter, by the name of the state.

    Args:
        optimizer: An optimizer that :func:`check_optimizer` has accepted.
        parameter: One of its parameters. Of a sharded one it is what of it lies on this rank.
    """
    known = fresh_values(optimizer)
    states = optimizer.state.get(parameter, {}).items()
    return {name: local(value).clone() for name, value in states if name in known and isinstance(value, Tensor)}


def remind(optimizer: Optimizer, parameter: Tensor, states: Mapping[str, Tensor], where: Tensor) -> None:
    """Give an optimizer back what it remembered of some entries of one parameter.

    Args:
        optimizer: The optimizer.
        parameter: The parameter.
        states: What :func:`remembered` returned.
        where: bool, of the parameter's shape; the entries that :func:`forget` has cleared since.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> sgd = SGD([weight], lr=0.1, momentum=0.9)
        >>> weight.sum().backward(); sgd.step()
        >>> states, where = remembered(sgd, weight), torch.tensor([True, False])
        >>> forget(sgd, weight, where)
        >>> remind(sgd, weight, states, where)
        >>> sgd.state[weight]["momentum_buffer"]
        tensor([1., 1.])
    """
    for name, value in optimizer.state.get(parameter, {}).items():
        if name in states:
            local(value).copy_(torch.where(where, states[name], local(value)))


def _group_of(groups: Iterable[Mapping[str, Any]], parameter: Tensor) -> Mapping[str, Any]:
    return next(group for group in groups if any(member is parameter for member in group["params"]))
