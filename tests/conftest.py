"""Shared settings: one thread (faster at these sizes), seeded, and every available device."""

import pytest
import torch
from hypothesis import HealthCheck, settings

# Tiny networks at high sparsity lose whole tensors all the time; the tests of these warnings say so themselves.
IGNORED = (
    "ignore:.*TorchScript.*:DeprecationWarning",
    "ignore::disparse_plugin.errors.EmptyTensorWarning",
    "ignore::disparse_plugin.errors.TiesWarning",
)

settings.register_profile(
    "default", deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("default")


def pytest_collection_modifyitems(items):
    """Let no warning pass unseen here, without forcing that on tests elsewhere; a test's own filters come after."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("error", *IGNORED), append=False)


@pytest.fixture(autouse=True)
def _quiet_and_seeded():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, found none"),
            ],
        ),
    ]
)
def device(request):
    return torch.device(request.param)
