"""The life of a mask, from copying to folding: the public room of what the files around it do one by one."""

from .._support.public_path import publish
from .attach import apply_masks, attach_masks, clone_pruned, fold, masks_of
from .carving import keep_tasks
from .files import load_masks, save_masks
from .sparsity import SparsityReport, sparsity_report

__all__ = [
    "SparsityReport",
    "apply_masks",
    "attach_masks",
    "clone_pruned",
    "fold",
    "keep_tasks",
    "load_masks",
    "masks_of",
    "save_masks",
    "sparsity_report",
]

publish(globals())
