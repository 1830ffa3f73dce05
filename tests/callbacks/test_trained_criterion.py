"""What is trained is scored by one criterion, whichever way it is pruned."""

import inspect

import pytest
import torch
from torch import nn

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
    assert criterion == resolve(expected) == resolve("layer_adaptive(damped(taylor, 0.25))")


@pytest.mark.parametrize(
    ("mode", "criterion", "arbiter", "expected"),
    [
        ("pretrained", None, None, "sum"),
        ("gradual", None, None, "sum"),
        ("gradual", None, "unanimous", "unanimous"),
        ("pretrained", "taylor", None, "unanimous"),
        ("gradual", "lamp", "sum", "sum"),
        ("static", None, None, "unanimous"),
        ("dynamic", None, None, "unanimous"),
    ],
)
def test_callbacks_join_the_tasks_as_the_core(mode, criterion, arbiter, expected):
    made = Options(mode=mode, amount=0.5, criterion=criterion, arbiter=arbiter).maker()
    assert (made.args[2] if mode in ("static", "pretrained") else made.args[1]["arbiter"]) == expected


def test_gradual_pruning_says_what_it_takes():
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def losses(model, x):
        return {"a": model(x)[:, 0].sum(), "b": model(x)[:, 1].sum()}

    shown = [
        repr(GradualPruning(model, optimizer, losses, amount=0.5, stop_at=9, **options))
        for options in ({}, {"criterion": "taylor"}, {"arbiter": "any"})
    ]
    for text, arbiter in zip(shown, ("sum", "unanimous", "any"), strict=True):
        assert f"arbiter='{arbiter}'" in text
