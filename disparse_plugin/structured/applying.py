"""Applying a removal to a model: everything is checked first, then every tensor is cut once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._support.stored import set_number, stored_numbers
from ..parameters import module_names
from .adapter.private import known_pruner
from .attention import attention_heads, sync_attention
from .cuts import Attributes, Cut
from .layer_rule import Axis, Side
from .layers import rule_of
from .shrinking import Loss, check_blocks, cut_along, made_tensors, replace, tensors_of

# torch-pruning's objects that cut layers, by class of layer.
Pruners = Mapping[type[nn.Module], Any]


@dataclasses.dataclass(frozen=True)
class _Place:
    """One tensor of the model in one place, and one dimension in which it shrinks."""

    cut: Cut
    owner: nn.Module
    name: str
    axis: Axis

    @property
    def tensor(self) -> Tensor:
        tensor = self.owner._parameters.get(self.name, self.owner._buffers.get(self.name))
        assert tensor is not None
        return tensor

    def same_cut(self, other: _Place) -> bool:
        """Tell whether another place loses the very same positions."""
        mine, theirs = self.axis, other.axis
        return (
            (mine.dim % self.tensor.dim(), mine.blocks, mine.repeats)
            == (theirs.dim % other.tensor.dim(), theirs.blocks, theirs.repeats)
            and self.cut.count == other.cut.count
            and torch.equal(self.cut.positions, other.cut.positions)
        )


def apply_cuts(root: nn.Module, cuts: Sequence[Cut], attributes: Attributes, pruners: Pruners | None) -> None:
    """Remove positions from a model, in place; see :meth:`RemovalPlan.apply`.

    Raises:
        ValueError: If the cuts do not fit the model, which is then unchanged.
    """
    modules = {name: module for module, name in module_names(root).items()}
    heads = attention_heads(root)
    places: list[_Place] = []
    foreign: list[tuple[Cut, nn.Module, Any]] = []
    for cut in cuts:
        layer = _layer(cut, modules)
        if isinstance(layer, nn.Module) and (pruner := _foreign(layer, pruners)) is not None:
            _check_count(cut, (pruner.get_in_channels if cut.side == "in" else pruner.get_out_channels)(layer))
            foreign.append((cut, layer, pruner))
        else:
            places += _places(cut, layer, modules)
    _check_attributes(attributes, modules, cuts)
    by_tensor = _by_tensor(root, places)
    for members in by_tensor:
        check_blocks(members[0].tensor, _losses(members))
    with torch.inference_mode(False), torch.no_grad():  # what is new is to be of use outside, too
        for members in by_tensor:
            _shrink(members)
        for cut, layer, pruner in foreign:
            _prune(cut, layer, pruner)
    _resize([cut for cut in cuts if not any(cut is other for other, _, _ in foreign)], modules)
    changed = {modules[cut.target] for cut in cuts if cut.side == "out"}
    told = {child for name in attributes for child in modules[name].children()}
    sync_attention({qkv: count for qkv, count in heads.items() if qkv in changed and qkv not in told}, root)
    for name, values in attributes.items():
        for attribute, value in values.items():
            set_number(modules[name], attribute, value)


def _resize(cuts: Sequence[Cut], modules: Mapping[str, nn.Module]) -> None:
    """Write into layers how many channels they have left."""
    left: dict[nn.Module, dict[Side, int]] = {}
    for cut in cuts:
        if cut.side != "parameter":
            left.setdefault(modules[cut.target], {})[cut.side] = cut.count - len(cut.positions)
    for module, counts in left.items():
        if (rule := rule_of(module)) is not None:
            rule.resize(module, counts)


def _layer(cut: Cut, modules: Mapping[str, nn.Module]) -> nn.Module | Tensor:
    path, _, last = cut.target.rpartition(".")
    owner = modules.get(path)
    if cut.side != "parameter":
        layer: nn.Module | Tensor | None = modules.get(cut.target)
    else:
        layer = owner._parameters.get(last, owner._buffers.get(last)) if owner else None
    if layer is None:
        raise ValueError(f"model: must have the layer {cut.target!r}, found none; replay on the same architecture")
    return layer


def _foreign(layer: nn.Module, pruners: Pruners | None) -> Any:
    """Return what cuts a layer that the user has a pruner for, or that our table does not know; None otherwise."""
    if pruners and type(layer) in pruners:
        return pruners[type(layer)]
    if rule_of(layer) is not None:
        return None
    pruner = known_pruner(layer)
    if pruner is None:
        raise ValueError(
            f"model: every layer that loses channels must be of a known type, found {type(layer).__name__}; pass the "
            "customized_pruners with which the removal was made"
        )
    return pruner


def _places(cut: Cut, layer: nn.Module | Tensor, modules: Mapping[str, nn.Module]) -> Iterator[_Place]:
    if isinstance(layer, Tensor):
        path, _, last = cut.target.rpartition(".")
        _check_count(cut, layer.shape[cut.dim] if -layer.dim() <= cut.dim < layer.dim() else 0)
        yield _Place(cut, modules[path], last, Axis(last, cut.dim))
        return
    rule = rule_of(layer)
    assert rule is not None
    _check_own(cut, layer)
    _check_count(cut, rule.count(layer, cut.side))
    for owner, name, axis, _ in tensors_of(layer, cut.side):
        yield _Place(cut, owner, name, axis)


def _check_own(cut: Cut, layer: nn.Module) -> None:
    """Check that a layer holds what it is to lose parts of, and does not make it anew from something else."""
    if made := made_tensors(layer, cut.side):
        raise ValueError(
            f"model: {cut.target} must hold its {made[0]} as a plain tensor, found one that a mask or a "
            "parametrization makes; make it permanent first (torch.nn.utils.prune.remove, "
            "parametrize.remove_parametrizations, remove_weight_norm)"
        )


def _check_count(cut: Cut, count: int | None) -> None:
    if count is not None and count != cut.count:
        raise ValueError(
            f"model: {cut.target} must have {cut.count} positions ({cut.side}), found {count}; replay on the full-size "
            "architecture, removals in the order in which they were made"
        )


def _by_tensor(root: nn.Module, places: Sequence[_Place]) -> list[list[_Place]]:
    """Gather the places of each tensor; one that several layers share must lose the same in all of them."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in root.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                owners.setdefault(id(tensor), []).append((module, name))
    found: dict[int, list[_Place]] = {}
    for place in places:
        found.setdefault(id(place.tensor), []).append(place)
    names = module_names(root)
    for number, members in found.items():
        wanted = [member for member in members if member.owner is members[0].owner and member.name == members[0].name]
        for owner, name in owners[number]:
            own = [member for member in members if member.owner is owner and member.name == name]
            if len(own) != len(wanted) or any(not any(a.same_cut(b) for b in wanted) for a in own):
                first = f"{names[members[0].owner]}.{members[0].name}"
                raise ValueError(
                    f"model: layers that share a tensor must lose the same, found {first} and {names[owner]}.{name}, "
                    "which share one, cut differently; untie them first, or leave both as they are (exclude=...)"
                )
    return list(found.values())


