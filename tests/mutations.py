"""Plant one small fault at a time in a copy of the package, and see whether the room's tests notice.

    python tests/mutations.py                 # all, an hour on one core
    python tests/mutations.py ranking band    # those in files whose path holds one of these words

The faults are in ``mutations.txt``. One that survives stands for a behaviour that no test states: write the test, or
give the fault a line ``= reason`` that says why nobody can tell.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import hypothesis  # noqa: F401  # imported before the forks, as all that takes long
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 300  # seconds of a run that a fault may have made endless


@dataclasses.dataclass
class Fault:
    """``old`` becomes ``new`` in a file of the package; ``tests`` should notice, unless there is a ``reason``."""

    file: str
    tests: list[str]
    old: str
    new: str
    reason: str

    @classmethod
    def read(cls, block: str) -> Fault:
        head, *rest = block.splitlines()
        old, new, reason = ("\n".join(line[2:] for line in rest if line[0] == sign) for sign in "-+=")
        file, _, tests = head.partition(": ")
        return cls(file, tests.split(), old, new, reason)


def planted() -> list[Fault]:
    """Read the faults."""
    blocks = (ROOT / "tests" / "mutations.txt").read_text().strip().split("\n\n")
    return [Fault.read(block) for block in blocks if not block.startswith("#")]


def main() -> int:
    """Plant the faults that are asked for; return how many survive without a reason."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only faults in files whose path holds one of these")
    words = parser.parse_args().words
    chosen = [fault for fault in planted() if not words or any(word in fault.file for word in words)]
    with tempfile.TemporaryDirectory() as folder:
        for name in ("disparse_plugin", "tests", "benchmarks"):
            shutil.copytree(ROOT / name, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__", "runs"))
        for name in ("conftest.py", "pyproject.toml"):
            shutil.copy(ROOT / name, folder)
        outcomes = [_outcome(Path(folder), fault) for fault in chosen]
    print(", ".join(f"{outcomes.count(kind)} {kind}" for kind in dict.fromkeys(outcomes)))
    return outcomes.count("survived")


def _outcome(copy: Path, fault: Fault) -> str:
    start, file = time.monotonic(), copy / "disparse_plugin" / fault.file
    text = file.read_text()
    outcome = "out of date"
    if text.count(fault.old) == 1:
        file.write_text(text.replace(fault.old, fault.new))
        outcome = "killed" if _fails(copy, fault.tests) else "equivalent" if fault.reason else "survived"
        file.write_text(text)
    shown = " ".join(fault.new.split()) or f"without {' '.join(fault.old.split())}"
    print(f"{outcome:11} {time.monotonic() - start:5.1f} s  {fault.file}: {shown}", flush=True)
    return outcome


def _fails(copy: Path, tests: list[str]) -> bool:
    """Run tests in a fork, where nothing of the package has been imported yet; not to end is to fail."""
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT)
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        sys.dont_write_bytecode = True
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--no-header", *tests])
        os._exit(int(code))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (1, -signal.SIGALRM)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
