"""n of every m weights, tensor by tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from .._support.double import comparable
from ..agreement.patterns import best_in_blocks
from ..kinds import whole_number
from .base import ScoredPruning


class DiSparseSemiStructured(ScoredPruning):
    """Keep the n best of every m weights that follow each other along the input dimension (2:4 by default).

    GPUs from Ampere on multiply 2:4 sparse matrices faster; ``torch.sparse.to_sparse_semi_structured`` converts a
    Linear weight that was pruned like this. Weights already pruned count as pruned.

    Example:
        >>> layer = nn.Linear(8, 1)
        >>> scores = torch.tensor([[0.1, 0.9, 0.3, 0.8, 0.5, 0.6, 0.7, 0.2]])
        >>> hook = DiSparseSemiStructured.apply(layer, "weight", importance_scores=scores)
        >>> layer.weight_mask
        tensor([[0., 1., 0., 1., 0., 1., 1., 0.]])
    """

    # Unstructured methods are handed a flat vector once a tensor carries another mask; this type, whole rows.
    PRUNING_TYPE = "structured"
    dim = 0

    def __init__(self, n: int = 2, m: int = 4) -> None:
        """Remember the pattern.

        Args:
            n: How many of each block stay.
            m: Size of a block.

        Raises:
            TypeError: If one is no int.
            ValueError: If not ``0 <= n <= m`` and ``m >= 1``.
        """
        for name, value in (("n", n), ("m", m)):
            whole_number(name, value)
        if not 0 <= n <= m or m < 1:
            raise ValueError(f"n: must be in [0, m] with m of at least 1, found n={n}, m={m}; 2:4 is n=2, m=4")
        self.n, self.m = int(n), int(m)

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """Return the mask that keeps at most n of every m; called by torch.

        Args:
            t: Scores; dimension 1 (0 for a vector) is cut into blocks of m.
            default_mask: The mask so far, same shape.

        Returns:
            The new mask, ``min(n, alive)`` ones in each block; of equal scores the one that comes first is pruned
            first.

        Raises:
            ValueError: If the dimension is not divisible by m.
        """
        dim = min(1, t.dim() - 1)
        _check_blocks(t, dim, self.m)
        scores = comparable(t.detach()).double().masked_fill(comparable(default_mask) == 0, -torch.inf)
        return best_in_blocks(scores, self.n, self.m).to(default_mask)

    def _check(self, scores: Tensor, alive: Tensor | None) -> None:  # noqa: ARG002
        _check_blocks(scores, min(1, scores.dim() - 1), self.m)

    @classmethod
    def apply(  # type: ignore[override]
        cls, module: nn.Module, name: str, n: int = 2, m: int = 4, importance_scores: Tensor | None = None
    ) -> prune.BasePruningMethod:
        """Mask one tensor by the scores given for it.

        Args:
            module: The module.
            name: The tensor's name in it, e.g. ``"weight"``.
            n: How many of each block stay.
            m: Size of a block along dimension 1: the inputs, but for transposed convolutions, whose outputs lie there.
            importance_scores: Scores of the tensor's shape, of which only the order matters:
                ``scores.importance()[module, name]``, or any finite tensor.

        Returns:
            The hook that is now on the module.

        Raises:
            TypeError: If ``n`` or ``m`` is no int, or the scores are not a floating point tensor.
            ValueError: If there are no scores, they are not finite or of another shape, the pattern is impossible, or
                the input dimension is not divisible by m. The module is as before.
        """
        return cls._on_one_tensor(module, name, importance_scores, n, m)


def _check_blocks(tensor: Tensor, dim: int, m: int) -> None:
    if tensor.shape[dim] % m:
        raise ValueError(
            f"m: must divide the input dimension, found {tensor.shape[dim]} inputs in shape {tuple(tensor.shape)} and "
            f"m={m}; leave this tensor out or choose another m"
        )
