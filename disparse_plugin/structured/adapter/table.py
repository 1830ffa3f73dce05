"""The order of removal of all groups that a pruner ranks: channels within their scope, and whole attention heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..order import ChannelRule, removal_order
from .pruner import RankedGroup, heads_to_remove, limit_counts

# Root layer and side to the place of each channel in the order; None where no task reaches the group.
RemovalTable: TypeAlias = dict[tuple[nn.Module, bool], Tensor | None]


@dataclasses.dataclass(frozen=True)
class ScoredGroup:
    """A group, each reaching task's score of each of its channels, and the channels' magnitudes."""

    ranked: RankedGroup
    scores: Mapping[str, Tensor]
    magnitudes: Tensor


def removal_table(
    scored: Sequence[ScoredGroup], tasks: Sequence[str], rule: ChannelRule, pruner: Any, initial: dict[str, int]
) -> RemovalTable:
    """Rank the channels of all groups, each scope for itself, and the heads of attentions that lose whole heads.

    Args:
        scored: The groups with their scores.
        tasks: All task names.
        rule: The reductions over tasks.
        pruner: The pruner that will cut, to keep its counts within what may go; None if it is not known.
        initial: Remembers the sizes of the scopes over the pruner's steps.

    Returns:
        For each group float64 places, lower goes first; None for groups that no task reaches.
    """
    table: RemovalTable = {item.ranked.root: None for item in scored if not item.scores}
    scopes: dict[str, list[ScoredGroup]] = {}
    for item in scored:
        if item.scores:
            scopes.setdefault(item.ranked.scope, []).append(item)
    for scope, members in scopes.items():
        groups = [item.ranked for item in members]
        order = _order(members, [ranked.keep for ranked in groups], tasks, rule, lambda r, v: r.channels.per_unit(v))
        for ranked, places in zip(groups, order, strict=True):
            table[ranked.root] = places[ranked.channels.units]
        if pruner is not None and scope != "all" and pruner.current_step > 0:
            limit_counts(pruner, scope, groups, initial)
    _rank_heads([item for item in scored if item.ranked.heads and item.scores], tasks, rule, pruner, table)
    return table


def _order(
    members: Sequence[ScoredGroup],
    keep: Sequence[int],
    tasks: Sequence[str],
    rule: ChannelRule,
    joined: Callable[[RankedGroup, Tensor], Tensor],
) -> list[Tensor]:
    """Put units in order; ``joined`` makes values of a group's units of those of its channels."""
    scores = [{task: joined(item.ranked, values) for task, values in item.scores.items()} for item in members]
    magnitudes = [joined(item.ranked, item.magnitudes) for item in members]
    return removal_order(scores, keep, tasks, rule, magnitudes)


def _rank_heads(
    members: Sequence[ScoredGroup], tasks: Sequence[str], rule: ChannelRule, pruner: Any, table: RemovalTable
) -> None:
    """Let whole attention heads compete, by the agreement of their own percentiles.

    torch-pruning averages one vector over heads for its channels and over channels for its heads. The table holds
    channel places already; here each head's rows are shifted so that their mean orders the heads, while the mean over
    the heads stays.
    """
    if not members:
        return
    contests = [members] if pruner.global_pruning else [[member] for member in members]
    for contest in contests:
        groups = [item.ranked for item in contest]
        order = _order(contest, [1] * len(contest), tasks, rule, lambda r, v: v.view(r.heads, -1).mean(1))
        count = heads_to_remove(pruner, groups)
        far = float(sum(ranked.channels.size for ranked in groups)) + 1
        for ranked, places in zip(groups, order, strict=True):
            channels = table[ranked.root]
            assert channels is not None
            table[ranked.root] = with_heads(channels, ranked.heads, places, count, far)


def with_heads(channels: Tensor, heads: int, places: Tensor, count: int, far: float) -> Tensor:
    """Shift the channels' places so that their mean over a head orders the heads, and the mean over heads stays.

    Args:
        channels: Place of each channel; the same in every head.
        heads: Number of heads, each a block of consecutive channels.
        places: Place of each head in the order of removal.
        count: How many places go.
        far: A distance larger than all places of channels.

    Returns:
        float64, one per channel. The heads that go have the lowest means, below all that stay.
    """
    matrix = channels.view(heads, -1)
    middle = matrix.mean()
    going = places < count
    target = torch.where(going, places - far - count, torch.zeros_like(places))
    staying = int((~going).sum())
    target[~going] = middle + (middle * int(going.sum()) - target[going].sum()) / staying
    return (matrix - middle + target[:, None]).flatten()
