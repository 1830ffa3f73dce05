"""Translating one group of torch-pruning, with what it maps wrongly sorted out, or saying why it cannot be."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..groups import ChannelGroup, Follower
from ..layer_rule import Side
from ..layers import is_depthwise, rule_of
from .private import parameter_name, tp


class UnusableGroupError(ValueError):
    """A group that cannot be removed consistently; the message says why."""


def read_group(
    graph: Any,
    group: Any,
    size: int,
    names: Mapping[nn.Module, str],
    blocks: Mapping[tuple[nn.Module, Side], int],
    kept: Collection[nn.Module | nn.Parameter] = (),
    clashing: list[nn.Parameter] | None = None,
    folds: int | None = None,
) -> ChannelGroup:
    """Translate a full group of torch-pruning, or say why it cannot be removed from.

    Args:
        graph: The graph it comes from.
        group: A group over all channels of its root.
        size: How many those are.
        names: Module names.
        blocks: In how many equal blocks each side of a layer must be pruned alike.
        kept: Layers that must keep their outputs.
        clashing: Collects bare parameters that do not fit.
        folds: The number of blocks, where the caller (a pruner) has decided.

    Raises:
        UnusableGroupError: If positions do not fit a layer, a channel count is not divisible, or an output changes.
    """
    by_head = folds is None and (group[0].dep.target.module, "in") not in blocks
    followers, width = _followers(graph, group, size, names, kept, clashing, by_head=by_head)
    counts: dict[Follower, int] = {}
    for follower in followers if folds is None else ():
        if isinstance(follower.layer, nn.Module) and (follower.layer, follower.side) in blocks:
            counts[follower] = blocks[follower.layer, follower.side]
    folds = max(counts.values(), default=1) if folds is None else folds
    if size % folds or any(folds % count for count in counts.values()):
        raise UnusableGroupError(f"{size} channels do not split evenly into {folds} groups of channels")
    ties = [*_ties(group, followers), *((channel, channel - channel % width) for channel in range(size))]
    units = _merged(torch.arange(size) % (size // folds), [(a, b) for a, b in ties if a != b])
    result = ChannelGroup(followers[0].target, size, units, tuple(followers))
    for follower, count in counts.items():
        _check_alike(result, follower, count)
    return result


def _followers(
    graph: Any,
    group: Any,
    size: int,
    names: Mapping[nn.Module, str],
    kept: Collection[nn.Module | nn.Parameter],
    clashing: list[nn.Parameter] | None,
    *,
    by_head: bool,
) -> tuple[list[Follower], int]:
    """Return what follows, and how many consecutive channels can only go together (1: each can go alone)."""
    followers, clashes, width = list[Follower](), list[str](), 1
    for item in group.items:
        node = item.dep.target
        if node.type == tp.ops.OPTYPE.OUTPUT:
            raise UnusableGroupError("changes an output of the model")
        if isinstance(graph.get_pruner_of_module(node.module), tp.ops.DummyPruner):
            continue
        follower = _follower(graph, item, names)
        if follower.layer in kept and follower.side != "in":
            raise UnusableGroupError(f"goes together with {follower.target}, which must keep its outputs")
        error = _misfit(follower, size)
        if error is not None and by_head and _is_norm_of_heads(follower, size):
            width = math.lcm(width, follower.count)
        elif error is not None and by_head and _is_table(follower, size):
            width = math.lcm(width, size // follower.count)
            followers.append(_of_heads(follower, size))
        elif error is None:
            followers.append(follower)
        elif isinstance(node.module, nn.Parameter) and clashing is not None:
            clashing.append(node.module)
            clashes.append(error)
        else:
            clashes.append(error)
    if clashes:
        raise UnusableGroupError(clashes[0])
    return followers, width


def _one_to_one(follower: Follower, size: int) -> bool:
    fits = 1 < follower.count < size and size % follower.count == 0
    return fits and torch.equal(follower.positions.sort().values, torch.arange(size))


def _is_norm_of_heads(follower: Follower, size: int) -> bool:
    """Tell whether a follower normalises each head for itself, and so stays as it is if heads go as a whole."""
    layer, rule = follower.layer, rule_of(follower.layer)
    bare = isinstance(layer, nn.Parameter) and layer.dim() == 1  # of a class that is not in the table (Qwen's RMSNorm)
    return (bare or (rule is not None and rule.over is not None)) and _one_to_one(follower, size)


def _is_table(follower: Follower, size: int) -> bool:
    """Tell whether a follower may hold one position for each head, as tables of relative positions do.

    torch-pruning maps the channels of queries and keys onto it one to one, because it sees their product as element by
    element. Whether a head is what is consecutive is for the trial to find out.
    """
    return follower.side != "in" and _one_to_one(follower, size)


def _of_heads(follower: Follower, size: int) -> Follower:
    """Map the first channel of each head to the head's position in a table."""
    heads = torch.arange(follower.count)
    return dataclasses.replace(follower, positions=heads, channels=heads * (size // follower.count))


def _follower(graph: Any, item: Any, names: Mapping[nn.Module, str]) -> Follower:
    node, positions, channels = item.dep.target, item.idxs, item.root_idxs
    side: Side
    if None in channels:
        raise UnusableGroupError("its channels are repeated (grouped-query attention)")
    if isinstance(node.module, nn.Parameter):
        name, side, dim = parameter_name(graph, node.module), "parameter", node.pruning_dim
    else:
        name, dim = names[node.module], -1
        side = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
    count = graph.get_in_channels(node) if side == "in" else graph.get_out_channels(node)
    if count is None:  # PReLU with one slope for all channels
        count = max(positions, default=0) + 1
    positions, channels = torch.tensor(positions, dtype=torch.int64), torch.tensor(channels, dtype=torch.int64)
    return Follower(name, node.module, side, dim, count, positions, channels)


def _misfit(follower: Follower, size: int) -> str | None:
    """Say why torch-pruning's positions cannot be those of the layer, or return None."""
    count, what, rule = follower.count, f"{follower.target} ({follower.side})", rule_of(follower.layer)
    refusal = (rule.refusal(follower.layer) or rule.misread(follower.layer)) if rule is not None else None
    if refusal is not None:
        return f"{what} {refusal}"
    if follower.positions.numel() and not 0 <= int(follower.positions.min()) <= int(follower.positions.max()) < count:
        return f"{what} has {count} positions, found {int(follower.positions.max())}: a mapping that cannot be right"
    if follower.channels.numel() and int(follower.channels.max()) >= size:
        return f"{what} is mapped to {int(follower.channels.max()) + 1} channels of {size}"
    return None


def _ties(group: Any, followers: Collection[Follower]) -> list[tuple[int, int]]:
    """List pairs of channels that claim one position."""
    ties = list(getattr(group, "ties", ()))
    for follower in followers:
        if follower.positions.unique().numel() < follower.positions.numel():
            owner: dict[int, int] = {}
            for position, channel in zip(follower.positions.tolist(), follower.channels.tolist(), strict=True):
                ties.append((owner.setdefault(position, channel), channel))
    return [(first, second) for first, second in ties if first != second]


def _merged(units: Tensor, ties: list[tuple[int, int]]) -> Tensor:
    """Join the units of tied channels, and number what remains from zero."""
    if not ties:
        return units
    parent = list(range(int(units.max()) + 1))

    def find(unit: int) -> int:
        while parent[unit] != unit:
            parent[unit] = unit = parent[parent[unit]]
        return unit

    for first, second in ties:
        one, other = find(int(units[first])), find(int(units[second]))
        parent[max(one, other)] = min(one, other)
    numbers: Tensor = torch.tensor([find(unit) for unit in units.tolist()]).unique(return_inverse=True)[1]
    return numbers


def _check_alike(group: ChannelGroup, follower: Follower, blocks: int) -> None:
    """Check that removing a unit takes the same places from every block of a grouped layer."""
    width = follower.count // blocks
    unit = group.units[follower.channels]
    local, block = follower.positions % width, follower.positions // width
    seen: dict[tuple[int, int], set[int]] = {}
    for key in zip(unit.tolist(), local.tolist(), block.tolist(), strict=True):
        seen.setdefault(key[:2], set()).add(key[2])
    if any(len(found) != blocks for found in seen.values()):
        raise UnusableGroupError(f"{follower.target} has {blocks} groups of channels, which would lose different ones")


def block_counts(graph: Any) -> dict[tuple[nn.Module, Side], int]:
    """Return in how many equal blocks each side of a layer must be pruned alike, where more than one."""
    counts: dict[tuple[nn.Module, Side], int] = {}
    for module in graph.model.modules():
        pruner = graph.get_pruner_of_module(module)
        if pruner is None or is_depthwise(module):
            continue
        rule = rule_of(module)
        own = rule.folds(module) if rule is not None else 1
        counts[module, "out"] = max(pruner.get_out_channel_groups(module), own)
        counts[module, "in"] = max(pruner.get_in_channel_groups(module), own)
    return {key: count for key, count in counts.items() if count > 1}
