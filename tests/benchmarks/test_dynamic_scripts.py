"""The benchmark of sparse training runs from the command line."""

import pytest

from places import ROOT, python


@pytest.mark.slow
def test_the_benchmark_of_dynamic_training_runs_quickly():
    if not (ROOT / "benchmarks" / "models" / "paper_network.py").exists():
        pytest.skip("the sdist has no benchmarks")
    process = python(ROOT / "benchmarks" / "dynamic.py", "--quick", timeout=600)
    assert process.returncode == 0, process.stderr
    assert "one update per 50 steps adds" in process.stdout
