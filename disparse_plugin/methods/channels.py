"""Whole channels, masked, tensor by tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from .. import arbiters
from .._support.double import comparable, in_known_type
from ..agreement.amounts import check_amount, count_to_prune
from ..agreement.candidates import Candidates
from ..agreement.patterns import Place
from ..agreement.percentiles import agreement, fractions
from ..agreement.ranking import lowest, ranks
from ..arbiters import Arbiter
from ..kinds import whole_number
from ..parameters import ParameterKey, stored
from ..scoring.given import check_scores
from ..scoring.task_scores import TaskScores
from .base import ScoredPruning


class DiSparseStructured(ScoredPruning):
    """Mask the whole channels of one tensor that all tasks rank low.

    A channel's score is the mean of the given scores over the channel; :func:`channel_importance` makes scores that
    already agree per channel. Pruned entries are in that mean with the scores given for them (which are 0 in
    :meth:`TaskScores.importance`). Only channels with an entry alive count. Nothing gets smaller by a mask: to make the
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
        self.amount, self.dim = amount, whole_number("dim", dim)

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
        alive = _alive_channels(comparable(default_mask) != 0, dim)
        scores = _mean_of_channels(t.detach(), dim)
        gone = torch.zeros_like(alive)
        gone[alive] = lowest(scores[alive], count_to_prune(self.amount, int(alive.sum())))
        shape = [-1 if d == dim else 1 for d in range(t.dim())]
        return default_mask * (~gone).to(default_mask).view(shape)

    def _check(self, scores: Tensor, alive: Tensor | None) -> None:
        if scores.dim() < 2:
            # torch's container would hand a vector over as one single channel, once it carries a mask.
            raise ValueError(
                f"name: must be a tensor of at least two dimensions, found one of shape {tuple(scores.shape)}; prune "
                "its entries with DiSparseStatic"
            )
        dim = _checked_dim(self.dim, scores)
        count_to_prune(self.amount, scores.shape[dim] if alive is None else int(_alive_channels(alive, dim).sum()))

    def _ordered(self, scores: Tensor, weight: Tensor) -> Tensor:
        """Give each channel its rank; of equal channels the one of the smaller sum of ``abs(w)`` is lower."""
        dim = _checked_dim(self.dim, scores)
        order = ranks(_mean_of_channels(scores, dim), _per_channel(weight.abs(), dim))
        order = fractions(order, order.numel())
        return order.view([-1 if d == dim else 1 for d in range(scores.dim())]).expand(scores.shape)

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
        return cls._on_one_tensor(module, name, importance_scores, amount, dim)


def channel_importance(
    scores: TaskScores, dim: int = 0, arbiter: str | Arbiter = "unanimous"
) -> dict[ParameterKey, Tensor]:
    """Let the tasks agree on whole channels: scores for :class:`DiSparseStructured`.

    A task's score of a channel is the sum of its scores of the entries alive; percentiles are over all channels with an
    entry alive that the task reaches in ``scores.parameters``; the arbiter is applied per channel.

    Args:
        scores: Element scores.
        dim: The dimension that counts channels.
        arbiter: As in :meth:`TaskScores.importance`.

    Returns:
        For each pair of ``scores.parameters`` a float64 tensor (float32 on a device without) of the weight's shape,
        constant over each channel: in [0, 1], and 0 for a channel of which nothing is alive.

    Raises:
        TypeError: If ``scores`` is not a :class:`TaskScores`, or ``dim`` no int.
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
    check_scores(scores)
    rule, places = arbiters.resolve(arbiter), scores.places()
    rows = [
        {task: _alive_sums(score, place, dim) for task, score in row.items()}
        for row, place in zip(scores.by_parameter(), places, strict=True)
    ]
    weights = [
        _alive_sums(stored(*key).detach().abs().to(scores.device_of(key)), place, dim)
        for key, place in zip(scores.parameters, places, strict=True)
    ]
    values = agreement(Candidates(rows, weights), scores.tasks, rule)
    found = zip(scores.parameters, values, places, strict=True)
    return {key: in_known_type(_over_channels(value, place, dim), stored(*key).device) for key, value, place in found}


def _alive_sums(values: Tensor, place: Place, dim: int) -> Tensor:
    """Sum what is alive over each channel that has an entry alive."""
    dim = _checked_dim(dim, values)
    if place.alive is None:
        return _per_channel(values, dim)
    return _per_channel(values.masked_fill(~place.alive, 0), dim)[_alive_channels(place.alive, dim)]


def _over_channels(values: Tensor, place: Place, dim: int) -> Tensor:
    """Give every entry the value of its channel; 0 where nothing of the channel is alive."""
    if place.alive is not None:
        alive = _alive_channels(place.alive, dim)
        values = values.new_zeros(alive.shape).masked_scatter_(alive, values)
    shape = [-1 if d == dim % len(place.shape) else 1 for d in range(len(place.shape))]
    return values.view(shape).expand(place.shape).clone()


def _mean_of_channels(values: Tensor, dim: int) -> Tensor:
    values, others = comparable(values).double(), [d for d in range(values.dim()) if d != dim]
    return values.mean(others) if others else values


def _per_channel(score: Tensor, dim: int) -> Tensor:
    place = _checked_dim(dim, score)
    score, others = comparable(score).double(), [d for d in range(score.dim()) if d != place]
    return score.sum(others) if others else score


def _alive_channels(alive: Tensor, dim: int) -> Tensor:
    """Tell which channels have an entry alive."""
    return alive.movedim(dim, 0).reshape(alive.shape[dim], -1).any(1)


def _checked_dim(dim: int, tensor: Tensor) -> int:
    dim = whole_number("dim", dim)
    if not -tensor.dim() <= dim < tensor.dim():
        raise IndexError(f"dim: must be a dimension of the tensor of shape {tuple(tensor.shape)}, found {dim}")
    return dim % tensor.dim()