def _shrink(members: Sequence[_Place]) -> None:
    """Cut one tensor along all its axes, and put it into every place that holds it."""
    first, losses = members[0], _losses(members)
    grad = None if first.tensor.grad is None else cut_along(first.tensor.grad, losses)
    replace(first.owner, first.name, cut_along(first.tensor, losses), grad)
    for place in members[1:]:
        if place.name in place.owner._parameters:
            place.owner._parameters[place.name] = first.owner._parameters[first.name]
        else:
            place.owner._buffers[place.name] = first.owner._buffers[first.name]


def _losses(members: Sequence[_Place]) -> list[Loss]:
    """Return what a tensor loses, as its first place says; all say the same."""
    first = members[0]
    own = [place for place in members if place.owner is first.owner and place.name == first.name]
    return [Loss(place.axis, place.cut.count, place.cut.positions) for place in own]


def _prune(cut: Cut, layer: nn.Module, pruner: Any) -> None:
    """Let an object of torch-pruning cut a layer; whether its parameters want gradients stays."""
    frozen = [name for name, parameter in layer.named_parameters() if not parameter.requires_grad]
    (pruner.prune_in_channels if cut.side == "in" else pruner.prune_out_channels)(layer, cut.positions.tolist())
    for name in frozen:
        layer.get_parameter(name).requires_grad_(False)


def _check_attributes(attributes: Attributes, modules: Mapping[str, nn.Module], cuts: Sequence[Cut]) -> None:
    for name, values in attributes.items():
        plain = stored_numbers(modules[name]) if name in modules else {}
        missing = set(values) - set(plain)
        if missing:
            raise ValueError(
                f"model: {name!r} must have {', '.join(sorted(missing))}, found none; replay on the same architecture"
            )
        around = any(name == "" or cut.target.startswith(f"{name}.") for cut in cuts)
        if not around and next(modules[name].parameters(), None) is not None:  # nn.Unflatten holds numbers alone
            raise ValueError(f"plan: only modules around a cut layer may change numbers, found {name!r}, which is none")
        for attribute, value in values.items():
            if not _may_become(plain[attribute], value):
                raise ValueError(
                    f"plan: numbers of widths may only shrink, found {name}.{attribute} from {plain[attribute]!r} to "
                    f"{value!r}; the file is damaged, or of another architecture"
                )


def _may_become(old: Any, new: Any) -> bool:
    if isinstance(old, tuple):
        return isinstance(new, tuple) and len(old) == len(new) and all(map(_may_become, old, new))
    if isinstance(old, float):
        return isinstance(new, int | float) and math.isfinite(new) and new > 0
    return type(new) is int and 0 < new <= old
