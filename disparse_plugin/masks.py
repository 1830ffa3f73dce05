"""The life of a mask, from copying to folding: the public room of what the files around it do one by one."""

from .carving import keep_tasks
from .mask_files import load_masks, save_masks
from .masking import apply_masks, attach_masks, clone_pruned, fold, masks_of
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
