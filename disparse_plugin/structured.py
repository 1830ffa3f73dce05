"""Whole channels that are really gone: DiSparse through torch-pruning.

Needs ``pip install 'disparse-plugin[structured]'``. The names here are what there is to use:

* :class:`DiSparseImportance` - an importance for every pruner of torch-pruning.
"""

from .channel_groups import channel_parameters
from .importance import DiSparseImportance

__all__ = [
    "DiSparseImportance",
    "channel_parameters",
]
