"""A state of a scheduler is taken over as a whole, or not at all."""

import copy

import pytest
import torch

from disparse_plugin import fold
from disparse_plugin.sparse_training import GradualPruning
from runs import Run


class GradualRun(Run):
    scheduler_class = GradualPruning


KINDS = pytest.mark.parametrize("kind", [Run, GradualRun])


def everything(run):
    """All that a state decides, as values."""
    state = run.scheduler.state_dict()
    tensors = [*run.model.state_dict().values(), *state["masks"].values()]
    own = {name: str(value) for name, value in state.items() if name != "masks"}
    generator = state["own"].get("generator", torch.zeros(1))
    return [*map(torch.clone, tensors), generator.clone()], own


def check_refused(run, state, error, message):
    tensors, own = everything(run)
    with pytest.raises(error, match=message):
        run.scheduler.load_state_dict(state)
    now = everything(run)
    assert all(torch.equal(one, other) for one, other in zip(now[0], tensors, strict=True))
    assert now[1] == own


def without(state, path):
    state = copy.deepcopy(state)
    *outer, last = path.split(".")
    inner = state
    for name in outer:
        inner = inner[name]
    del inner[last]
    return state


@KINDS
@pytest.mark.parametrize(
    "path", ["completed", "waiting", "next", "masks", "settings", "own", "own.scores", "own.scores.tasks"]
)
def test_what_is_missing_is_named_and_nothing_changes(kind, path):
    first, other = kind(), kind()
    first.train(5)
    other.train(1)
    message = f"state_dict: must be all that .* found no {path}; load another"
    check_refused(other, without(first.scheduler.state_dict(), path), KeyError, message)
    other.scheduler.load_state_dict(first.scheduler.state_dict())
    assert other.scheduler.completed == 5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"completed": "five"}, ValueError, "five"),
        ({"waiting": None}, TypeError, "int"),
        ({"next": "soon"}, ValueError, "soon"),
        (
            {"own": {"generator": torch.zeros(3, dtype=torch.uint8), "scores": {"tasks": [], "put_off": 0}}},
            RuntimeError,
            "of size",
        ),
        ({"own": {"scores": {"tasks": [], "put_off": 0}}}, KeyError, "found no own.generator"),
        ({"own": None}, KeyError, "found no own.generator, own.scores"),
    ],
)
def test_what_is_of_the_wrong_kind_changes_nothing(change, error, message):
    first, other = Run(), Run()
    first.train(5)
    other.train(1)
    check_refused(other, {**first.scheduler.state_dict(), **change}, error, message)


@KINDS
def test_after_folding_a_state_is_neither_written_nor_loaded(kind):
    run = kind()
    run.train(4)
    state = run.scheduler.state_dict()
    fold(run.model)
    with pytest.raises(ValueError, match=r"masks: .*\.weight must carry its mask, .* write the .* before fold"):
        run.scheduler.state_dict()
    with pytest.raises(ValueError, match=r"weight must carry its DiSparseDynamic hook, found it gone"):
        run.scheduler.load_state_dict({**state, "completed": 3})
    assert run.scheduler.completed == 4
    with pytest.raises(ValueError, match="must carry its"):
        run.train(2, first=4)
