"""What of a tensor lies on this rank: the layout of a ``DTensor``, and nothing special of any other tensor.

Weights sharded by ``torch.distributed.fsdp.fully_shard`` or by tensor parallelism are DTensors: each rank of a mesh
holds a block of rows and columns. Everything asked here is answered from the layout alone, without communication.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..kinds import check_kind


def is_sharded(tensor: object) -> bool:
    """Tell whether a tensor is a DTensor: spread over ranks, or replicated by torch's own engine.

    Example:
        >>> is_sharded(torch.ones(2))
        False
    """
    return isinstance(tensor, Tensor) and hasattr(tensor, "device_mesh")


def spread_alike(one: Tensor, other: Tensor) -> bool:
    """Tell whether of two tensors of one shape the same part lies on each rank; of two that are no DTensors, all.

    Example:
        >>> spread_alike(torch.ones(2), torch.zeros(2))
        True
    """
    if not (is_sharded(one) and is_sharded(other)):
        return is_sharded(one) == is_sharded(other)
    first: Any = one
    second: Any = other
    return bool(first.device_mesh == second.device_mesh and first.placements == second.placements)


def reshard(model: nn.Module) -> None:
    """Let ``fully_shard`` free the weights that it has gathered, and put the shares back in their place.

    After a forward without a backward, as in an evaluation, the outermost layers are still whole.

    Raises:
        TypeError: If it is no module.
    """
    check_kind("model", model, nn.Module, "a torch.nn.Module")
    for module in model.modules():
        if hasattr(module, "set_reshard_after_backward"):  # an FSDPModule
            module.reshard()  # type: ignore[operator]


def local(tensor: Tensor) -> Tensor:
    """Return what of a tensor lies on this rank, in the same memory; all of a tensor that is no DTensor.

    Example:
        >>> local(torch.ones(2))
        tensor([1., 1.])
    """
    if not is_sharded(tensor):
        return tensor
    found: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return found


def beside(values: Tensor, parameter: Tensor) -> Tensor:
    """Make a tensor that is spread as a parameter is, from what of it lies on this rank.

    Args:
        values: Of the shape of ``local(parameter)``, any type.
        parameter: The parameter.

    Returns:
        A DTensor of the parameter's shape if that is one; else ``values``.

    Example:
        >>> beside(torch.ones(2), torch.zeros(2))
        tensor([1., 1.])
    """
    if not is_sharded(parameter):
        return values
    from torch.distributed.tensor import DTensor

    spread: Any = parameter
    found: Tensor = DTensor.from_local(
        values.contiguous(),
        spread.device_mesh,
        spread.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return found


def owns(tensor: Tensor, rank: int) -> bool:
    """Tell whether this rank is the one of all that hold the same block which counts it.

    Args:
        tensor: Any tensor. One that is no DTensor is the same on all ranks, and the first counts it.
        rank: The number of this rank.
    """
    if not is_sharded(tensor):
        return rank == 0
    spread: Any = tensor
    if int(spread.device_mesh.mesh.min()) != 0:  # of several meshes that hold the same, the first rank's counts
        return False
    place = spread.device_mesh.get_coordinate()
    return all(at == 0 for at, placement in zip(place, spread.placements, strict=True) if placement.is_replicate())


def block(tensor: Tensor) -> tuple[int, ...]:
    """Name the part of a tensor that lies on this rank: ranks with the same name hold copies.

    Example:
        >>> block(torch.ones(2))
        ()
    """
    if not is_sharded(tensor):
        return ()
    spread: Any = tensor
    pairs = zip(spread.device_mesh.get_coordinate(), spread.placements, strict=True)
    return tuple(at for at, placement in pairs if not placement.is_replicate())


def coordinates(tensor: Tensor) -> list[Tensor]:
    """Return, for each dimension, which indices of the whole tensor lie on this rank; int64, on the CPU.

    What lies on a rank is a product of index sets: each dimension of the mesh cuts one dimension of the tensor, into
    chunks as ``torch.chunk`` makes them. ``fully_shard`` over a tensor parallel layout cuts last what stands first in
    the mesh (``_StridedShard``).

    Example:
        >>> coordinates(torch.ones(2, 3))
        [tensor([0, 1]), tensor([0, 1, 2])]
    """
    whole = [torch.arange(size, device="cpu") for size in tensor.shape]
    if not is_sharded(tensor):
        return whole
    spread: Any = tensor
    mesh = spread.device_mesh
    cuts = list(zip(mesh.get_coordinate(), mesh.shape, spread.placements, strict=True))
    plain = [cut for cut in cuts if not hasattr(cut[2], "split_factor")]
    for at, parts, placement in [*plain, *reversed([cut for cut in cuts if hasattr(cut[2], "split_factor")])]:
        if not placement.is_replicate():
            chunks = whole[placement.dim].chunk(parts)
            whole[placement.dim] = chunks[at] if at < len(chunks) else whole[placement.dim][:0]
    return whole


def places(tensor: Tensor) -> Tensor:
    """Return the row-major places, in the whole tensor, of the entries on this rank; int64, 1-D, on its device.

    Example:
        >>> places(torch.ones(2, 2))
        tensor([0, 1, 2, 3])
    """
    found = torch.zeros((), dtype=torch.int64, device="cpu")
    for size, along in zip(tensor.shape, coordinates(tensor), strict=True):
        found = found[..., None] * size + along
    return found.reshape(-1).to(local(tensor).device)


def part_here(whole: Tensor, tensor: Tensor) -> Tensor:
    """Take of a whole tensor, or of one that is spread alike, what lies on this rank of another of its shape.

    Args:
        whole: A tensor of the shape of ``tensor``; or a DTensor with its layout.
        tensor: The tensor, spread or not.

    Returns:
        Of the shape of ``local(tensor)``.

    Example:
        >>> part_here(torch.ones(2), torch.zeros(2))
        tensor([1., 1.])
    """
    if is_sharded(whole):
        return local(whole)
    if is_sharded(tensor):
        for dim, along in enumerate(coordinates(tensor)):
            whole = whole.index_select(dim, along.to(whole.device))
    return whole


def whole(tensor: Tensor) -> Tensor:
    """Put a tensor together on every rank; all ranks must call it. One that is no DTensor is returned as it is.

    Example:
        >>> whole(torch.ones(2))
        tensor([1., 1.])
    """
    if not is_sharded(tensor):
        return tensor
    found: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return found
