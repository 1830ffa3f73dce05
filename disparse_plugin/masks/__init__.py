"""The life of a mask: put on a model, copied, carved, counted, written to a file, folded away.

A mask is bool, True = keep, and on a model it has the form of ``torch.nn.utils.prune``: ``weight_orig``,
``weight_mask`` and one hook. A file in this room does one thing to masks that are there already; which weights a mask
keeps is decided elsewhere (:mod:`disparse_plugin.scoring`, :mod:`disparse_plugin.methods`).
"""

from .._support.public_path import publish
from .attach import apply_masks, attach_masks, clone_pruned, fold, masks_of
from .carving import keep_tasks
from .files import load_masks, save_masks
from .model_files import load_pruned, save_pruned
from .sparsity import SparsityReport, sparsity_report

__all__ = [
    "SparsityReport",
    "apply_masks",
    "attach_masks",
    "clone_pruned",
    "fold",
    "keep_tasks",
    "load_masks",
    "load_pruned",
    "masks_of",
    "save_masks",
    "save_pruned",
    "sparsity_report",
]

publish(globals())
