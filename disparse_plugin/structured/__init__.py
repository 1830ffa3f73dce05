"""Whole channels that are really gone: DiSparse through torch-pruning.

Needs ``pip install 'disparse-plugin[structured]'``. The names here are what there is to use:

* :func:`remove_channels` - the common case in one call; :class:`RemovalReport` says what it did.
* :class:`DiSparseImportance` - an importance for every pruner of torch-pruning.
* :func:`record_removal` - what any pruner of torch-pruning removes, as a small file; :func:`replay_removal` - the same
  removal on a freshly built model, from that file or from that of a report.
* :func:`channel_parameters` - what to score for it; :func:`attention_heads` and :func:`sync_attention` - what a pruner
  must know before, and what attention layers must be told after its step.
"""

# First: this is the file that explains a missing torch-pruning.
from .adapter import private as _private  # noqa: F401, I001

from .._support.public_path import publish
from .attention import attention_heads, sync_attention
from .groups import channel_parameters
from .importance import DiSparseImportance
from .plan import RemovalPlan, replay_removal
from .recording import RemovalRecording, record_removal
from .remove import remove_channels
from .report import RemovalReport

__all__ = [
    "DiSparseImportance",
    "RemovalPlan",
    "RemovalRecording",
    "RemovalReport",
    "attention_heads",
    "channel_parameters",
    "record_removal",
    "remove_channels",
    "replay_removal",
    "sync_attention",
]

publish(globals())
