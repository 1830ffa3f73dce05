"""Masks with a structure, for ``torch.nn.utils.prune``: whole channels, and n of every m weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from .. import arbiters
from ..agreement.amounts import check_amount, count_to_prune
from ..agreement.percentiles import agreement
from ..agreement.ranking import lowest
from ..arbiters import Arbiter
from ..parameters import ParameterKey, alive_mask, check_parameters
from ..scoring.task_scores import TaskScores
from .unstructured import _check_given_scores, keep_mask_type


class DiSparseStructured(prune.BasePruningMethod):
    """Mask the whole channels of one tensor that all tasks rank low.

    A channel's score is the mean of the given scores over the channel; :func:`channel_importance` makes scores that
    already agree per channel. Only channels with an entry alive count. Nothing gets smaller by a mask: to make the
    model smaller, see :func:`disparse_plugin.structured.remove_channels`.

    Example:
        >>> layer = nn.Linear(2, 4)
        >>> scores = torch.tensor([[0.1, 0.2], [0.9, 0.9], [0.3, 0.1], [0.8, 0.2]])
        >>> hook = DiSparseStructured.apply(layer, "weight", 0.5, dim=0, importance_scores=scores)
        >>> layer.weight_mask[:, 0]
        tensor([0., 1., 0., 1.])
    """

    PRUNING_TYPE = "structured"

    def __init__(self, amount: float, dim: int = 0) -> None:
        """Remember how much to prune.

        Args:
            amount: A fraction of the channels still alive (float in [0, 1]) or a count (int).
            dim: The dimension that counts channels: 0 for outputs, 1 for inputs of a convolution or linear layer.

        Raises:
            TypeError: If ``amount`` is neither int nor float, or ``dim`` is no int.
            ValueError: If ``amount`` is out of range.
        """
        check_amount(amount)
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise TypeError(f"dim: must be an int, found {type(dim).__name__}: {dim!r}")
        self.amount, self.dim = amount, dim

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """Return the mask that leaves out the channels with the lowest scores; called by torch.

        Args:
            t: Scores, any shape.
            default_mask: The mask so far, same shape.

        Returns:
            The new mask. Of the channels alive, exactly ``round(amount * alive)`` are newly zero; of equal scores the
            channel that comes first is pruned first.

        Raises:
            IndexError: If there is no dimension ``dim``.
            ValueError: If ``amount`` is a count larger than what is alive.
        """
        dim = _checked_dim(self.dim, t)
        others = [d for d in range(t.dim()) if d != dim]
        alive = _alive_channels(default_mask != 0, dim)
        scores = t.detach().double().mean(others) if others else t.detach().double()
        gone = torch.zeros_like(alive)
        gone[alive] = lowest(scores[alive], count_to_prune(self.amount, int(alive.sum())))
        shape = [-1 if d == dim else 1 for d in range(t.dim())]
        return default_mask * (~gone).to(default_mask.dtype).view(shape)

    @classmethod
    def apply(  # type: ignore[override]
        cls, module: nn.Module, name: str, amount: float, dim: int = 0, importance_scores: Tensor | None = None
    ) -> prune.BasePruningMethod:
        """Mask channels of one tensor by the scores given for it.

        Args:
            module: The module.
            name: The tensor's name in it, e.g. ``"weight"``.
            amount: A fraction of the channels still alive (float in [0, 1]) or a count (int).
            dim: The dimension that counts channels.
            importance_scores: Scores of the tensor's shape, e.g. ``channel_importance(scores)[module, name]``.

        Returns:
            The hook that is now on the module.

        Raises:
            TypeError: If ``amount`` is neither int nor float, or the scores are not a floating point tensor.
            IndexError: If the tensor has no dimension ``dim``.
            ValueError: If there are no scores, they are not finite or of another shape, ``amount`` is out of range, or
                the tensor is a vector. The module is as before.
        """
        check_parameters(module, [(module, name)])
        scores = _check_given_scores(importance_scores, getattr(module, name), cls.__name__)
        if scores.dim() < 2:
            # torch's container would hand a vector over as one single channel, once it carries a mask.
            raise ValueError(
                f"name: must be a tensor of at least two dimensions, found {name} of shape {tuple(scores.shape)}; "
                "prune its entries with DiSparseStatic"
            )
        method = cls(amount, dim)
        dim = _checked_dim(dim, scores)
        alive = alive_mask(module, name)
        count_to_prune(method.amount, scores.shape[dim] if alive is None else int(_alive_channels(alive, dim).sum()))
        hook: prune.BasePruningMethod = super().apply(  # type: ignore[no-untyped-call]
            module, name, amount, dim, importance_scores=scores
        )
        keep_mask_type(module, name)
        return hook


class DiSparseSemiStructured(prune.BasePruningMethod):
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
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: must be an int, found {type(value).__name__}: {value!r}")
        if not 0 <= n <= m or m < 1:
            raise ValueError(f"n: must be in [0, m] with m of at least 1, found n={n}, m={m}; 2:4 is n=2, m=4")
        self.n, self.m = n, m

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
        scores = t.detach().double().masked_fill(default_mask == 0, -torch.inf)
        blocks = scores.movedim(dim, -1).unflatten(-1, (-1, self.m))
        # Ascending and stable: later ones of equal scores rank higher and stay.
        ranks = blocks.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
        keep = (ranks >= self.m - self.n).flatten(-2).movedim(-1, dim)
        mask: Tensor = default_mask * keep.to(default_mask.dtype)
        return mask

    @classmethod
    def apply(  # type: ignore[override]
        cls, module: nn.Module, name: str, n: int = 2, m: int = 4, importance_scores: Tensor | None = None
    ) -> prune.BasePruningMethod:
        """Mask one tensor by the scores given for it.

        Args:
            module: The module.
            name: The tensor's name in it, e.g. ``"weight"``.
            n: How many of each block stay.
            m: Size of a block along the input dimension (dimension 1).
            importance_scores: Scores of the tensor's shape, of which only the order matters:
                ``scores.importance()[module, name]``, or any finite tensor.

        Returns:
            The hook that is now on the module.

        Raises:
            TypeError: If ``n`` or ``m`` is no int, or the scores are not a floating point tensor.
            ValueError: If there are no scores, they are not finite or of another shape, the pattern is impossible, or
                the input dimension is not divisible by m. The module is as before.
        """
        check_parameters(module, [(module, name)])
        scores = _check_given_scores(importance_scores, getattr(module, name), cls.__name__)
        cls(n, m)
        _check_blocks(scores, min(1, scores.dim() - 1), m)
        hook: prune.BasePruningMethod = super().apply(  # type: ignore[no-untyped-call]
            module, name, n, m, importance_scores=scores
        )
        keep_mask_type(module, name)
        return hook


def channel_importance(
    scores: TaskScores, dim: int = 0, arbiter: str | Arbiter = "unanimous"
) -> dict[ParameterKey, Tensor]:
    """Let the tasks agree on whole channels: scores for :class:`DiSparseStructured`.

    A task's score of a channel is the sum of its element scores; percentiles are over all channels that the task
    reaches in ``scores.parameters``; the arbiter is applied per channel.

    Args:
        scores: Element scores.
        dim: The dimension that counts channels.
        arbiter: As in :meth:`TaskScores.importance`.

    Returns:
        For each pair of ``scores.parameters`` a float64 tensor of the weight's shape, constant over each channel.

    Raises:
        IndexError: If a parameter has no dimension ``dim``.
        ValueError: If the arbiter is unknown.

    Example:
        >>> from disparse_plugin import score_tasks
        >>> net = nn.Linear(3, 4)
        >>> losses = lambda model, x: {"a": model(x)[:, 0].square().mean(), "b": model(x)[:, 1].square().mean()}
        >>> importance = channel_importance(score_tasks(net, losses, [torch.randn(8, 3)]))
        >>> hook = DiSparseStructured.apply(net, "weight", 2, importance_scores=importance[net, "weight"])
        >>> net.weight_mask[:, 0]  # neither task reads the last two outputs
        tensor([1., 1., 0., 0.])
    """
    rows: list[Mapping[str, Tensor]] = []
    for key in scores.parameters:
        tables = {task: scores[task][key] for task in scores.tasks_reaching(*key)}
        rows.append({task: _per_channel(table, dim) for task, table in tables.items()})
    result = {}
    for key, values in zip(scores.parameters, agreement(rows, scores.tasks, arbiters.resolve(arbiter)), strict=True):
        shape = next(scores[task][key] for task in scores.tasks_reaching(*key)).shape
        place = _checked_dim(dim, torch.empty(shape, device="meta"))
        result[key] = values.view([-1 if d == place else 1 for d in range(len(shape))]).expand(shape).clone()
    return result


def _per_channel(score: Tensor, dim: int) -> Tensor:
    place = _checked_dim(dim, score)
    others = [d for d in range(score.dim()) if d != place]
    return score.double().sum(others) if others else score.double()


def _alive_channels(alive: Tensor, dim: int) -> Tensor:
    """Tell which channels have an entry alive."""
    return alive.movedim(dim, 0).reshape(alive.shape[dim], -1).any(1)


def _checked_dim(dim: int, tensor: Tensor) -> int:
    if not -tensor.dim() <= dim < tensor.dim():
        raise IndexError(f"dim: must be a dimension of the tensor of shape {tuple(tensor.shape)}, found {dim}")
    return dim % tensor.dim()


def _check_blocks(tensor: Tensor, dim: int, m: int) -> None:
    if tensor.shape[dim] % m:
        raise ValueError(
            f"m: must divide the input dimension, found {tensor.shape[dim]} inputs in shape {tuple(tensor.shape)} and "
            f"m={m}; leave this tensor out or choose another m"
        )
