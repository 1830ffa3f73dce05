"""Sparse training: masks that change while the network trains.

* :class:`DiSparseScheduler`: train a sparse network from scratch, dropping and growing weights (DiSparse dynamic; RigL,
  SET and static sparse training as special cases).
* :class:`DiSparseDynamic`: the pruning method behind it, whose mask can be rewritten in place.
"""

from __future__ import annotations

from .checkpoints import load_checkpoint, save_checkpoint
from .densities import ERK_POWER, layer_counts
from .dynamic_method import DiSparseDynamic
from .joint import joint
from .optimizer_state import register_optimizer
from .scheduler import DiSparseScheduler, MaskUpdate
from .schedules import CosineDecay, CubicSparsity, Schedule

__all__ = [
    "ERK_POWER",
    "CosineDecay",
    "CubicSparsity",
    "DiSparseDynamic",
    "DiSparseScheduler",
    "MaskUpdate",
    "Schedule",
    "joint",
    "layer_counts",
    "load_checkpoint",
    "register_optimizer",
    "save_checkpoint",
]
