"""How far two outputs are apart: the scale of each entry, and what no number can say."""

from __future__ import annotations

import math

import pytest
import torch

from disparse_plugin.structured.comparison import difference, narrowed


@pytest.mark.parametrize("shape", [(), (1,), (7,), (0,), (2, 0, 3), (2, 3), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.int64, torch.bool]
)
def test_a_tensor_is_no_distance_from_itself(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).mul(3).to(dtype)
    assert difference(x, x.clone(), floor=1e-3).size == 0


@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (2, 3, 4, 5)], ids=str)
def test_a_small_relative_error_is_found_at_its_size(shape: tuple[int, ...]) -> None:
    x = torch.rand(shape, dtype=torch.float64) + 1
    found = difference(x, x * 1.01, floor=1e-3)
    assert found.size == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.ones(2), torch.ones(3)),
        (torch.tensor([1.0, math.nan]), torch.tensor([math.nan, 1.0])),
        (torch.tensor([1.0, math.inf]), torch.tensor([1.0, -math.inf])),
        (torch.tensor([1.0, math.inf]), torch.tensor([1.0, 9.0])),
        (torch.tensor([1, 2]), torch.tensor([1, 3])),
        (torch.tensor([True]), torch.tensor([False])),
    ],
    ids=str,
)
def test_what_no_number_can_say_is_infinitely_far(first: torch.Tensor, second: torch.Tensor) -> None:
    assert difference(first, second, floor=1e-3).size == math.inf


@pytest.mark.parametrize("fill", [0.0, -1e4, -1e9, torch.finfo(torch.float32).min, -math.inf])
def test_a_fill_does_not_hide_the_rest(fill: float) -> None:
    x = torch.rand(4, 6, 5)
    filled = x.clone()
    filled[:, 4:] = fill
    other = filled.clone()
    other[0, 1, 2] += 0.05
    assert difference(filled, other, floor=1e-3).size > 0.04
    assert "entry [0, 1, 2]" in difference(filled, other, floor=1e-3).where


def test_a_channel_that_is_small_is_compared_on_its_own_scale() -> None:
    x = torch.rand(2, 8, 50, dtype=torch.float64) + 1
    x[:, :4] *= 640
    other = x.clone()
    other[:, 4] += 0.1
    assert difference(x, other, floor=1e-3).size > 0.04
    assert difference(x, x + 1e-9 * torch.randn_like(x), floor=1e-3).size < 1e-6


def test_rounding_of_a_channel_that_is_nearly_zero_is_no_difference() -> None:
    x = torch.rand(2, 8, 50, dtype=torch.float64)
    x[:, 3] = 1e-14 * torch.randn(2, 50, dtype=torch.float64)
    other = x.clone()
    other[:, 3] *= -1
    assert difference(x, other, floor=1e-3).size < 1e-9


def test_what_fits_best_is_taken_out_and_nothing_else() -> None:
    x = torch.rand(3, 4, 5)
    first, second = torch.tensor([0, 1]), torch.tensor([1, 3])
    assert torch.equal(narrowed(x, x[:, second], [(4, first), (4, second)]), x[:, second])
    assert narrowed(x, x[:, :2, :4], [(4, first)]).shape == (3, 2, 5)
    assert narrowed(x, x[:, :3], [(4, first), (5, second)]) is x
