"""Which channels go together, read from the operations that run, where torch-pruning's graph has no answer.

Every dimension of every parameter begins with a label for each position. While the model runs, each operation carries
the labels of its inputs along to its outputs, and unites those that only fit together: of summands, of a contraction.
Positions with one label are removed together. A file here holds the labels, the operations, the run, or the groups.
"""

from __future__ import annotations

from .groups import traced_groups
from .run import How

__all__ = ["How", "traced_groups"]
