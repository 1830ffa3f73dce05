"""What users import, from where, and that it costs nothing before it is used."""

import importlib
from typing import Any

import pytest

import disparse_plugin
from places import python

ROOMS = ["analysis", "arbiters", "criteria", "masks", "sparse_training", "structured"]


@pytest.mark.parametrize("room", [None, *ROOMS, "scoring", "agreement", "methods", "callbacks"])
def test_what_a_room_hands_on_is_there(room):
    module = disparse_plugin if room is None else importlib.import_module(f"disparse_plugin.{room}")
    for name in getattr(module, "__all__", ()):
        assert getattr(module, name, None) is not None, name
    assert module.__doc__


def test_rooms_are_attributes_and_loaded_on_demand():
    code = (
        "import sys, disparse_plugin as d\n"
        "heavy = {'torch_pruning', 'matplotlib', 'lightning', 'timm', 'transformers', 'pandas'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "on_demand = ['analysis', 'sparse_training', 'structured']\n"
        "assert not any(f'disparse_plugin.{room}' in sys.modules for room in on_demand)\n"
        "assert set(on_demand) <= set(dir(d))\n"
        "print(d.sparse_training.DiSparseScheduler.__name__, d.analysis.task_overlap.__name__)\n"
        "print(d.masks.fold is d.fold)\n"
        "print(d.structured.remove_channels.__name__)\n"
    )
    done = python("-c", code)
    assert done.stdout.split() == ["DiSparseScheduler", "task_overlap", "True", "remove_channels"], done.stderr


def test_an_unknown_attribute_is_an_ordinary_error():
    with pytest.raises(AttributeError, match="module 'disparse_plugin' has no attribute 'score_task'"):
        _ = disparse_plugin.score_task


def test_an_alias_leaves_the_class_that_it_names_alone():
    assert disparse_plugin.Batch is Any
    assert Any.__module__ == "typing"
    assert disparse_plugin.TaskScores.__module__ == "disparse_plugin"
