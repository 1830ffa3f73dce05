"""Write a training run to one file such that it can go on, bit for bit, in another process."""

from __future__ import annotations

import collections
import copy
import hashlib
import io
import os
import pickle
import random
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch

from .._support.files import FileFormatError, check_exists, replacing, understood
from .._support.shards import is_sharded
from ..errors import wrong
from .mask_scheduler import MaskScheduler

_VERSION = 1
_SEAL = b"sha256:"  # and 64 digits; no power of two in all, so that no single flipped bit hides it
_SEAL_SIZE = len(_SEAL) + 64


class Stateful(Protocol):
    """Anything with a state: a model, an optimizer, a scheduler, a ``GradScaler``."""

    def state_dict(self) -> Any:
        """Return the state."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Go on from a state."""


def save_checkpoint(path: str | Path, **parts: Stateful) -> None:
    """Write the states of all parts of a run, and of the random generators, to one file.

    The file is replaced at once: a process killed meanwhile leaves the previous one whole. Under ``torch.distributed``
    call it on one rank, with a file of its own for each rank if their random states matter.

    Args:
        path: The file.
        **parts: What the run consists of: ``model=model, optimizer=optimizer, scheduler=scheduler, ...``.

    Raises:
        TypeError: If a part has no state, or a state holds something that is neither a tensor nor a plain value, which
            :func:`load_checkpoint` could not read. Numbers of numpy are written as Python's.
        ValueError: If there are no parts, or their tensors are sharded.

    Example:
        >>> import tempfile
        >>> layer = torch.nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint(f"{folder}/run.pt", model=layer)
        ...     value = float(torch.rand(()))
        ...     load_checkpoint(f"{folder}/run.pt", model=layer)
        >>> float(torch.rand(())) == value
        True
    """
    if not parts:
        raise ValueError("parts: at least one is needed, found none; pass model=model, optimizer=optimizer, ...")
    _check_parts(parts)
    states = {name: _without_numpy(part.state_dict()) for name, part in parts.items()}
    sharded = [name for name, state in states.items() if _holds_shards(state)]
    if sharded:
        raise ValueError(
            f"parts: must hold whole tensors, found sharded ones in {', '.join(sharded)}; write them with "
            "torch.distributed.checkpoint.save, of which the guide to sharded models has an example"
        )
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            torch.save({"version": _VERSION, "parts": states, "random": _random_states()}, file)
        try:
            torch.load(temporary, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError:
            _refuse_unreadable(states)
            raise
        _seal(temporary)


def _without_numpy(state: Any) -> Any:
    """Return a state with Python's numbers for those of numpy."""
    if isinstance(state, np.generic):
        return state.item()
    if type(state) in (dict, collections.OrderedDict):
        plain = copy.copy(state)  # with the versions of modules that an OrderedDict has as an attribute
        plain.clear()
        plain.update((_without_numpy(key), _without_numpy(value)) for key, value in state.items())
        return plain
    return type(state)(map(_without_numpy, state)) if type(state) in (list, tuple) else state


def _refuse_unreadable(states: Mapping[str, Any]) -> None:
    """Name the part whose state cannot be read, and what of it."""
    for name, state in states.items():
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        try:
            torch.load(buffer, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            odd = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
            raise TypeError(
                f"{name}: state_dict() must hold tensors and plain values, found {odd[1] if odd else 'others'}; leave "
                "it out or convert it, e.g. with float(), str() or dict()"
            ) from error


def _check_parts(parts: Mapping[str, object]) -> None:
    for name, part in parts.items():
        if isinstance(part, type) or not (hasattr(part, "state_dict") and hasattr(part, "load_state_dict")):
            raise TypeError(f"{name}: must have state_dict() and load_state_dict(), found {wrong(part)}")


def _holds_shards(state: object) -> bool:
    """Tell whether a state has a DTensor somewhere inside."""
    if isinstance(state, Mapping):
        return any(_holds_shards(value) for value in state.values())
    if isinstance(state, list | tuple):
        return any(_holds_shards(value) for value in state)
    return is_sharded(state)


def load_checkpoint(path: str | Path, **parts: Stateful) -> None:
    """Go on from a file of :func:`save_checkpoint`.

    Build the parts as they were built when it was written (the scheduler masks the model, so that names fit), then call
    this. Nothing but tensors and plain values is read from the file.

    Args:
        path: The file.
        **parts: The same parts under the same names.

    Raises:
        FileNotFoundError: If there is no such file.
        FileFormatError: If it is another file, is damaged, or was written by a newer version.
        ValueError: If the parts are not those in the file.
        Exception: What a part raises that cannot take its state. In all cases everything is as before, parts that were
            loaded already included; for that, their states are kept in memory twice meanwhile.

    Example:
        >>> import tempfile
        >>> build = lambda: torch.nn.Linear(2, 1)
        >>> model, fresh = build(), build()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint(f"{folder}/last.pt", model=model)
        ...     load_checkpoint(f"{folder}/last.pt", model=fresh)
        >>> torch.equal(fresh.weight, model.weight)
        True
    """
    _check_parts(parts)
    saved = _read(path)
    if set(saved["parts"]) != set(parts):
        raise ValueError(f"parts: must be {', '.join(saved['parts'])} as in the file, found {', '.join(parts)}")
    before = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    try:
        for name in _in_order(parts):
            parts[name].load_state_dict(saved["parts"][name])
    except BaseException:
        for name in _in_order(parts):
            parts[name].load_state_dict(before[name])
        raise
    _set_random_states(saved["random"])


def _in_order(parts: Mapping[str, Stateful]) -> list[str]:
    """Return the names such that what decides the names in the model's state comes first."""
    return sorted(parts, key=lambda name: not isinstance(parts[name], MaskScheduler))


def _read(path: str | Path) -> dict[str, Any]:
    """Return the content of a file, after all checks that need no part."""
    check_exists(path)
    rule = "a complete file of save_checkpoint"
    try:
        if not _is_whole(path):
            raise FileFormatError(path, rule, "another checksum", "it is damaged: copy it again")
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (FileFormatError, PermissionError):
        raise
    except Exception as error:
        raise FileFormatError(path, rule, f"it unreadable ({type(error).__name__})") from error
    with understood(path, "checkpoints"):
        if content["version"] > _VERSION:
            raise FileFormatError(path, f"of version {_VERSION} or older", content["version"], "update disparse-plugin")
        if not all(isinstance(name, str) for name in content["parts"]):
            raise TypeError("parts without names")
        _check_random_states(content["random"])
    return content


def _seal(path: Path) -> None:
    """End a zip file with a comment that holds the SHA-256 of all bytes before it; ``torch.load`` does not mind."""
    with path.open("rb+") as file:
        file.seek(-2, os.SEEK_END)  # where a zip file without a comment says so
        file.write(_SEAL_SIZE.to_bytes(2, "little"))
        file.write(_SEAL + _digest(file, file.tell()))


def _is_whole(path: str | Path) -> bool:
    """Tell whether a file has the content that its seal is of; an older file, whether its records have theirs."""
    with Path(path).open("rb") as file:
        size = file.seek(0, os.SEEK_END) - _SEAL_SIZE
        file.seek(max(size, 0))
        seal = file.read()
        if seal.startswith(_SEAL):
            return seal == _SEAL + _digest(file, size)
        with zipfile.ZipFile(file) as archive:
            return seal.endswith(b"\0\0") and archive.testzip() is None  # no comment, not even half a seal


def _digest(file: BinaryIO, size: int) -> bytes:
    """Return the SHA-256 of the first bytes of a file, in hexadecimal digits; the file is left there."""
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0 and (block := file.read(min(size, 1 << 20))):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest().encode()


def _random_states() -> dict[str, Any]:
    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "mps": [torch.mps.get_rng_state()] if torch.backends.mps.is_available() else [],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    for state in states.get("mps", ()) if torch.backends.mps.is_available() else ():  # older files do not say
        torch.mps.set_rng_state(state)
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))


def _check_random_states(states: dict[str, Any]) -> None:
    """Try random states on generators of their own, so that a bad one changes nothing.

    Raises:
        RuntimeError: What torch raises for a bad state.
        TypeError: What the generators raise for a bad state.
        ValueError: As well.
    """
    torch.Generator("cpu").set_state(states["torch"])
    kind, keys, *rest = states["numpy"]
    np.random.RandomState().set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = states["python"]
    random.Random().setstate((version, tuple(internal), gauss))
