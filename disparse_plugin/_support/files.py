"""Tensors and facts in one safetensors file, written atomically and checked when read."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
