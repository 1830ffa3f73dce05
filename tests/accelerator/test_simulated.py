"""The tests that ask for a device, on the simulated accelerator: a tensor in the wrong place fails without a GPU."""

import pytest
from torch.utils import backend_registration

from places import ROOT, python

# Rooms whose tests ask for a device.
ROOMS = ("accelerator", "agreement", "analysis", "scoring", "sparse_training")

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="needs a torch that takes accelerators written in Python, found an older one",
)


def test_everything_that_asks_for_a_device_runs_on_a_simulated_one():
    rooms = [ROOT / "tests" / room for room in ROOMS]
    result = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", *rooms, TEST_DEVICE="simulated")
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
