"""A removal as data: which positions of which layers go. It can be checked, applied, saved, and replayed elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .._support.files import read_tensors, write_tensors
from ..parameters import module_names, unwrap
from .adapter.graph import pruner_of
from .attention import attention_heads, sync_attention
from .groups import Side

_KIND = "disparse_plugin.removal"

# Module name to the plain numbers that it holds after the removal, where they changed.
Attributes: TypeAlias = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Cut:
    """Positions that one layer loses on one side.

    Attributes:
        target: Qualified name of the module, or of the parameter if ``side`` is ``"parameter"``.
        side: ``"out"``, ``"in"`` or ``"parameter"``.
        dim: The dimension of a bare parameter; -1 elsewhere.
        count: How many positions the side has before.
        positions: int64, ascending, each once.
    """

    target: str
    side: Side
    dim: int
    count: int
    positions: Tensor


@dataclasses.dataclass(frozen=True)
class RemovalPlan:
    """All cuts of a removal, in the numbering of the model before it.

    The file written by :meth:`save` is small and needs no pickle: build the architecture again, ``load`` the plan,
    ``apply`` it, and load the state dict of the smaller model.

    Attributes:
        cuts: At most one for each side of each layer.
        attributes: Module name to numbers that it holds after the removal, such as ``num_heads``. Attention layers that
            are not listed are brought into line by :func:`~disparse_plugin.structured.sync_attention`.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        >>> gone = torch.tensor([1])
        >>> RemovalPlan((Cut("0", "out", -1, 3, gone), Cut("1", "in", -1, 3, gone))).apply(net)
        >>> net[0].weight.shape, net[1].weight.shape
        (torch.Size([2, 4]), torch.Size([2, 2]))
    """

    cuts: tuple[Cut, ...]
    attributes: Attributes = dataclasses.field(default_factory=dict)

    def apply(self, model: nn.Module, *, customized_pruners: Mapping[type[nn.Module], Any] | None = None) -> None:
        """Remove the positions from a model, in place.

        Everything is checked before the first change. ``requires_grad`` of every parameter stays; gradients are cut
        along; optimizers hold the old parameters and must be made anew.

        Args:
            model: A model with the layers and sizes that the plan was made for.
            customized_pruners: As in torch-pruning, by class, if they were used to make the plan.

        Raises:
            ValueError: If a layer or an attribute is missing, or a layer has another size. The model is unchanged.
        """
        root = unwrap(model)
        modules = {name: module for module, name in module_names(root).items()}
        heads = attention_heads(root)
        steps = []
        for cut in self.cuts:
            layer = _parameter(root, cut.target) if cut.side == "parameter" else modules.get(cut.target)
            if layer is None:
                raise ValueError(
                    f"model: must have the layer {cut.target!r}, found none; replay on the same architecture"
                )
            # Chosen before any cut: a grouped convolution can come to look like a depthwise one half-way.
            pruner = pruner_of(layer, customized_pruners)
            _check_size(cut, layer, pruner)
            steps.append((cut, layer, pruner))
        _check_attributes(self.attributes, modules)
        with torch.no_grad():
            for cut, layer, pruner in steps:
                _cut(root, cut, layer, pruner)
        changed = {layer for cut, layer, _ in steps if cut.side == "out"}
        told = {child for name in self.attributes for child in modules[name].children()}
        sync_attention({qkv: count for qkv, count in heads.items() if qkv in changed and qkv not in told}, root)
        for name, values in self.attributes.items():
            for attribute, value in values.items():
                setattr(modules[name], attribute, value)

    def save(self, path: str | Path) -> None:
        """Write the plan to a safetensors file; an existing file is replaced atomically.

        Args:
            path: The file.
        """
        facts = [{"target": c.target, "side": c.side, "dim": c.dim, "count": c.count} for c in self.cuts]
        tensors = {str(number): cut.positions for number, cut in enumerate(self.cuts)}
        write_tensors(path, tensors, kind=_KIND, facts={"cuts": facts, "attributes": self.attributes})

    @classmethod
    def load(cls, path: str | Path) -> RemovalPlan:
        """Read a plan written by :meth:`save`.

        Args:
            path: The file.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is another file, damaged, or written by a newer version.
        """
        tensors, facts = read_tensors(path, kind=_KIND)
        cuts = tuple(Cut(**fact, positions=tensors[str(n)]) for n, fact in enumerate(facts["cuts"]))
        attributes = {
            name: {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
            for name, values in facts.get("attributes", {}).items()
        }
        return cls(cuts, attributes)


def replay_removal(
    model: nn.Module, path: str | Path, *, customized_pruners: Mapping[type[nn.Module], Any] | None = None
) -> None:
    """Remove from a freshly built model what was removed from another one of the same architecture.

    Nothing is traced and nothing is unpickled: the file lists the positions that each layer loses.

    Args:
        model: The model, at its full size; changed in place.
        path: A file written by ``report.save(path)`` after :func:`~disparse_plugin.structured.remove_channels`, or by
            ``recording.save(path)`` of :func:`~disparse_plugin.structured.record_removal`.
        customized_pruners: As in torch-pruning, by class, if they were used for the removal.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is of another kind or does not fit the model, which is then unchanged.
    """
    RemovalPlan.load(path).apply(model, customized_pruners=customized_pruners)


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the numbers, and tuples of whole numbers, that a module holds as attributes."""

    def is_plain(value: object) -> bool:
        if isinstance(value, tuple):
            return all(type(entry) is int for entry in value)
        return type(value) in (int, float)

    return {name: value for name, value in module.__dict__.items() if is_plain(value)}


