"""Criteria and arbiters from the names that reports give them, for configuration files."""

from __future__ import annotations

import re

from . import arbiters
from .arbiters import Arbiter, at_least
from .criteria import Criterion, ScoreFunction, layer_adaptive
from .criteria import resolve as resolve_criterion


def criterion_by_name(criterion: str | Criterion | ScoreFunction) -> Criterion:
    """Turn ``"taylor"``, ``"layer_adaptive(taylor)"`` or a criterion itself into a criterion.

    Raises:
        TypeError: As :func:`disparse_plugin.criteria.resolve`.
        ValueError: As :func:`disparse_plugin.criteria.resolve`.

    Example:
        >>> criterion_by_name("layer_adaptive(taylor)") == layer_adaptive("taylor")
        True
    """
    inner = re.fullmatch(r"layer_adaptive\((\w+)\)", criterion) if isinstance(criterion, str) else None
    return resolve_criterion(criterion) if inner is None else layer_adaptive(inner[1])


def arbiter_by_name(arbiter: str | Arbiter) -> str | Arbiter:
    """Turn ``"at_least(2)"`` into that arbiter; other names and arbiters are checked and returned as they are.

    Raises:
        TypeError: As :func:`disparse_plugin.arbiters.resolve`.
        ValueError: As :func:`disparse_plugin.arbiters.resolve`.

    Example:
        >>> arbiter_by_name("at_least(2)") == at_least(2), arbiter_by_name("majority")
        (True, 'majority')
    """
    count = re.fullmatch(r"at_least\((\d+)\)", arbiter) if isinstance(arbiter, str) else None
    if count is not None:
        return at_least(int(count[1]))
    arbiters.resolve(arbiter)
    return arbiter
