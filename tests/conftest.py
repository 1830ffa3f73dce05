"""Shared settings: one thread (faster at these sizes), seeded, and every available device.

With ``TEST_DEVICE=simulated`` only the tests that ask for a device run, and on the simulated accelerator. It registers
itself for the whole process, so ``tests/accelerator`` gives it one of its own.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import distributed as dist

# Tiny networks at high sparsity lose whole tensors all the time; the tests of these warnings say so themselves. The
# oldest matplotlib calls the newest pyparsing by its old names.
IGNORED = (
    "ignore:.*TorchScript.*:DeprecationWarning",
    "ignore:.* deprecated( -|,) use '.*:DeprecationWarning",
    "ignore::disparse_plugin.errors.EmptyTensorWarning",
    "ignore::disparse_plugin.errors.TiesWarning",
)

SIMULATED = os.environ.get("TEST_DEVICE") == "simulated"
if SIMULATED:
    import simulated_accelerator

settings.register_profile(
    "default", deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("default")


def pytest_collection_modifyitems(config, items):
    """Let no warning pass unseen here, without forcing that on tests elsewhere; a test's own filters come after."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("error", *IGNORED), append=False)
    chosen = {"device", "accelerator"} if SIMULATED else {"waits"}
    wanted = [item for item in items if not chosen.isdisjoint(item.fixturenames)]
    others = [item for item in items if item not in wanted]
    kept, left = (wanted, others) if SIMULATED else (others, wanted)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


@pytest.fixture(autouse=True)
def _quiet_and_seeded():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.cuda,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, found none"),
    ],
)


@pytest.fixture(params=["simulated"] if SIMULATED else ["cpu", CUDA])
def device(request):
    return torch.device(request.param)


@pytest.fixture(params=["simulated"] if SIMULATED else [CUDA])
def accelerator(request):
    return torch.device(request.param)


@pytest.fixture
def waits():
    """Where the host had to wait for the simulated accelerator since the test began: a Counter. Runs only there."""
    simulated_accelerator.waits.clear()
    return simulated_accelerator.waits
