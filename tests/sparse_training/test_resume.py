"""Stop at any step, go on in a new process: the same bits as without stopping."""

import collections
import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from disparse_plugin.sparse_training import DiSparseScheduler, GradualPruning, load_checkpoint, save_checkpoint
from networks import TwoHeads, digit_losses
from places import python
from runs import Run, masks_of

KINDS = {
    "disparse": {},
    "set": {"criterion": "random", "optimizer": lambda p: torch.optim.AdamW(p, lr=0.01)},
    "static": {"drop_fraction": 0.0},
}


def bits(run):
    state = {name: value.clone() for name, value in run.model.state_dict().items()}
    for index, parameter in enumerate(run.model.parameters()):
        for name, value in run.optimizer.state[parameter].items():
            state[f"{index}.{name}"] = torch.as_tensor(value).clone()
    return state


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [1, 4, 5])
@pytest.mark.parametrize("order", [("model", "optimizer", "scheduler"), ("optimizer", "scheduler", "model")])
def test_a_resumed_run_has_the_same_bits(kind, stop, order, tmp_path):
    whole = Run(**KINDS[kind])
    whole.train(9)
    first = Run(**KINDS[kind])
    first.train(stop)
    save_checkpoint(tmp_path / "run.pt", **{name: first.parts()[name] for name in order})
    torch.rand(5)  # whatever happens in between
    second = Run(**KINDS[kind])
    load_checkpoint(tmp_path / "run.pt", **{name: second.parts()[name] for name in order})
    second.train(9 - stop, first=stop)
    assert same(bits(second), bits(whole))
    assert second.scheduler.completed == 9


def test_states_of_an_optimizer_that_was_loaded_before_the_masks_stay():
    first, second = Run(), Run()
    first.train(5)
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.scheduler.load_state_dict(first.scheduler.state_dict())
    second.model.load_state_dict(first.model.state_dict())
    assert same(bits(second), bits(first))


def test_a_stop_between_the_optimizer_and_the_scheduler_loses_no_step():
    run, other = Run(update_every=3), Run(update_every=3)
    run.train(1)
    run.optimizer.step()
    other.scheduler.load_state_dict(run.scheduler.state_dict())
    other.scheduler.step(None)
    assert other.scheduler.completed == 2


SCRIPT = """
import os, sys
from runs import Run
from disparse_plugin.sparse_training import load_checkpoint, save_checkpoint
path, kill = sys.argv[1], int(sys.argv[2])
run = Run(criterion="random")
if os.path.exists(path):
    load_checkpoint(path, **run.parts())
for step in range(run.scheduler.completed, 9):
    run.train(1, first=step)
    save_checkpoint(path, **run.parts())
    if step == kill:
        os.kill(os.getpid(), 9)
"""


def run_script(path, kill):
    return python("-c", SCRIPT, path, kill).returncode


def test_a_killed_process_goes_on_in_a_new_one(tmp_path):
    whole = Run(criterion="random")
    whole.train(9)
    assert run_script(tmp_path / "run.pt", 4) == -9
    assert run_script(tmp_path / "run.pt", -1) == 0
    resumed = Run(criterion="random")
    load_checkpoint(tmp_path / "run.pt", **resumed.parts())
    assert same(bits(resumed), bits(whole))


