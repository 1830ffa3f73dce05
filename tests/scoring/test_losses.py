"""What a loss function is, and many tasks joined into one."""

import numpy as np
import pytest
import torch

from disparse_plugin import joint, score_tasks
from networks import TwoHeads, digit_batches, digit_losses


def test_the_joint_loss_is_the_weighted_sum():
    model, batch = TwoHeads().eval(), digit_batches(1)[0]
    parts = digit_losses(model, batch)
    for weights, expected in (
        (None, parts["a"] + parts["b"]),
        ({"b": 0.25}, parts["a"] + 0.25 * parts["b"]),
        ({"a": 0, "b": np.float64(-2)}, -2 * parts["b"]),
        ({"a": torch.tensor(3.0)}, 3 * parts["a"] + parts["b"]),
    ):
        found = joint(digit_losses, weights)(model, batch)
        assert list(found) == ["joint"]
        torch.testing.assert_close(found["joint"], expected)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ({"typo": 2}, ValueError, "weights: must be of tasks that losses return, found 'typo' with a, b; a batch"),
        ({"bb": 2}, ValueError, "found 'bb' with a, b; did you mean 'b'"),
        ([1, 2], TypeError, "weights: must be a mapping from task to number, found list"),
        ({"a": "2"}, TypeError, "weights: the weight of task 'a' must be a number, found str"),
        ({"a": True}, TypeError, "weights: the weight of task 'a' must be a number, found bool"),
        ({"a": float("nan")}, ValueError, "weights: the weight of task 'a' must be finite, found nan"),
    ],
)
def test_weights_of_no_task(weights, error, message):
    with pytest.raises(error, match=message):
        score_tasks(TwoHeads(), joint(digit_losses, weights), digit_batches(1))


def test_what_is_no_loss_function():
    with pytest.raises(TypeError, match="losses: must be a function of model and batch"):
        joint({"a": 1.0})


@pytest.mark.parametrize("count", [2, np.int64(2), np.uint8(2)])
def test_numbers_of_batches_may_be_numpy_s(count):
    assert score_tasks(TwoHeads(), digit_losses, digit_batches(3), num_batches=count).num_batches == 2
