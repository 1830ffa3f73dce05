"""TorchJD: gradients balanced by PCGrad, pruned on the way by each task's own losses."""

import re

import pytest

from client_runs import client
from places import ROOT, python

pytestmark = pytest.mark.clients


def test_the_example_trains_with_balanced_gradients_to_the_asked_amount(tmp_path):
    client("torchjd")
    script = ROOT / "examples" / "trainer_six_lines.py"
    done = python(script, "--balance", "--quick", f"--out={tmp_path}", timeout=600)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^all prunable .* 95\.00 %$", done.stdout, re.MULTILINE)
    assert (tmp_path / "trainer_six_lines.png").stat().st_size > 10_000
