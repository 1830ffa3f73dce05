"""What all ranks of ``torch.distributed`` must agree on, so that all remove the same channels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from .._support.distributed import check_same, several_ranks
from .plan import RemovalPlan

_ON_ONE = (
    "remove channels in one process, report.save(path), and give all ranks the same by replay_removal(model, path)"
)


def check_counted(of: str) -> None:
    """Check that several ranks do not measure, each for itself, what is to be left.

    Raises:
        ValueError: If there are several, and the quantity is measured.
    """
    if of == "latency" and several_ranks():
        raise ValueError(f"of: must be counted, not measured, on several ranks, found {of!r}; {_ON_ONE}")


def check_same_steps(shares: Sequence[float]) -> None:
    """Check that all ranks remove in the same steps.

    Raises:
        ValueError: On all ranks, if they do not.
    """
    check_same("steps", list(shares), "give all ranks the same steps and schedule")


def check_same_plan(plan: RemovalPlan) -> None:
    """Check that all ranks have found the same channels, before any is removed.

    They differ where options do, or where a trial on a rank's own batches shows that a group cannot go.

    Args:
        plan: What this rank has found.

    Raises:
        ValueError: On all ranks, if they do not.
    """
    facts = [(cut.target, cut.side, cut.dim, cut.count, cut.positions.tolist()) for cut in plan.cuts]
    digest = hashlib.sha256(repr((facts, plan.attributes)).encode()).hexdigest()
    check_same("channels", digest[:16], f"give all ranks the same arguments, or {_ON_ONE}")
