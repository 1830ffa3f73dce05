"""What the tasks say of the channels of a group: their scores of its parameters, by channel."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from .groups import ChannelGroup, ParameterSlice

# Element scores by qualified parameter name, then by task; only what the task reaches.
ScoresByName: TypeAlias = Mapping[str, Mapping[str, Tensor]]

UNREACHED = "reached by no task"
UNSCORED = "has no scored parameter"
REDUCTIONS = ("mean", "sum", "max")
NORMALIZERS: dict[str, Callable[[Tensor], Tensor]] = {"mean": torch.mean, "max": torch.max, "sum": torch.sum}


def channel_scores(group: ChannelGroup, scores: ScoresByName, reduction: str = "mean") -> dict[str, Tensor]:
    """Score the channels of a group for every task that reaches it.

    For task k, ``s_k[c] = reduction over the group's parameter slices of the sum of task k's element scores in the
    slice of channel c``; slices that task k does not reach do not take part.

    Args:
        group: The group.
        scores: Element scores by parameter name and task.
        reduction: ``"mean"``, ``"sum"`` or ``"max"`` over the slices.

    Returns:
        For each task that reaches a slice, float64 scores on the CPU, one per channel.

    Raises:
        ValueError: If a score has another shape than the parameter: it is stale.

    Example:
        >>> from disparse_plugin.structured.groups import Follower
        >>> layer, both = torch.nn.Linear(2, 3, bias=False), torch.arange(3)
        >>> follower = Follower("fc", layer, "out", -1, 3, both, both)
        >>> group = ChannelGroup("fc", 3, both, (follower,))
        >>> channel_scores(group, {"fc.weight": {"a": torch.tensor([[1.0, 2.0], [0.0, 1.0], [5.0, 5.0]])}})
        {'a': tensor([ 3.,  1., 10.], dtype=torch.float64)}
    """
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for piece in group.slices():
        for task, score in scores.get(piece.name, {}).items():
            values = _slice_scores(piece, score, group.size)
            if task not in totals:
                totals[task], counts[task] = values, 1
            else:
                totals[task] = torch.maximum(totals[task], values) if reduction == "max" else totals[task] + values
                counts[task] += 1
    return {task: total / counts[task] if reduction == "mean" else total for task, total in totals.items()}


def why_unjudged(group: ChannelGroup, unreached: Container[str]) -> str:
    """Say why a group has no task's scores: no task reaches it, or nobody asked for scores of it.

    Args:
        group: The group.
        unreached: Names of the parameters that were asked for and that no task reaches.

    Example:
        >>> from disparse_plugin.structured.groups import Follower
        >>> layer, both = torch.nn.Linear(2, 3, bias=False), torch.arange(3)
        >>> group = ChannelGroup("fc", 3, both, (Follower("fc", layer, "out", -1, 3, both, both),))
        >>> why_unjudged(group, {"fc.weight"}), why_unjudged(group, {"head.weight"})
        ('reached by no task', 'has no scored parameter')
    """
    return UNREACHED if any(piece.name in unreached for piece in group.slices()) else UNSCORED


def channel_magnitudes(group: ChannelGroup, weights: Mapping[str, Tensor]) -> Tensor:
    """Sum ``abs(w)`` over all slices of each channel: of channels that score the same the smaller goes first.

    Args:
        group: The group.
        weights: The weights that were scored, by parameter name; others do not count.

    Returns:
        float64 on the CPU, one per channel.

    Example:
        >>> from disparse_plugin.structured.groups import Follower
        >>> layer, both = torch.nn.Linear(2, 2), torch.arange(2)
        >>> group = ChannelGroup("fc", 2, both, (Follower("fc", layer, "out", -1, 2, both, both),))
        >>> channel_magnitudes(group, {"fc.weight": torch.tensor([[1.0, -2.0], [0.0, 1.0]])})
        tensor([3., 1.], dtype=torch.float64)
    """
    names = {piece.name for piece in group.slices()} & weights.keys()
    found = channel_scores(group, {name: {"": weights[name].detach().abs()} for name in names}, "sum")
    return found[""] if found else torch.zeros(group.size, dtype=torch.float64)


def _slice_scores(piece: ParameterSlice, score: Tensor, size: int) -> Tensor:
    if score.shape != piece.shape:
        raise ValueError(
            f"scores: must be of the present parameters, found {tuple(score.shape)} for {piece.name} of shape "
            f"{tuple(piece.shape)}; the scores are stale since channels were removed: pass rescore=(losses, data) to "
            "score afresh before each step, or make a new importance from new scores"
        )
    by_position = sum_per_position(score.detach(), piece.dim, piece.blocks).cpu().double()
    return torch.zeros(size, dtype=torch.float64).index_add_(0, piece.channels, by_position[piece.positions])


def sum_per_position(values: Tensor, dim: int, blocks: int = 1) -> Tensor:
    """Sum a tensor over all dimensions but one.

    Args:
        values: Any shape.
        dim: The dimension that stays.
        blocks: For the inner dimension 1 of a grouped convolution: the number of groups that dimension 0 is cut into.

    Returns:
        1-D of ``values.shape[dim] * blocks`` entries.

    Example:
        >>> sum_per_position(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 1)
        tensor([4., 6.])
        >>> sum_per_position(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 1, blocks=2)
        tensor([1., 2., 3., 4.])
    """
    if blocks == 1:
        others = [d for d in range(values.dim()) if d != dim]
        return values.sum(others) if others else values
    return values.reshape(blocks, values.shape[0] // blocks, values.shape[1], -1).sum((1, 3)).flatten()


def normalized(scores: Tensor, normalizer: str | None) -> Tensor:
    """Divide the scores of a group by their mean, maximum or sum, so that groups compete on an equal footing.

    Args:
        scores: 1-D, not negative.
        normalizer: ``"mean"``, ``"max"``, ``"sum"``, or None to leave them.

    Returns:
        Same shape; a group of zeros stays zeros.
    """
    if normalizer is None:
        return scores
    scale = NORMALIZERS[normalizer](scores)
    return scores / scale if float(scale) > 0 else scores
