"""Stable order, whatever the type and however the values are spread."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disparse_plugin import sorting
from oracles.agreement import lamp

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


@pytest.fixture(autouse=True, params=[64, 44, 24])
def _keys_of_few_bits(monkeypatch, request):
    """As where so many units are sorted that few bits are left for their values."""
    monkeypatch.setattr(sorting, "KEY_BITS", request.param)
    monkeypatch.setattr(sorting, "PIECE", 100)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_the_order_is_that_of_a_stable_sort(kind, dtype):
    for seed, size in enumerate([17, 256, 300, 4096]):
        values = KINDS[kind](torch.Generator().manual_seed(seed), size).to(dtype)
        expected = np.argsort(values.numpy() + 0.0, kind="stable")
        assert np.array_equal(sorting.stable_order(values).numpy(), expected)


@given(st.lists(st.floats(allow_nan=False), min_size=17, max_size=60))
def test_any_numbers(values):
    expected = np.argsort(np.asarray(values) + 0.0, kind="stable")
    assert np.array_equal(sorting.stable_order(torch.tensor(values, dtype=torch.float64)).numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_values_are_ordered_by_magnitude_or_told(kind, dtype):
    generator = torch.Generator().manual_seed(3)
    values = KINDS[kind](generator, 700)
    magnitudes = torch.cat([torch.zeros(100), torch.randn(300, generator=generator) * 1e-5, torch.randn(300)]).to(dtype)
    order, tied = sorting.order_and_ties(values)
    ascending = values[order]
    assert tied.tolist() == [False, *(ascending[1:] == ascending[:-1]).tolist()]
    order, left = sorting.order_and_ties(values, magnitudes)
    assert torch.equal(values[order], ascending)
    assert not bool((left & ~tied).any())
    parts = (tied & ~left).nonzero().flatten()
    assert bool((magnitudes[order[parts - 1]].abs() <= magnitudes[order[parts]].abs()).all())
    assert bool((order[left] > order[left.roll(-1)]).all())


def test_whole_numbers_are_ordered_by_all_their_digits():
    numbers = torch.tensor([2**40 + 1, 2**40, 7, 2**40])
    order, tied = sorting.order_and_ties(numbers)
    assert order.tolist() == [2, 1, 3, 0]
    assert tied.tolist() == [False, False, True, False]


@given(st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 3.0, 1e-30, 2e30]) | st.floats(-9, 9, width=32), max_size=30))
def test_shares_are_those_of_the_definition_across_pieces(values):
    expected = lamp(np.asarray(values, dtype=np.float32) / max(1, *map(abs, values), 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sorting, "PIECE", 3)
        for dtype in (torch.float32, torch.float64):
            found = sorting.squared_shares(torch.tensor(values, dtype=torch.float32).to(dtype))
            assert found.dtype == dtype
            np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-30)
