"""Stable order, whatever the type and however the values are spread."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disparse_plugin import sorting

KINDS = {
    "uniform": lambda generator, size: torch.rand(size, generator=generator, dtype=torch.float64),
    "few values": lambda generator, size: torch.randint(7, (size,), generator=generator).double() / 7,
    "signed": lambda generator, size: torch.randn(size, generator=generator, dtype=torch.float64),
    "heavy tail": lambda generator, size: torch.randn(size, generator=generator, dtype=torch.float64).exp() ** 9,
    "close": lambda generator, size: 0.5 + torch.rand(size, generator=generator, dtype=torch.float64) * 1e-12,
    "near and far": lambda generator, size: torch.cat(
        [torch.rand(size - 1, generator=generator, dtype=torch.float64) * 1e-9, torch.ones(1, dtype=torch.float64)]
    ),
    "fractions": lambda generator, size: (
        torch.randint(1, size, (size,), generator=generator).double()
        / (size - torch.randint(3, (size,), generator=generator))
    ),
    "zeros of both signs": lambda generator, size: torch.randint(-1, 2, (size,), generator=generator).double() * 0.0,
    "with infinity": lambda generator, size: torch.where(
        torch.rand(size, generator=generator) < 0.1, torch.inf, torch.rand(size, generator=generator)
    ).double(),
}


@pytest.fixture(autouse=True)
def _small_counts_as_large(monkeypatch):
    monkeypatch.setattr(sorting, "_FEW", 16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_the_order_is_that_of_a_stable_sort(kind, dtype):
    for seed, size in enumerate([17, 300, 5000]):
        values = KINDS[kind](torch.Generator().manual_seed(seed), size).to(dtype)
        expected = np.argsort(values.numpy() + 0.0, kind="stable")
        assert np.array_equal(sorting.stable_order(values).numpy(), expected)


@given(st.lists(st.floats(allow_nan=False), min_size=17, max_size=60))
def test_any_numbers(values):
    expected = np.argsort(np.asarray(values) + 0.0, kind="stable")
    assert np.array_equal(sorting.stable_order(torch.tensor(values, dtype=torch.float64)).numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sorted_values_come_with_their_places(dtype):
    values = torch.randint(9, (500,)).to(dtype) / 9
    ordered, places = sorting.stable_sort(values)
    assert torch.equal(ordered, values[places])
    assert np.array_equal(places.numpy(), np.argsort(values.numpy(), kind="stable"))
