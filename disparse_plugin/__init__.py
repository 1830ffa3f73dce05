"""DiSparse (Sun et al., CVPR 2022) for PyTorch's pruning tools: remove only what all tasks find unimportant."""

from .arbiters import at_least
from .criteria import layer_adaptive
from .methods.channels import DiSparseSemiStructured, DiSparseStructured, channel_importance
from .methods.one_shot import disparse_pretrained, disparse_static
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
