"""A removal as data: which positions of which layers go. It can be checked, applied, saved, and replayed elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .._support.files import read_tensors, understood, write_tensors
from ..parameters import check_not_synced, unwrap
from .applying import apply_cuts
from .cuts import Attributes, Cut, check_cuts, composed

_KIND = "disparse_plugin.removal"


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
        >>> import torch
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
            ValueError: If a layer or an attribute is missing, a layer has another size, or the model is in
                ``DistributedDataParallel``, which would not sync the new parameters. The model is unchanged.
        """
        check_cuts(self.cuts)
        root = unwrap(model)
        check_not_synced(model)
        apply_cuts(root, self.cuts, self.attributes, customized_pruners)

    def then(self, later: RemovalPlan) -> RemovalPlan:
        """Join this removal and one of the smaller model, in the numbering of the full model.

        Example:
            >>> import torch
            >>> first = RemovalPlan((Cut("fc", "out", -1, 4, torch.tensor([1])),))
            >>> second = RemovalPlan((Cut("fc", "out", -1, 3, torch.tensor([1])),))
            >>> first.then(second).cuts[0].positions
            tensor([1, 2])
        """
        attributes = {
            name: {**self.attributes.get(name, {}), **later.attributes.get(name, {})}
            for name in (*self.attributes, *later.attributes)
        }
        return RemovalPlan(composed(self.cuts, later.cuts), attributes)

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
            FileFormatError: If it is another file, damaged, or written by a newer version.
        """
        tensors, facts = read_tensors(path, kind=_KIND)
        with understood(path, "removals"):
            cuts = tuple(Cut(**fact, positions=tensors[str(n)]) for n, fact in enumerate(facts["cuts"]))
            attributes = {
                name: {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
                for name, values in facts.get("attributes", {}).items()
            }
            check_cuts(cuts)
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
        ValueError: If the file is of another kind or does not fit the model, or as :meth:`RemovalPlan.apply`. The model
            is then unchanged.

    Example:
        >>> import tempfile, torch
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        >>> gone = torch.tensor([1])
        >>> with tempfile.TemporaryDirectory() as folder:  # report.save writes such a file
        ...     RemovalPlan((Cut("0", "out", -1, 3, gone), Cut("1", "in", -1, 3, gone))).save(f"{folder}/removed")
        ...     replay_removal(net, f"{folder}/removed")
        >>> net[0].out_features, net[1].in_features
        (2, 2)
    """
    RemovalPlan.load(path).apply(model, customized_pruners=customized_pruners)
