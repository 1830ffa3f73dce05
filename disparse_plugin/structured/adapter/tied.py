"""Groups of layers that share a Parameter: what loses channels in one of them must lose them in all."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import torch
from torch import nn

from ...parameters import keys_by_name
from ..groups import ChannelGroup, parameter_slices

# How a group cuts one parameter: for each slice dimension, blocks, positions and the channels that take them along.
_Cuts = list[tuple[int, int, list[int], list[int]]]


def settle_tied(model: nn.Module, usable: list[ChannelGroup], skipped: dict[str, str], traced: Collection[str]) -> None:
    """Let layers that share a Parameter lose the same, or leave the groups alone; both lists change in place.

    A layer that never runs (the ``shared`` embedding of T5 beside that of its encoder) follows the one that does. Two
    groups that cut one Parameter alike (the streams of an encoder and a decoder with one embedding) become one.

    Args:
        model: The model.
        usable: Its groups.
        skipped: Layer name to the reason why it is left alone.
        traced: Names of the modules that run.
    """
    keys = keys_by_name(model)
    owners: dict[int, list[str]] = {}
    for name, (module, key) in keys.items():
        owners.setdefault(id(module._parameters[key]), []).append(name)
    shared = {name: others for others in owners.values() if len(others) > 1 for name in others}
    if not shared:
        return
    usable[:] = [_with_idle(group, shared, {name: key[0] for name, key in keys.items()}, traced) for group in usable]
    while (torn := next((found for group in usable if (found := _torn(group, shared)) is not None), None)) is not None:
        group, name, other = torn
        usable.remove(group)
        joint = next((joint for one in usable if (joint := _joined(group, name, one, other)) is not None), None)
        if joint is None:
            skipped[group.name] = f"{name} and {other} share one Parameter, of which only one would lose channels"
        else:
            usable[:] = [joint, *(one for one in usable if one.followers[0] not in joint.followers)]


def _with_idle(
    group: ChannelGroup, shared: Mapping[str, Collection[str]], owners: Mapping[str, nn.Module], traced: Collection[str]
) -> ChannelGroup:
    """Let layers that never run follow those with which they share a Parameter."""
    followers = list(group.followers)
    for follower in group.followers:
        for piece in parameter_slices(follower):
            for other in shared.get(piece.name, ()):
                path, module = other.rpartition(".")[0], owners[other]
                if path not in traced and type(module) is type(follower.layer):
                    followers.append(dataclasses.replace(follower, target=path, layer=module))
    return dataclasses.replace(group, followers=tuple(followers))


def _cuts(group: ChannelGroup, names: Collection[str]) -> dict[str, _Cuts]:
    found: dict[str, _Cuts] = {}
    for piece in group.slices():
        if piece.name in names:
            entry = (piece.dim, piece.blocks, piece.positions.tolist(), piece.channels.tolist())
            cuts = found.setdefault(piece.name, [])
            if entry not in cuts:  # an idle layer may follow two groups that became one
                cuts.append(entry)
    return {name: sorted(cuts) for name, cuts in found.items()}


def _torn(group: ChannelGroup, shared: Mapping[str, Collection[str]]) -> tuple[ChannelGroup, str, str] | None:
    """Return a group with two names of one Parameter that it would cut differently, or None."""
    pieces = _cuts(group, shared)
    for name, cuts in pieces.items():
        for other in shared[name]:
            if pieces.get(other) != cuts:
                return group, name, other
    return None


def _joined(group: ChannelGroup, name: str, other_group: ChannelGroup, other: str) -> ChannelGroup | None:
    """Make one group of two that cut one Parameter alike, under two names; None if they do not."""
    mine, theirs = _cuts(group, [name]), _cuts(other_group, [other])
    if mine.get(name) != theirs.get(other) or not torch.equal(group.units, other_group.units):
        return None
    return dataclasses.replace(group, followers=(*group.followers, *other_group.followers))
