"""DiSparse (Sun et al., CVPR 2022) for PyTorch's pruning tools: remove only what all tasks find unimportant."""

from __future__ import annotations

import importlib
from types import ModuleType

from ._support.files import FileFormatError
from ._support.public_path import keep_old_paths, publish
from .agreement.budgets import Amount, Budget
from .agreement.patterns import Pattern
from .arbiters import Arbiter, at_least
from .criteria import Criterion, ScoreFunction, damped, layer_adaptive
from .errors import EmptyTensorWarning, NonFiniteError, TiesWarning
from .masks import (
    SparsityReport,
    attach_masks,
    clone_pruned,
    fold,
    load_masks,
    load_pruned,
    save_masks,
    save_pruned,
    sparsity_report,
)
from .methods.channels import DiSparseStructured, channel_importance
from .methods.one_shot import disparse_pretrained, disparse_static
from .methods.semi_structured import DiSparseSemiStructured
from .methods.unstructured import DiSparsePretrained, DiSparseStatic
from .parameters import Exclude, ParameterKey, prunable_parameters
from .scoring.losses import Batch, TaskLosses, joint
from .scoring.score import score_tasks
from .scoring.task_scores import TaskScores

__version__ = "0.1.0"

__all__ = [
    "Amount",
    "Arbiter",
    "Batch",
    "Budget",
    "Criterion",
    "DiSparsePretrained",
    "DiSparseSemiStructured",
    "DiSparseStatic",
    "DiSparseStructured",
    "EmptyTensorWarning",
    "Exclude",
    "FileFormatError",
    "NonFiniteError",
    "ParameterKey",
    "Pattern",
    "ScoreFunction",
    "SparsityReport",
    "TaskLosses",
    "TaskScores",
    "TiesWarning",
    "__version__",
    "at_least",
    "attach_masks",
    "channel_importance",
    "clone_pruned",
    "damped",
    "disparse_pretrained",
    "disparse_static",
    "fold",
    "joint",
    "layer_adaptive",
    "load_masks",
    "load_pruned",
    "prunable_parameters",
    "save_masks",
    "save_pruned",
    "score_tasks",
    "sparsity_report",
]

publish(globals())

# Whole models pickled by version 0.1.0 name the classes of their hooks by these modules.
keep_old_paths(
    __name__,
    {
        "checkpoint_masks": "masks.state_dicts",
        "dynamic_method": "masks.in_place",
        "patterns": "methods",
        "scores": "scoring.task_scores",
    },
)

# Rooms that are loaded when they are first asked for: they take time, or need packages that are not installed.
_ON_DEMAND = frozenset({"analysis", "hf_trainer", "lightning", "sparse_training", "structured"})


def __getattr__(name: str) -> ModuleType:
    if name in _ON_DEMAND:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_DEMAND})