def test_a_process_that_dies_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    run = Run()
    save_checkpoint(tmp_path / "run.pt", **run.parts())
    before = (tmp_path / "run.pt").read_bytes()

    def dies(state, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(tmp_path / "run.pt", **run.parts())
    assert (tmp_path / "run.pt").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


@pytest.mark.parametrize(
    "other", [{"update_every": 3}, {"amount": 0.7}, {"arbiter": "mean"}, {"criterion": "random"}, {"stop_at": 50}]
)
def test_other_options_are_refused_and_nothing_changes(other):
    saved, run = Run().scheduler.state_dict(), Run(**other)
    before = masks_of(run.model)
    with pytest.raises(ValueError, match="state_dict: must be of a scheduler with the same options"):
        run.scheduler.load_state_dict(saved)
    assert all(torch.equal(mask, before[name]) for name, mask in masks_of(run.model).items())


def test_another_model_is_refused():
    model = TwoHeads(tasks=("a", "c"))
    scheduler = DiSparseScheduler(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        digit_losses,
        amount=0.8,
        update_every=2,
        stop_at=100,
    )
    with pytest.raises(ValueError, match="state_dict: must have masks for"):
        scheduler.load_state_dict(Run().scheduler.state_dict())


def test_a_damaged_or_foreign_file_is_refused(tmp_path):
    run = Run()
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "none.pt", **run.parts())
    save_checkpoint(tmp_path / "run.pt", **run.parts())
    with pytest.raises(ValueError, match="parts: must be model, optimizer, scheduler"):
        load_checkpoint(tmp_path / "run.pt", model=run.model)
    content = (tmp_path / "run.pt").read_bytes()
    (tmp_path / "run.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="path: must be a complete file"):
        load_checkpoint(tmp_path / "run.pt", **run.parts())


NUMPY = {
    "update_every": np.int64(3),
    "drop_fraction": np.float64(0.3),
    "stop_at": np.int32(9),
    "regrow_dropped": np.bool_(True),
    "amount": np.float32(0.75),
    "seed": np.int64(1),
}


@pytest.mark.parametrize("option", NUMPY)
def test_options_of_numpy_are_saved_as_plain_ones(option, tmp_path):
    run, same = Run(**{option: NUMPY[option]}), Run(**{option: NUMPY[option].item()})
    torch.save(run.scheduler.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    same.scheduler.load_state_dict(state)
    run.scheduler.load_state_dict(state)


@pytest.mark.parametrize("option", ["amount", "min_keep", "update_every"])
def test_so_are_those_of_gradual_pruning(option, tmp_path):
    def make(value):
        model = TwoHeads()
        options = {"amount": 0.8, "update_every": 2, "stop_at": 8, option: value}
        return GradualPruning(model, torch.optim.SGD(model.parameters(), 0.1), digit_losses, **options)

    value = {"amount": np.float64(0.7), "min_keep": np.int64(2), "update_every": np.int64(3)}[option]
    torch.save(make(value).state_dict(), tmp_path / "state.pt")
    make(value.item()).load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


class Part:
    """Something with a state, as a training script has it."""

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def test_numbers_of_numpy_in_any_part_can_be_read_again(tmp_path):
    run, best = Run(), Part({"best": np.float32(0.5), np.int64(3): [np.bool_(True), (np.float64(0.25),)]})
    for group in run.optimizer.param_groups:
        group["lr"] = np.interp(3, [0, 10], [0.05, 0.005])
    save_checkpoint(tmp_path / "run.pt", best=best, **run.parts())
    other, read = Run(), Part({})
    load_checkpoint(tmp_path / "run.pt", best=read, **other.parts())
    assert read.state == {"best": 0.5, 3: [True, (0.25,)]}
    assert other.optimizer.param_groups[0]["lr"] == run.optimizer.param_groups[0]["lr"]
    metadata = other.model.state_dict()._metadata
    assert metadata == run.model.state_dict()._metadata


@pytest.mark.parametrize("odd", [Path("run"), collections.defaultdict(int), np.arange(3)])
def test_what_could_not_be_read_again_is_refused_when_it_is_written(odd, tmp_path):
    run = Run()
    save_checkpoint(tmp_path / "run.pt", progress=Part({}), **run.parts())
    before = (tmp_path / "run.pt").read_bytes()
    with pytest.raises(TypeError, match=r"progress: state_dict\(\) must hold tensors and plain values, found \w+"):
        save_checkpoint(tmp_path / "run.pt", progress=Part({"where": [odd]}), **run.parts())
    assert (tmp_path / "run.pt").read_bytes() == before
