"""Write a training run to one file such that it can go on, bit for bit, in another process."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from .._support.files import replacing

_VERSION = 1


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
        ValueError: If there are no parts.

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
    states = {name: part.state_dict() for name, part in parts.items()}
    with replacing(path) as temporary:
        torch.save({"version": _VERSION, "parts": states, "random": _random_states()}, temporary)


def load_checkpoint(path: str | Path, **parts: Stateful) -> None:
    """Go on from a file of :func:`save_checkpoint`.

    Build the parts as they were built when it was written (the scheduler masks the model, so that names fit), then call
    this. Nothing but tensors and plain values is read from the file.

    Args:
        path: The file.
        **parts: The same parts under the same names.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the parts are not those in the file, it is damaged, or it was written by a newer version.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: must be an existing file, found none at {path}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"path: must be a complete file of save_checkpoint, found {path} unreadable") from error
    if saved.get("version", 0) > _VERSION:
        raise ValueError(f"path: must be of version {_VERSION} or older, found {saved['version']}; update the package")
    if set(saved["parts"]) != set(parts):
        raise ValueError(f"parts: must be {', '.join(saved['parts'])} as in the file, found {', '.join(parts)}")
    for name, part in parts.items():
        part.load_state_dict(saved["parts"][name])
    _set_random_states(saved["random"])


def _random_states() -> dict[str, Any]:
    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
