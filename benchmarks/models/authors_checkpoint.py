"""Checkpoints of the DiSparse authors' code, read into :class:`PaperNetwork` and written back.

Their state dicts name the trunk's layers ``backbone.conv1``, ``backbone.blocks.<stage>.<block>.conv1``,
``backbone.ds.<stage>.0`` and a head's ``task<k>_fc1_c<branch>.conv1``, with tasks counted from 1. In pruned ones each
convolution's ``weight`` is ``weight_orig`` and an int32 ``weight_mask``, as ``torch.nn.utils.prune`` splits them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from disparse_plugin.masks import attach_masks, fold

from .paper_network import PaperNetwork

_PLACES = [(stage, block) for stage, blocks in enumerate((3, 4, 6, 3)) for block in range(blocks)]
_MEAN = (104.00698793, 116.66876762, 122.67891434)  # of blue, green and red
_FIRST = 4  # of the trunk's modules, before the blocks: convolution, norm, activation, pooling
_HEAD_LAYERS = {"0": "conv1", "3": "conv2", "6": "conv3"}


def read_authors_state(network: PaperNetwork, state: Mapping[str, Tensor]) -> None:
    """Load an authors' state dict, with its masks if it is of a pruned network.

    Args:
        network: With the tasks of the checkpoint, in the order of its numbers, at full width; changed in place.
        state: Their names to tensors.

    Raises:
        ValueError: If an entry is missing, is not of this network, has another shape, or a mask is not of zeros and
            ones. The network is as before.

    Example:
        >>> small = {"width": 4, "hidden": 8}
        >>> network, other = (PaperNetwork({"depth": 1}, **small) for _ in range(2))
        >>> read_authors_state(other, authors_state(network))
        >>> torch.equal(network.trunk[0].weight, other.trunk[0].weight)
        True
    """
    tasks = tuple(network.heads)
    plain, masks = _split_masks(state)
    expected = {authors_name(name, tasks): (name, value) for name, value in _unpruned(network).items()}
    if missing := [name for name in expected if name not in plain]:
        raise ValueError(f"state: needs {missing[0]!r}, found no such entry ({len(missing)} are missing){_hint(tasks)}")
    if foreign := [name for name in plain if name not in expected]:
        raise ValueError(f"state: must be of this network alone, found {foreign[0]!r} too{_hint(tasks)}")
    for name, (_, ours) in expected.items():
        if plain[name].shape != ours.shape:
            raise ValueError(
                f"state: needs shape {tuple(ours.shape)} for {name!r}, found {tuple(plain[name].shape)}{_hint(tasks)}"
            )
    for name, mask in masks.items():
        if mask.shape != plain[name].shape or not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"state: needs zeros and ones in the shape of its weight for the mask of {name!r}")
    fold(network)
    network.load_state_dict({ours: plain[name] for name, (ours, _) in expected.items()})
    attach_masks(network, {expected[name][0]: mask.bool() for name, mask in masks.items()})


def load_authors_checkpoint(network: PaperNetwork, path: str | Path) -> None:
    """Read a file of theirs: a state dict, or a dict that holds one as ``state_dict``.

    Args:
        network: As for :func:`read_authors_state`.
        path: The file; it is read without running any code in it.

    Raises:
        ValueError: If it holds something else, or as :func:`read_authors_state`.
    """
    found = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"path: needs a state dict of tensors in {path}, found {type(found).__name__}")
    read_authors_state(network, found)


class AuthorsInput(nn.Module):
    """A network of theirs behind our pictures: it was trained on blue, green and red of 255 levels less their means.

    Args:
        network: What takes such pictures.
        mean: Of red, green and blue, that our pictures were scaled by.
        spread: Likewise.
    """

    def __init__(self, network: nn.Module, mean: Sequence[float], spread: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("spread", torch.tensor(spread).view(3, 1, 1))
        self.register_buffer("their_mean", torch.tensor(_MEAN).view(3, 1, 1))

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Map ``(batch, 3, height, width)`` to every task's output."""
        colours = (pictures * self.spread + self.mean).flip(1) * 255
        outputs: dict[str, Tensor] = self.network(colours - self.their_mean)
        return outputs


def authors_state(network: PaperNetwork) -> dict[str, Tensor]:
    """Return the state dict under the authors' names, with ``weight_orig`` and ``weight_mask`` where pruned.

    Args:
        network: Pruned or not.

    Returns:
        What their code loads; masks are int32.
    """
    tasks = tuple(network.heads)
    state = {}
    for name, value in network.state_dict().items():
        stem, _, last = name.rpartition(".")
        kept = last.removeprefix("weight") if last in ("weight_orig", "weight_mask") else ""
        theirs = authors_name(f"{stem}.weight" if kept else name, tasks) + kept
        state[theirs] = value.int() if kept == "_mask" else value
    return state


def authors_name(name: str, tasks: tuple[str, ...]) -> str:
    """Translate one of our names.

    Example:
        >>> authors_name("trunk.7.shortcut.0.weight", ("segmentation", "normals"))
        'backbone.ds.1.0.weight'
        >>> authors_name("heads.normals.branches.3.6.bias", ("segmentation", "normals"))
        'task2_fc1_c3.conv3.bias'
    """
    if (head := re.fullmatch(r"heads\.(.+)\.branches\.(\d+)\.(\d+)\.(\w+)", name)) is not None:
        task, branch, layer, last = head.groups()
        return f"task{tasks.index(task) + 1}_fc1_c{branch}.{_HEAD_LAYERS[layer]}.{last}"
    _, index, rest = name.split(".", 2)
    if int(index) < _FIRST:
        return f"backbone.{('conv1', 'bn1')[int(index)]}.{rest}"
    stage, block = _PLACES[int(index) - _FIRST]
    if rest.startswith("shortcut."):
        return f"backbone.ds.{stage}.{rest.removeprefix('shortcut.')}"
    return f"backbone.blocks.{stage}.{block}.{rest.replace('norm', 'bn')}"


def _split_masks(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Part the weights from their masks, both by the name of the weight."""
    plain, masks = {}, {}
    for name, value in state.items():
        if name.endswith(".weight_mask"):
            masks[name.removesuffix("_mask")] = value
        else:
            plain[name.removesuffix("_orig")] = value
    if lonely := [name for name in masks if f"{name}_orig" not in state]:
        raise ValueError(f"state: needs '{lonely[0]}_orig' beside its mask, found no such entry")
    return plain, masks


def _unpruned(network: nn.Module) -> dict[str, Tensor]:
    """List all entries by the names that they have without masks."""
    entries = network.state_dict().items()
    return {name.removesuffix("_orig"): value for name, value in entries if not name.endswith("weight_mask")}


def _hint(tasks: tuple[str, ...]) -> str:
    return f"; give the tasks of the checkpoint in its order, now {', '.join(tasks)}"
