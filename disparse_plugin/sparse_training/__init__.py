"""Sparse training: masks that change while the network trains.

A file in here is a scheduler, or one thing that schedulers do in an optimizer step: counting (``mask_scheduler``),
scoring (``step_scores``), choosing masks (``initial_masks`` with ``densities``, ``exchange``), rewriting them
(``live_masks`` with ``optimizer_state``), and when (``schedules``). What only looks at a mask belongs to ``masks``.

* :class:`DiSparseScheduler`: train a sparse network from scratch, dropping and growing weights (DiSparse dynamic; RigL,
  SET and static sparse training as special cases).
* :class:`GradualPruning`: prune a dense network in stages, scoring it anew at each; with :class:`RewindPoint` also
  iterative magnitude pruning with rewinding.
* :func:`save_checkpoint`, :func:`load_checkpoint`: stop, and go on bit for bit in another process.
* :class:`DiSparseDynamic`: the pruning method behind it, whose mask can be rewritten in place.
"""

from __future__ import annotations

from .._support.public_path import publish
from ..masks.in_place import DiSparseDynamic
from ..scoring.losses import joint
from .checkpoints import load_checkpoint, save_checkpoint
from .densities import ERK_POWER, layer_counts
from .gradual import GradualPruning, PruningStage
from .optimizer_state import register_optimizer
from .rewinding import RewindPoint
from .scheduler import DiSparseScheduler, MaskUpdate
from .schedules import CosineDecay, CubicSparsity, Schedule

__all__ = [
    "ERK_POWER",
    "CosineDecay",
    "CubicSparsity",
    "DiSparseDynamic",
    "DiSparseScheduler",
    "GradualPruning",
    "MaskUpdate",
    "PruningStage",
    "RewindPoint",
    "Schedule",
    "joint",
    "layer_counts",
    "load_checkpoint",
    "register_optimizer",
    "save_checkpoint",
]

publish(globals())
