"""Tensors and facts in one safetensors file, written atomically and checked when read; masks as bits.

**Layout.** The metadata of the safetensors header hold ``kind``, ``version``, ``facts`` (JSON) and, since version 0.2.0
of this package, ``checksum``: SHA-256 over kind, version, facts, and every tensor's name, type, shape and bytes. A file
without a checksum is older; it is read with all other checks.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

VERSION = 1

# What content that is not as expected makes Python raise; anything else is a fault of ours and passes.
_MISREAD = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class FileFormatError(ValueError):
    """A file is not what it should be: foreign, damaged, cut short, or written by a newer version.

    Nothing is changed when it is raised. It is a ``ValueError``.

    Attributes:
        path: The file.
        rule: What it must be.
        found: What is wrong with it.

    Example:
        >>> from disparse_plugin import FileFormatError
        >>> print(FileFormatError("run.pt", "a complete file", "its end missing", "copy it again"))
        path: must be a complete file, found its end missing in run.pt; copy it again
    """

    def __init__(self, path: str | Path, rule: str, found: str, advice: str = "") -> None:
        """Say what is wrong with which file, and what to do about it."""
        super().__init__(path, rule, found, advice)
        self.path, self.rule, self.found, self.advice = Path(path), rule, found, advice

    def __str__(self) -> str:
        """Return the message."""
        message = f"path: must be {self.rule}, found {self.found} in {self.path}"
        return f"{message}; {self.advice}" if self.advice else message


@contextlib.contextmanager
def understood(path: str | Path, kind: str) -> Iterator[None]:
    """Take the content of a file apart inside; what does not hold there is a :class:`FileFormatError`.

    Args:
        path: The file.
        kind: What it should be, for the message.

    Raises:
        FileFormatError: If the block raises what unexpected content makes Python raise.
    """
    try:
        yield
    except FileFormatError:
        raise
    except _MISREAD as error:
        raise FileFormatError(path, f"an undamaged file of {kind}", str(error) or type(error).__name__) from error


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], *, kind: str, facts: Mapping[str, Any]) -> None:
    """Write a file that is either complete or not there: temporary file, fsync, replace.

    Args:
        path: The file; see :func:`replacing`.
        tensors: What to store; copied to the CPU.
        kind: What the file is, checked by :func:`read_tensors`.
        facts: JSON values stored beside the tensors.

    Raises:
        TypeError: If ``facts`` hold what JSON cannot.
        OSError: If it cannot be written; the error names the path.
    """
    try:
        text = json.dumps(dict(facts))
    except (TypeError, ValueError) as error:
        raise TypeError(f"facts: must be what JSON can hold, found what it cannot ({error}); use text") from error
    stored = _apart({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
    metadata = {"kind": kind, "version": str(VERSION), "facts": text}
    metadata["checksum"] = _checksum(metadata, stored)
    with replacing(path) as temporary:
        save_file(stored, temporary, metadata)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file such that, whenever the process is killed, the path holds the old file or the complete new one.

    A symbolic link stays one: the file it points to is replaced. An existing file's mode is kept.

    Args:
        path: The file; an existing one is replaced when the block ends without an error.

    Yields:
        A temporary path beside it, to write to. Whatever happens, none is left behind.

    Raises:
        ValueError: If there is something else than a file of that name.
        OSError: If it cannot be written, e.g. because the disk is full; the error names ``path``.
    """
    _check_path(path)
    target = Path(os.path.realpath(path))
    if target.exists() and not (target.is_file() or target.is_dir()):  # /dev/null would become a file
        raise ValueError(f"path: must be the name of a file, found that {str(path)!r} is a device or a pipe")
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    with _naming(path), contextlib.ExitStack() as stack:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        stack.callback(temporary.unlink, missing_ok=True)
        mode = stat.S_IMODE((target if target.exists() else temporary).stat().st_mode)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)  # safetensors makes a file of its own
        temporary.replace(target)


def read_tensors(path: str | Path, *, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file written by :func:`write_tensors`.

    Returns:
        The tensors, on the CPU, and the facts.

    Raises:
        FileNotFoundError: If there is no such file.
        FileFormatError: If it is no safetensors file (foreign or cut short), is of another kind or a newer version, or
            does not have the content that its checksum is of.
    """
    check_exists(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != kind:
                raise FileFormatError(path, f"a file of kind {kind!r}", repr(metadata.get("kind")))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise FileFormatError(path, "a complete safetensors file", f"({error})") from error
    with understood(path, kind):
        if int(metadata["version"]) > VERSION:
            raise FileFormatError(
                path, f"of format version {VERSION} or older", metadata["version"], "update disparse-plugin"
            )
        if "checksum" in metadata and metadata["checksum"] != _checksum(metadata, tensors):
            raise FileFormatError(path, "as it was written", "another checksum", "it is damaged: copy it again")
        facts = json.loads(metadata["facts"])
        if not isinstance(facts, dict):
            raise TypeError(f"facts that are no mapping but {type(facts).__name__}")
        return tensors, facts


def check_exists(path: str | Path) -> None:
    """Check that there is a file.

    Raises:
        TypeError: If ``path`` is no path.
        FileNotFoundError: If there is none.
    """
    _check_path(path)
    if not Path(path).is_file():
        what = "a directory" if Path(path).is_dir() else "none"
        raise FileNotFoundError(f"path: must be an existing file, found {what} at {path}")


def _check_path(path: object) -> None:
    if isinstance(path, bytes) or not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: must be a str or a Path, found {type(path).__name__}")
    if os.fspath(path) in ("", os.curdir):
        raise ValueError(f"path: must be the name of a file, found {os.fspath(path)!r}")


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
        ValueError: If there are more or fewer bits than the shape needs, or one of those that fill up the last byte is
            set.

    Example:
        >>> unpacked_bits(torch.tensor([176], dtype=torch.uint8), (2, 2)).tolist()
        [[True, False], [True, True]]
    """
    count = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.shape != (-(-count // 8),):
        found = f"{bits.numel()} of {bits.dtype}"
        raise ValueError(f"bits: a mask of shape {tuple(shape)} must take {-(-count // 8)} bytes, found {found}")
    values = torch.from_numpy(np.unpackbits(bits.cpu().numpy()).astype(bool))
    if bool(values[count:].any()):
        raise ValueError(f"bits: what fills up the last byte must be 0, found 1 after the {count} bits of the mask")
    return values[:count].reshape(tuple(shape))


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256("\0".join(metadata[field] for field in ("kind", "version", "facts")).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors that share memory, which safetensors refuses, memory of their own."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return result


@contextlib.contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Let errors of writing name the file that the caller asked for, and not a temporary one beside it."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        code = _error_number(error)
        if code is None:
            raise
        what = "that it is a directory" if code == errno.EISDIR else os.strerror(code)
        raise OSError(code, f"path: must be writable, found {what}", str(path)) from error


def _error_number(error: BaseException | None) -> int | None:
    """Return the system's number for what went wrong: safetensors hides it in its text, torch.save in the context."""
    while error is not None:
        if isinstance(error, OSError):
            return error.errno
        if isinstance(error, SafetensorError) and (found := re.search(r"os error (\d+)", str(error))):
            return int(found[1])
        error = error.__context__
    return None
