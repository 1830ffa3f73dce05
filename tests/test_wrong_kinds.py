"""Arguments of another kind: classes for objects, makers for what they make, a folder for a file: messages say so."""

import pytest
import torch
from torch import nn

from disparse_plugin import (
    Budget,
    DiSparseStatic,
    TaskScores,
    at_least,
    damped,
    disparse_static,
    joint,
    layer_adaptive,
    save_pruned,
    score_tasks,
    sparsity_report,
)
from disparse_plugin.agreement.patterns import NofM
from disparse_plugin.analysis import task_overlap
from disparse_plugin.sparse_training import CosineDecay, DiSparseScheduler, GradualPruning, load_checkpoint
from networks import Snapshot, square_losses, vectors


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 2), nn.Linear(5, 3)

    def forward(self, x):
        x = self.trunk(x).relu()
        return {"a": self.a(x), "b": self.b(x)}


class Losses:
    def __call__(self, model, batch):
        return square_losses(model, batch)


class Own:
    """An arbiter or a criterion."""

    def __call__(self, *tensors):
        return tensors[0]


CLASSES = {
    "losses": (Losses, "the class Losses"),
    "criterion": (Own, "the class Own"),
    "arbiter": (Own, "the class Own"),
    "amount": (Budget, "the class Budget"),
    "pattern": (NofM, "the class NofM"),
    "min_keep": (int, "the class int"),
}
MAKERS = {"arbiter": (at_least, r"at_least\(2\)"), "criterion": (layer_adaptive, r"layer_adaptive\('taylor'\)")}
OF_SCHEDULERS = {
    "drop_fraction": (CosineDecay, "the class CosineDecay"),
    "distribution": (dict, "the class dict"),
    "seed": ("0", "str: '0'"),
    "losses": (Losses, "the class Losses"),
    "arbiter": (Own, "the class Own"),
    "criterion": (Own, "the class Own"),
    "grad_scaler": (torch.amp.GradScaler, "the class GradScaler"),
}


@pytest.mark.parametrize("argument", CLASSES)
def test_a_class_for_an_object(argument):
    model, (value, what) = Net(), CLASSES[argument]
    before = Snapshot(model)
    options = {"losses": square_losses, "data": vectors(), "amount": 0.5, argument: value}
    with pytest.raises(TypeError, match=f"^{argument}: .*{what}"):
        disparse_static(model, **options)
    before.check()


@pytest.mark.parametrize("argument", MAKERS)
def test_a_function_for_what_it_makes(argument):
    value, what = MAKERS[argument]
    with pytest.raises(TypeError, match=f"^{argument}: .*the function itself; pass {what}"):
        disparse_static(Net(), square_losses, vectors(), 0.5, **{argument: value})
    with pytest.raises(TypeError, match=r"pass damped\('taylor'\)"):
        score_tasks(Net(), square_losses, vectors(), criterion=damped)


@pytest.mark.parametrize("argument", OF_SCHEDULERS)
def test_schedulers(argument):
    model, (value, what) = Net(), OF_SCHEDULERS[argument]
    before = Snapshot(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"losses": square_losses, "amount": 0.5, "stop_at": 9, argument: value}
    with pytest.raises(TypeError, match=f"^{argument}: .*{what}"):
        DiSparseScheduler(model, optimizer, **options)
    before.check()


def test_a_schedule_that_is_a_class():
    model = Net()
    with pytest.raises(TypeError, match=r"^amount: .*the class CosineDecay"):
        GradualPruning(model, torch.optim.SGD(model.parameters(), lr=0.1), square_losses, amount=CosineDecay, stop_at=9)


def test_joint_of_a_class():
    with pytest.raises(TypeError, match=r"^losses: .*the class Losses"):
        joint(Losses)


@pytest.mark.parametrize("value", [TaskScores, nn.Linear(2, 2)], ids=["class", "model"])
@pytest.mark.parametrize(
    "call",
    [lambda v: sparsity_report(Net(), v), lambda v: task_overlap(v, 0.5), DiSparseStatic.bind],
    ids=["sparsity_report", "task_overlap", "bind"],
)
def test_something_else_for_scores(call, value):
    with pytest.raises(TypeError, match=r"^scores: must be TaskScores, found (the class TaskScores|Linear)"):
        call(value)


@pytest.mark.parametrize("path", ["", "."])
def test_no_name_of_a_file(path):
    net = Net()
    scores = score_tasks(net, square_losses, vectors())
    for call in (
        lambda: scores.save(path),
        lambda: TaskScores.load(path, net),
        lambda: save_pruned(net, path),
        lambda: load_checkpoint(path, model=net),
    ):
        with pytest.raises(ValueError, match=r"^path: must be the name of a file"):
            call()


def test_a_folder_for_a_file(tmp_path):
    net = Net()
    scores = score_tasks(net, square_losses, vectors())
    with pytest.raises(IsADirectoryError, match="path: must be writable, found that it is a directory"):
        scores.save(tmp_path)
    with pytest.raises(FileNotFoundError, match="path: must be an existing file, found a directory"):
        TaskScores.load(tmp_path, net)
