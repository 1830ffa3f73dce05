"""What a cut did that nobody asked for, and that shows only when the network is run."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .._support.user_warning import warn_user
from ..errors import EmptyTensorWarning, TiesWarning
from .candidates import Candidates
from .tallies import counts_true

_SHOWN = 8

LIKELY_CAUSES_OF_ZEROS = (
    "Likely causes: saturated or dead units (ReLU6, hard sigmoid, ReLU that never fires), zero-initialised branches "
    "(timm: zero_init_last=False), weights that are zero, a loss at its minimum. More batches, or "
    "layer_adaptive('magnitude'), tell them apart"
)


def warn_of_ties_at_zero(candidates: Candidates, gone: Sequence[Tensor]) -> None:
    """Warn if some of the units that score zero for every task go and others stay.

    Args:
        candidates: What was ranked.
        gone: What goes: bool, 1-D, one for each parameter.
    """
    zero = [functools.reduce(torch.logical_and, [row == 0 for row in rows.values()]) for rows in candidates.scores]
    total = sum(counts_true(zero))
    going = sum(counts_true([marks & mark for marks, mark in zip(zero, gone, strict=True)])) if total else 0
    tell_of_ties_at_zero(total, going, sum(candidates.sizes))


def tell_of_ties_at_zero(zeros: int, going: int, units: int) -> None:
    """Warn as :func:`warn_of_ties_at_zero` does, of what has been counted.

    Args:
        zeros: How many units score zero for every task.
        going: How many of these go.
        units: How many there are in all.
    """
    if 0 < going < zeros:
        warn_user(
            f"scores: the cut falls among the {zeros:,} of {units:,} that score exactly zero for every "
            f"task that reaches them; of these the smaller magnitudes go. {LIKELY_CAUSES_OF_ZEROS}",
            TiesWarning,
        )


def warn_of_empty_tensors(
    names: Sequence[str], scores: Sequence[Mapping[str, Tensor]], gone: Sequence[Tensor], *, unit: str = "weights"
) -> None:
    """Warn of the tensors of which nothing stays, unless nothing stays of any.

    Args:
        names: Names of the parameters.
        scores: What each task that reaches a parameter scores.
        gone: What goes: bool, 1-D, one for each parameter.
        unit: What ``min_keep`` counts.
    """
    tell_of_empty_tensors(names, scores, counts_true(gone), [mark.numel() for mark in gone], unit=unit)


def tell_of_empty_tensors(
    names: Sequence[str],
    scores: Sequence[Mapping[str, Tensor]],
    gone: Sequence[int],
    sizes: Sequence[int],
    *,
    unit: str = "weights",
) -> None:
    """Warn as :func:`warn_of_empty_tensors` does, of what has been counted.

    Args:
        names: As there.
        scores: As there.
        gone: How many units of each parameter go.
        sizes: How many units each parameter has.
        unit: As there.
    """
    emptied = [size > 0 and count == size for size, count in zip(sizes, gone, strict=True)]
    left = any(size > 0 and not empty for size, empty in zip(sizes, emptied, strict=True))
    if not any(emptied) or not left:
        return
    found = [
        f"{name} (of {', '.join(rows)})" for name, rows, empty in zip(names, scores, emptied, strict=True) if empty
    ]
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    warn_user(
        f"amount: nothing stays of {len(found)} of {len(names)} tensors, so nothing passes them: "
        f"{', '.join(found[:_SHOWN])}{more}; keep some {unit} in each with min_keep=..., or let the layers compete by "
        "their own share with a layer-adaptive criterion, e.g. 'layer_adaptive(damped(taylor, 0.25))'",
        EmptyTensorWarning,
    )
