"""Tensors and facts in one safetensors file, written atomically and checked when read; masks as bits."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

VERSION = 1


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], *, kind: str, facts: Mapping[str, Any]) -> None:
    """Write a file that is either complete or not there: temporary file, fsync, replace.

    Args:
        path: The file; an existing one is replaced.
        tensors: What to store; copied to the CPU.
        kind: What the file is, checked by :func:`read_tensors`.
        facts: JSON values stored beside the tensors.
    """
    metadata = {"kind": kind, "version": str(VERSION), "facts": json.dumps(dict(facts))}
    with replacing(path) as temporary:
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, temporary, metadata)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file such that, whenever the process is killed, the path holds the old file or the complete new one.

    Args:
        path: The file; an existing one is replaced when the block ends without an error.

    Yields:
        A temporary path beside it, to write to.
    """
    target = Path(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(path: str | Path, *, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file written by :func:`write_tensors`.

    Returns:
        The tensors, on the CPU, and the facts.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no safetensors file (foreign or truncated), is of another kind, or of a newer version.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: must be an existing file, found none at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != kind:
                raise ValueError(f"path: must be a file of kind {kind!r}, found {metadata.get('kind')!r} in {path}")
            if int(metadata["version"]) > VERSION:
                raise ValueError(
                    f"path: must be of format version {VERSION} or older, found {metadata['version']} in {path}; "
                    "update disparse-plugin"
                )
            return {key: file.get_tensor(key) for key in file.keys()}, json.loads(metadata["facts"])  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"path: must be a complete safetensors file, found {path} unreadable ({error})") from error


def packed_bits(mask: Tensor) -> Tensor:
    """Put a mask into one bit per entry, as ``numpy.packbits`` does: uint8, 1-D, on the CPU.

    Args:
        mask: bool, any shape, on any device.

    Example:
        >>> packed_bits(torch.tensor([[True, False], [True, True]])).tolist()
        [176]
    """
    return torch.from_numpy(np.packbits(mask.cpu().contiguous().numpy().reshape(-1)))


def unpacked_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Turn what :func:`packed_bits` returned into a bool mask again, on the CPU.

    Args:
        bits: uint8, 1-D.
        shape: The mask's shape.

    Raises:
        ValueError: If there are more or fewer bits than the shape needs.

    Example:
        >>> unpacked_bits(torch.tensor([176], dtype=torch.uint8), (2, 2)).tolist()
        [[True, False], [True, True]]
    """
    count = math.prod(shape)
    if bits.numel() != -(-count // 8):
        raise ValueError(f"bits: a mask of shape {tuple(shape)} must take {-(-count // 8)} bytes, found {bits.numel()}")
    return torch.from_numpy(np.unpackbits(bits.cpu().numpy(), count=count).astype(bool)).reshape(tuple(shape))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