def _check_attributes(attributes: Attributes, modules: Mapping[str, nn.Module]) -> None:
    for name, values in attributes.items():
        missing = set(values) - set(plain_attributes(modules[name])) if name in modules else set(values)
        if missing:
            raise ValueError(
                f"model: {name!r} must have {', '.join(sorted(missing))}, found none; replay on the same architecture"
            )


def _parameter(root: nn.Module, name: str) -> nn.Parameter | None:
    path, _, last = name.rpartition(".")
    modules = {name: module for module, name in module_names(root).items()}
    return modules[path]._parameters.get(last) if path in modules else None


def _check_size(cut: Cut, layer: nn.Module | nn.Parameter, pruner: Any) -> None:
    if isinstance(layer, nn.Parameter):
        count = layer.shape[cut.dim] if layer.dim() > cut.dim else 0
    else:
        count = (pruner.get_in_channels if cut.side == "in" else pruner.get_out_channels)(layer)
    if count is not None and count != cut.count:
        raise ValueError(
            f"model: {cut.target} must have {cut.count} positions ({cut.side}), found {count}; replay on the full-size "
            "architecture, removals in the order in which they were made"
        )


def _cut(root: nn.Module, cut: Cut, layer: nn.Module | nn.Parameter, pruner: Any) -> None:
    positions = cut.positions.tolist()
    if isinstance(layer, nn.Parameter):
        pruner.pruning_dim = cut.dim
        smaller = pruner.prune_out_channels(layer, positions).requires_grad_(layer.requires_grad)
        path, _, last = cut.target.rpartition(".")
        owner = next(module for module, name in module_names(root).items() if name == path)
        setattr(owner, last, smaller)
        return
    frozen = [name for name, parameter in layer.named_parameters() if not parameter.requires_grad]
    (pruner.prune_in_channels if cut.side == "in" else pruner.prune_out_channels)(layer, positions)
    for name in frozen:
        layer.get_parameter(name).requires_grad_(False)


def merge_cuts(cuts: Iterable[Cut]) -> tuple[Cut, ...]:
    """Join the cuts of one side of one layer, which several groups may share (after a concatenation).

    Example:
        >>> one, two = Cut("fc", "in", -1, 4, torch.tensor([2])), Cut("fc", "in", -1, 4, torch.tensor([0, 2]))
        >>> merge_cuts([one, two])[0].positions
        tensor([0, 2])
    """
    merged: dict[tuple[str, Side, int], Cut] = {}
    for cut in cuts:
        key = (cut.target, cut.side, cut.dim)
        known = merged.get(key)
        positions = cut.positions if known is None else torch.cat([known.positions, cut.positions])
        merged[key] = dataclasses.replace(cut, positions=positions.unique())
    return tuple(merged.values())
