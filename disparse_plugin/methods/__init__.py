"""The pruning methods of ``torch.nn.utils.prune``, one file for each pattern, and the forms in one call.

A method prunes one tensor by scores that it is given (``base``), or, bound to scores, all that
``prune.global_unstructured`` hands it. ``one_shot`` scores and prunes a whole model.
"""

from .channels import DiSparseStructured, channel_importance
from .one_shot import disparse_pretrained, disparse_static
from .semi_structured import DiSparseSemiStructured
from .unstructured import DiSparsePretrained, DiSparseStatic

__all__ = [
    "DiSparsePretrained",
    "DiSparseSemiStructured",
    "DiSparseStatic",
    "DiSparseStructured",
    "channel_importance",
    "disparse_pretrained",
    "disparse_static",
]
