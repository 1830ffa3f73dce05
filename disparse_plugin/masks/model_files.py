"""A pruned model in one file: weights, masks and the shapes that removed channels left, for the architecture as built.

**Layout.** A safetensors file of kind ``disparse_plugin.model`` with a checksum. Tensors have their names in the state
dict, masks of 0 and 1 as one bit per weight. The facts hold the order of the state dict, the masks' shapes, and the
plain numbers of the modules (:mod:`disparse_plugin.masks.shapes`). One more entry, empty, tells in its name how the
file is loaded: who tries ``model.load_state_dict(torch.load(path))`` reads it in the error.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._support.files import packed_bits, read_tensors, understood, unpacked_bits, write_tensors
from ..parameters import check_not_synced, is_masked, without_wrappers
from .attach import inside, masks_of
from .shapes import Numbers, plain_numbers, shrink, unchanged_on_error
from .state_dicts import follow_masks

_KIND = "disparse_plugin.model"
_NOTICE = "(written by save_pruned: load this file with disparse_plugin.load_pruned(model, path))"


def save_pruned(model: nn.Module, path: str | Path, *, facts: Mapping[str, Any] | None = None) -> None:
    """Write a pruned model to one safetensors file: its weights, its masks, and what the removal of channels left.

    The class is not in the file: :func:`load_pruned` takes the architecture as you build it, dense and at full size.
    It does not matter who pruned the model, or how: masks of any method of ``torch.nn.utils.prune``, channels removed
    by :func:`~disparse_plugin.structured.remove_channels` or by torch-pruning itself, or both. Wrappers
    (``DistributedDataParallel``, ``torch.compile``, ``AveragedModel``) are looked through, so an averaged copy is saved
    like the model. Under ``torch.distributed`` call it on one rank.

    Args:
        model: The model; not changed.
        path: The file; an existing one is replaced atomically.
        facts: Anything JSON takes, worth remembering: method, criterion, amount, accuracy.

    Raises:
        TypeError: If ``facts`` hold what JSON cannot.
        ValueError: If the state dict holds something else than dense tensors (extra state, sharded or lazy ones).
        OSError: If the file cannot be written; the error names it.

    Example:
        >>> import tempfile, torch
        >>> from torch.nn.utils import prune
        >>> net = nn.Sequential(nn.Linear(4, 2))
        >>> hook = prune.random_unstructured(net[0], "weight", 0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pruned(net, f"{folder}/net.safetensors", facts={"amount": 0.5})
        ...     fresh = nn.Sequential(nn.Linear(4, 2))
        ...     facts = load_pruned(fresh, f"{folder}/net.safetensors")
        >>> x = torch.ones(1, 4)
        >>> facts, torch.equal(fresh(x), net(x))
        ({'amount': 0.5}, True)
    """
    root = inside(model)
    state = {without_wrappers(name): tensor for name, tensor in root.state_dict().items()}
    for name, tensor in state.items():
        _check_dense(name, tensor)
    shapes = {}
    tensors = dict(state)
    for name in _masked(root):
        mask = state[f"{name}_mask"]
        shapes[name] = list(mask.shape)
        if bool(((mask == 0) | (mask == 1)).all()):
            tensors[f"{name}_mask"] = packed_bits(mask != 0)
    layout = {
        "order": list(state),
        "masks": shapes,
        "numbers": plain_numbers(root),
        "facts": dict(facts or {}),
    }
    write_tensors(path, {**tensors, _NOTICE: torch.empty(0, dtype=torch.uint8, device="cpu")}, kind=_KIND, facts=layout)


def load_pruned(model: nn.Module, path: str | Path) -> dict[str, Any]:
    """Turn a freshly built model into the one that :func:`save_pruned` wrote.

    Tensors that are smaller in the file are made smaller in the model; masks are attached; then the state dict is
    loaded strictly. Make optimizers afterwards: parameters that became smaller are new ones, with the memory format and
    the attributes of those that you built.

    Where any tensor is smaller, numbers that modules hold as attributes (``out_channels``, ``num_heads``, split sizes)
    are set to those in the file: whole numbers of each module that holds such a tensor, itself or further inside, and
    of each module without parameters, which may hold a width (``nn.Unflatten``) and may also hold a setting (the
    ``kernel_size`` of a pooling: build it as it was saved); fractions (the scale of an attention) of each module that
    holds such a tensor itself or in a direct child. All other numbers stay as you built them.

    Args:
        model: The architecture at full size, without masks; changed in place. Wrappers are looked through;
            ``DistributedDataParallel`` only where no tensor becomes smaller.
        path: The file.

    Returns:
        The facts stored in the file.

    Raises:
        FileNotFoundError: If there is no such file.
        FileFormatError: If it is another file, damaged, or written by a newer version.
        ValueError: If the model carries masks, has other parameters or buffers than the file, or smaller ones, or is in
            ``DistributedDataParallel``, which would not sync parameters that became smaller. In all cases the model is
            unchanged.

    Example:
        >>> import tempfile, torch
        >>> build = lambda width: nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 1))
        >>> narrow, fresh = build(3), build(8)  # as if five channels had been removed
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pruned(narrow, f"{folder}/net.safetensors")
        ...     load_pruned(fresh, f"{folder}/net.safetensors")
        {}
        >>> fresh[0].out_features, torch.equal(fresh[2].weight, narrow[2].weight)
        (3, True)
    """
    tensors, layout = read_tensors(path, kind=_KIND)
    with understood(path, "a pruned model"):
        saved = _Saved.of(tensors, layout)
    root = inside(model)
    _check_fits(root, saved, path)
    shapes = {name: tuple(tensor.shape) for name, tensor in saved.dense().items()}
    if shapes != {without_wrappers(name): tuple(tensor.shape) for name, tensor in root.state_dict().items()}:
        check_not_synced(model)
    paths = {without_wrappers(actual): actual for actual, _ in root.named_modules(remove_duplicate=False)}
    state = {}
    for name, tensor in saved.state.items():
        place, _, last = name.rpartition(".")
        state[f"{paths[place]}.{last}" if paths[place] else last] = tensor
    with unchanged_on_error(root):
        shrink(root, shapes, saved.numbers)
        handles = follow_masks(root)
        try:
            root.load_state_dict(state)
        finally:
            for handle in handles:
                handle.remove()
    return saved.facts


class _Saved(NamedTuple):
    """The content of a file: the state dict in order, which of its parameters are masked, and the rest."""

    state: dict[str, Tensor]
    masked: frozenset[str]
    numbers: Numbers
    facts: dict[str, Any]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], layout: Mapping[str, Any]) -> _Saved:
        """Take it apart, whatever is not as written."""
        order, shapes = layout["order"], layout["masks"]
        state = {name: tensors[name] for name in order}
        if len(state) < len(order) or set(tensors) - {_NOTICE} != set(state):
            raise ValueError("tensors that are not listed, or twice")
        for name, shape in shapes.items():
            if state[f"{name}_orig"].shape != tuple(shape):
                raise ValueError(f"a mask of {name} of another shape")
            mask = state[f"{name}_mask"]
            state[f"{name}_mask"] = mask if mask.is_floating_point() else unpacked_bits(mask, shape)
        return cls(state, frozenset(shapes), layout["numbers"], dict(layout["facts"]))

    def dense(self) -> dict[str, Tensor]:
        """Return the state as that of a model without masks."""
        masks = {f"{name}_mask" for name in self.masked}
        return {_dense_name(name, self.masked): value for name, value in self.state.items() if name not in masks}


def _dense_name(name: str, masked: frozenset[str]) -> str:
    plain = name.removesuffix("_orig")
    return plain if plain in masked else name


def _masked(root: nn.Module) -> list[str]:
    """Return the masked parameters by all of their names in the state dict: a module may have several."""
    return [
        without_wrappers(f"{path}.{name}" if path else name)
        for path, module in root.named_modules(remove_duplicate=False)
        for name in [key.removesuffix("_mask") for key in module._buffers if key.endswith("_mask")]
        if is_masked(module, name)
    ]


def _check_dense(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(
            f"model: its state dict must hold tensors only, found {type(tensor).__name__} as {name}; save such extra "
            "state in a file of its own"
        )
    if is_lazy(tensor):
        raise ValueError(f"model: {name} must have a shape, found a lazy parameter; run one batch through the model")
    if hasattr(tensor, "device_mesh") or tensor.layout is not torch.strided:
        raise ValueError(
            f"model: {name} must be a dense tensor, found {type(tensor).__name__} of layout {tensor.layout}; sharded "
            "models are gathered by torch.distributed.checkpoint.state_dict.get_model_state_dict"
        )


def _check_fits(root: nn.Module, saved: _Saved, path: str | Path) -> None:
    if masks := masks_of(root):
        raise ValueError(
            f"model: must be as built, without masks, found {len(masks)} (first: {min(masks)}); build it again, or "
            "fold(model) before"
        )
    fresh = {without_wrappers(name): tensor for name, tensor in root.state_dict().items()}
    dense = saved.dense()
    for what, names in (("lacks", set(dense) - set(fresh)), ("has besides", set(fresh) - set(dense))):
        if names:
            raise ValueError(
                f"model: must have the parameters and buffers of {path}, found {len(names)} that it {what} (first: "
                f"{min(names)}); build the architecture that was saved"
            )
    for name, tensor in fresh.items():
        if tensor.is_meta:
            raise ValueError(f"model: {name} must hold values, found the meta device; model.to_empty(device=...) first")
    for name, tensor in dense.items():
        size, largest = tuple(tensor.shape), tuple(fresh[name].shape)
        if len(size) != len(largest) or any(a > b for a, b in zip(size, largest, strict=True)):
            raise ValueError(
                f"model: {name} must be at least as large as in {path}, {size}, found {largest}; build the "
                "architecture at full size"
            )
