"""DiSparse (Sun et al., CVPR 2022) for PyTorch's pruning tools: remove only what all tasks find unimportant."""

from ._support.files import FileFormatError
from ._support.public_path import keep_old_paths, publish
from .arbiters import at_least
from .criteria import layer_adaptive
from .methods.channels import DiSparseStructured, channel_importance
from .methods.one_shot import disparse_pretrained, disparse_static
from .methods.semi_structured import DiSparseSemiStructured
from .methods.unstructured import DiSparsePretrained, DiSparseStatic
from .parameters import prunable_parameters
from .scoring.score import score_tasks
from .scoring.task_scores import TaskScores

__version__ = "0.1.0"

__all__ = [
    "DiSparsePretrained",
    "DiSparseSemiStructured",
    "DiSparseStatic",
    "DiSparseStructured",
    "FileFormatError",
    "TaskScores",
    "__version__",
    "at_least",
    "channel_importance",
    "disparse_pretrained",
    "disparse_static",
    "layer_adaptive",
    "prunable_parameters",
    "score_tasks",
]

publish(globals())

# Whole models pickled by version 0.1.0 name the classes of their hooks by these modules.
keep_old_paths(
    __name__,
    {
        "checkpoint_masks": "masks.state_dicts",
        "dynamic_method": "masks.in_place",
        "patterns": "methods.channels",
        "scores": "scoring.task_scores",
    },
)
