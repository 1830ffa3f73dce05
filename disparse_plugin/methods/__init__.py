"""The pruning methods of ``torch.nn.utils.prune``: one file for each pattern, and the one-call forms."""

from .unstructured import DiSparsePretrained, DiSparseStatic

__all__ = ["DiSparsePretrained", "DiSparseStatic"]
