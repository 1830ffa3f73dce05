"""What is trained is scored by one criterion, whichever way it is pruned."""

import inspect

import pytest

from disparse_plugin import disparse_pretrained
from disparse_plugin.callbacks.modes import Options
from disparse_plugin.criteria import resolve
from disparse_plugin.sparse_training import GradualPruning


@pytest.mark.parametrize("mode", ["pretrained", "gradual"])
def test_callbacks_score_as_the_core(mode):
    core = disparse_pretrained if mode == "pretrained" else GradualPruning
    expected = inspect.signature(core).parameters["criterion"].default
    made = Options(mode=mode, amount=0.5).maker().args
    criterion = made[1] if mode == "pretrained" else made[1]["criterion"]
    assert criterion == resolve(expected) == resolve("layer_adaptive(damped(taylor, 0.5))")
