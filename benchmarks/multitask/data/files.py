"""Finding the files of a data set, or saying what is missing, where it should lie, and how to get it."""

from __future__ import annotations

from pathlib import Path

FETCH = "python benchmarks/fetch_data.py --root"


def require(path: Path, layout: str) -> Path:
    """Return ``path`` if it is there.

    Args:
        path: A file or a folder.
        layout: What should lie where, and how to get it; part of the error.

    Raises:
        FileNotFoundError: It is not there.
    """
    if not path.exists():
        raise FileNotFoundError(f"root: needs {path}, found no such file or folder; {layout}")
    return path
