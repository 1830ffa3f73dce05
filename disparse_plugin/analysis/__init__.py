"""What the masks say about the tasks: overlap, chance, ceiling, watershed, gradient conflict, plots, report.

A file in this room answers one question about scores or masks, or shows an answer; none changes a model. Numbers come
as frozen records with ``to_dict()`` and ``rows()``, and state their formula and its source; pictures take ``ax=None``
and return ``(fig, ax)``.
"""

from __future__ import annotations

from .._support.public_path import publish
from .controls import Controls
from .gradient_conflict import GradientConflict
from .measures import Overlap, Stratum
from .null_models import overlap_with_controls
from .overlap import TaskOverlap, task_overlap
from .permuted_labels import permute_labels
from .plots import plot_agreement, plot_conflict, plot_density, plot_iou, plot_kept_by, plot_matrix
from .report import html_report
from .task_masks import own_masks
from .watershed import Branch, Watershed

__all__ = [
    "Branch",
    "Controls",
    "GradientConflict",
    "Overlap",
    "Stratum",
    "TaskOverlap",
    "Watershed",
    "html_report",
    "overlap_with_controls",
    "own_masks",
    "permute_labels",
    "plot_agreement",
    "plot_conflict",
    "plot_density",
    "plot_iou",
    "plot_kept_by",
    "plot_matrix",
    "task_overlap",
]

publish(globals())
