"""The k lowest of values in several places are those of one sort by value, then turn."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disparse_plugin.agreement import select

SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 3.4e38, -3.4e38, float("inf"), float("-inf")]
VALUES = st.one_of(
    st.sampled_from(SPECIAL), st.integers(-3, 3).map(float), st.floats(width=32, allow_nan=False)
)  # many are equal


def together(parts, count):
    """Select in one thread for each part; counts are added up over all of them, as over ranks."""
    waiting, given_in, found = threading.Barrier(len(parts)), [None] * len(parts), [None] * len(parts)

    def run(number):
        def total(counts):
            given_in[number] = counts
            waiting.wait(10)
            summed = sum(given_in)
            waiting.wait(10)
            return summed

        values, turns, owned = parts[number]
        found[number] = select.lowest(values, count, turns, owned, total)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@given(st.data())
def test_lowest_over_several_places(data):
    values = data.draw(st.lists(VALUES, min_size=1, max_size=30))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    places = data.draw(st.integers(1, 3))
    count = data.draw(st.integers(0, len(values)))
    turns = np.array(data.draw(st.permutations(range(len(values)))))
    owner = np.array(data.draw(st.lists(st.integers(0, places - 1), min_size=len(values), max_size=len(values))))
    copied = np.array(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))))
    expected = np.zeros(len(values), dtype=bool)
    expected[np.lexsort((turns, np.array(values) + 0.0))[:count]] = True
    here = [(owner == number) | copied for number in range(places)]
    everything, numbers = torch.tensor(values, dtype=dtype), torch.from_numpy(turns)
    parts = [
        (everything[mask], numbers[mask], torch.from_numpy((owner == number)[mask])) for number, mask in enumerate(here)
    ]
    for mask, found in zip(here, together(parts, count), strict=True):
        assert found.tolist() == expected[mask].tolist()


@given(st.lists(st.floats(allow_nan=False), min_size=2, max_size=20))
def test_ordered_keeps_the_order_of_doubles(values):
    keys = select.ordered(torch.tensor(values, dtype=torch.float64)).tolist()
    for one, first in zip(values, keys, strict=True):
        for other, second in zip(values, keys, strict=True):
            assert (one < other, one == other) == (first < second, first == second)


@pytest.mark.parametrize("bits", [16, 32, 48, 64])
def test_kth_over_the_whole_range(bits):
    keys = torch.tensor([-(2 ** (bits - 1)), -1, 0, 0, 2 ** (bits - 1) - 1])
    found = [select.kth(keys, count, bits) for count in range(1, 6)]
    assert found == [(int(key), below) for key, below in zip(keys, [0, 1, 2, 2, 4], strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_of_both_signs_are_equal(dtype):
    values = torch.tensor([0.0, -0.0, 0.0, -0.0], dtype=dtype)
    assert select.lowest(values, 2, torch.arange(4), torch.ones(4, dtype=torch.bool)).tolist() == [
        True,
        True,
        False,
        False,
    ]


def test_turns_of_very_many_units_and_copies_that_do_not_count():
    ties, turns = torch.zeros(3), torch.tensor([2**40 + 1, 2**40, 7])
    everyone = torch.ones(3, dtype=torch.bool)
    assert select.lowest(ties, 2, turns, everyone).tolist() == [False, True, True]
    one = torch.tensor([True, False, False])  # the others are counted elsewhere, where nothing is left over
    assert select.lowest(ties, 2, turns, one).tolist() == [True, True, True]
