"""Where things lie, and Python in a process of its own that finds them."""

import os
import subprocess
import sys
from pathlib import Path

HELPERS = Path(__file__).parent
CLIENTS = HELPERS.parent / "clients"
ROOT = HELPERS.parents[1]
FILES = HELPERS.parent / "files"  # written by released versions, read by every later one


def python(*arguments, timeout=600, **environment):
    """Run Python on one thread, with the package, the helpers and the clients at hand; a hang fails the test."""
    path = os.pathsep.join(map(str, (HELPERS, CLIENTS, ROOT)))
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
