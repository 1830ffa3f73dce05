"""Masks in a safetensors file: one bit per weight, keyed by qualified name, with the facts that made them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._support.distributed import failing_together, this_rank
from .._support.files import packed_bits, read_tensors, understood, unpacked_bits, write_tensors
from .._support.shards import is_sharded, whole
from ..parameters import keys_by_name, qualified_names
from .attach import Masks, attach_masks, check_keeps_or_not, checked_masks, masks_of

_KIND = "disparse_plugin.masks"


def save_masks(
    model: nn.Module,
    path: str | Path,
    *,
    tasks: Mapping[str, Masks] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write the masks of a model to a safetensors file; an existing file is replaced atomically.

    Each mask takes one bit per weight (``numpy.packbits``). The file also holds a schema version, the shapes, and
    ``facts``. Of a sharded model all ranks must call it, and the first writes; it loads into a model sharded otherwise,
    or not at all.

    Args:
        model: The pruned model.
        path: The file.
        tasks: Masks of single tasks to store as well, e.g. ``{"depth": keep_tasks(model, scores, ["depth"])}``.
        facts: Anything JSON takes, worth remembering: method, criterion, arbiter, amount, task names.

    Raises:
        TypeError: If a mask of ``tasks`` is not a bool tensor.
        ValueError: If the model carries no mask or one that scales weights, or a mask of ``tasks`` does not fit it.

    Example:
        >>> import tempfile, torch
        >>> from torch.nn.utils import prune
        >>> net = nn.Sequential(nn.Linear(4, 2))
        >>> hook = prune.random_unstructured(net[0], "weight", 0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_masks(net, f"{folder}/masks.safetensors", facts={"criterion": "random"})
        ...     fresh = nn.Sequential(nn.Linear(4, 2))
        ...     facts = load_masks(fresh, f"{folder}/masks.safetensors")
        >>> facts, torch.equal(fresh[0].weight_mask, net[0].weight_mask)
        ({'criterion': 'random'}, True)
    """
    own: Mapping[str, Tensor] = masks_of(model)
    if not own:
        raise ValueError(
            "model: must carry at least one mask, found none; prune it first, or attach_masks(model, masks)"
        )
    check_keeps_or_not(model, keys_by_name(model).values())
    groups = [own]
    for masks in (tasks or {}).values():
        checked = checked_masks(model, masks)
        groups.append(dict(zip(qualified_names(model, checked), checked.values(), strict=True)))
    tensors = {
        f"{number}/{name}": packed_bits(whole(mask))
        for number, group in enumerate(groups)
        for name, mask in group.items()
    }
    layout = {
        "tasks": list(tasks or {}),
        "shapes": [{name: list(mask.shape) for name, mask in group.items()} for group in groups],
        "facts": dict(facts or {}),
    }
    if not any(is_sharded(mask) for group in groups for mask in group.values()):
        write_tensors(path, tensors, kind=_KIND, facts=layout)
        return
    with failing_together():
        if this_rank() == 0:
            write_tensors(path, tensors, kind=_KIND, facts=layout)


def load_masks(model: nn.Module, path: str | Path, *, task: str | None = None) -> dict[str, Any]:
    """Attach the masks of a file written by :func:`save_masks` to a model of the same architecture.

    Args:
        model: The model, pruned or not; changed in place, after all checks.
        path: The file.
        task: Attach the masks stored for this task instead of those of the whole model.

    Returns:
        The facts stored in the file.

    Raises:
        FileNotFoundError: If there is no such file.
        FileFormatError: If it is not a file of masks, is damaged, or was written by a newer version.
        ValueError: If there is no such task in it, a name is not in the model, a shape differs, or the model carries a
            mask that the file lacks. In all cases nothing is changed.

    Example:
        >>> import tempfile, torch
        >>> build = lambda: nn.Sequential(nn.Linear(2, 2, bias=False))
        >>> net, fresh = build(), build()
        >>> attach_masks(net, {"0.weight": torch.eye(2) == 1})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_masks(net, f"{folder}/masks.safetensors", facts={"amount": 0.5})
        ...     load_masks(fresh, f"{folder}/masks.safetensors")
        {'amount': 0.5}
        >>> fresh[0].weight_mask
        tensor([[1., 0.],
                [0., 1.]])
    """
    tensors, layout = read_tensors(path, kind=_KIND)
    with understood(path, "masks"):
        tasks, groups, facts = _masks(tensors, layout)
    if task is not None and task not in tasks:
        raise ValueError(f"task: must be one of {tasks} stored in {path}, found {task!r}")
    masks = groups[0 if task is None else 1 + tasks.index(task)]
    extra = sorted(set(masks_of(model)) - set(masks))
    if extra:
        raise ValueError(
            f"model: must carry no other masks than those of {path}, found {len(extra)} (first: {extra[0]}); "
            "fold(model) makes them permanent"
        )
    attach_masks(model, masks)
    return facts


def _masks(
    tensors: Mapping[str, Tensor], layout: Mapping[str, Any]
) -> tuple[list[str], list[dict[str, Tensor]], dict[str, Any]]:
    """Unpack the tasks' names, the masks of the model and of each task, and the facts, whatever is not as written."""
    tasks, shapes, facts = layout["tasks"], layout["shapes"], layout["facts"]
    if len(shapes) != 1 + len(tasks) or not all(isinstance(task, str) for task in tasks):
        raise ValueError(f"{len(shapes)} groups of masks for {len(tasks)} tasks")
    listed = {f"{number}/{name}" for number, group in enumerate(shapes) for name in group}
    if listed != set(tensors):
        raise ValueError(f"masks missing or not listed ({min(listed ^ set(tensors))})")
    groups = [
        {name: unpacked_bits(tensors[f"{number}/{name}"], _shape(shape)) for name, shape in group.items()}
        for number, group in enumerate(shapes)
    ]
    return list(tasks), groups, dict(facts)


def _shape(sizes: Any) -> list[int]:
    if not isinstance(sizes, list) or not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f"{sizes!r} as a shape")
    return sizes
