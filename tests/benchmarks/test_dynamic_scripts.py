"""The example and the benchmark of sparse training run from the command line."""

import os
import subprocess
import sys

import pytest

from places import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "needs", "expected"),
    [
        ("examples/sparse_training.py", "examples/quickstart.py", "DiSparse dynamic"),
        ("benchmarks/dynamic.py", "benchmarks/models/paper_network.py", "one update per 50 steps adds"),
    ],
)
def test_a_script_runs_quickly(script, needs, expected, tmp_path):
    if not (ROOT / needs).exists():
        pytest.skip(f"{script} needs {needs}, found none")
    process = subprocess.run(
        [sys.executable, str(ROOT / script), "--quick"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert expected in process.stdout
