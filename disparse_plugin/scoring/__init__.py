"""From losses to one score per weight and task, and what can be asked of the scores.

A file here does one step of that line: ``losses``, ``gradients``, ``sums`` (saliency added up over batches and ranks),
``score`` (all of it in one call), ``task_scores``. How one task scores one weight is in
:mod:`disparse_plugin.criteria`.
"""

from .losses import Batch, TaskLosses, joint
from .score import score_tasks
from .task_scores import TaskScores

__all__ = ["Batch", "TaskLosses", "TaskScores", "joint", "score_tasks"]
