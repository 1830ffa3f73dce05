"""Arguments of another kind: classes for objects, makers for what they make, a folder for a file: messages say so."""

import numpy as np
import pytest
import torch
from torch import nn

from disparse_plugin import (
    Budget,
    Criterion,
    DiSparseStatic,
    TaskScores,
    arbiters,
    at_least,
    attach_masks,
    channel_importance,
    criteria,
    damped,
    disparse_static,
    joint,
    layer_adaptive,
    save_masks,
    save_pruned,
    score_tasks,
    sparsity_report,
)
from disparse_plugin.agreement.patterns import NofM
from disparse_plugin.analysis import (
    html_report,
    overlap_with_controls,
    own_masks,
    permute_labels,
    plot_iou,
    task_overlap,
)
from disparse_plugin.criteria import lamp_scores
from disparse_plugin.lightning import DiSparsePruning
from disparse_plugin.masks import apply_masks, keep_tasks, masks_of
from disparse_plugin.sparse_training import (
    CosineDecay,
    CubicSparsity,
    DiSparseDynamic,
    DiSparseScheduler,
    GradualPruning,
    layer_counts,
    load_checkpoint,
    register_optimizer,
    save_checkpoint,
)
from disparse_plugin.structured import (
    DiSparseImportance,
    attention_heads,
    channel_parameters,
    record_removal,
    remove_channels,
    sync_attention,
)
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


def _scheduled(stop_at=9, **options):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return DiSparseScheduler(model, optimizer, square_losses, amount=0.5, stop_at=stop_at, **options)


def _scored():
    return score_tasks(Net(), square_losses, vectors())


def _layer():
    return nn.Linear(4, 2)


def _masks():
    return {"trunk.weight": torch.ones(5, 5, dtype=torch.bool)}


def _tables():
    net = Net()
    return {"model": net, "scores": {"a": {(net.trunk, "weight"): torch.rand(5, 5)}}}


# What is called, and good arguments; each of them is replaced by things of other kinds.
CALLS = {
    "score_tasks": (score_tasks, lambda: {"model": Net(), "losses": square_losses, "data": vectors(), "exclude": (),
                                          "parameters": None, "observe": None}),
    "TaskScores": (TaskScores, lambda: _tables() | {"criterion": "own", "num_batches": 0}),
    "apply": (DiSparseStatic.apply, lambda: {"module": _layer(), "name": "weight", "amount": 0.5,
                                             "importance_scores": torch.rand(2, 4)}),
    "channel_importance": (channel_importance, lambda: {"scores": _scored(), "dim": 0}),
    "DiSparseDynamic": (DiSparseDynamic.apply, lambda: {"module": _layer(), "name": "weight",
                                                        "mask": torch.ones(2, 4)}),
    "attach_masks": (attach_masks, lambda: {"model": Net(), "masks": _masks()}),
    "apply_masks": (apply_masks, lambda: {"model": Net(), "masks": _masks()}),
    "keep_tasks": (keep_tasks, lambda: {"model": Net(), "scores": _scored(), "tasks": ["a"]}),
    "masks_of": (masks_of, lambda: {"model": Net()}),
    "save_masks": (lambda model: save_masks(model, "masks.safetensors"), lambda: {"model": Net()}),
    "lamp_scores": (lamp_scores, lambda: {"scores": torch.ones(2)}),
    "at_least": (at_least, lambda: {"k": 2}),
    "CosineDecay": (CosineDecay, lambda: {"start": 0.5, "stop_at": 9}),
    "CubicSparsity": (CubicSparsity, lambda: {"final": 0.5, "stop_at": 9, "start_at": 0, "initial": 0.0}),
    "layer_counts": (layer_counts, lambda: {"shapes": [(2, 2)], "amount": 0.5, "dense": ()}),
    "save_checkpoint": (save_checkpoint, lambda: {"path": "run.pt", "model": Net()}),
    "register_optimizer": (register_optimizer, lambda: {"kind": torch.optim.SGD}),
    "scheduler": (_scheduled, lambda: {"total_steps": 9, "stop_at": 9, "drop_fraction": 0.5}),
    "load_state_dict": (lambda state: _scheduled().load_state_dict(state), lambda: {"state": {}}),
    "callback": (DiSparsePruning, lambda: {"mode": "dynamic", "amount": 0.5, "exclude": (), "drop_fraction": 0.5,
                                           "seed": 0}),
    "task_overlap": (task_overlap, lambda: {"scores": _scored(), "amount": 0.5}),
    "plot_iou": (plot_iou, lambda: {"overlap": task_overlap(_scored(), 0.5), "ax": None}),
    "html_report": (html_report, lambda: {"path": "r.html", "overlap": task_overlap(_scored(), 0.5), "model": Net(),
                                          "title": "Tasks"}),
    "permute_labels": (permute_labels, lambda: {"batch": (torch.ones(2, 1), torch.arange(2)),
                                                "generator": torch.Generator()}),
    "overlap_with_controls": (overlap_with_controls, lambda: {"model": Net(), "losses": square_losses,
                              "data": vectors(), "amount": 0.5, "parameters": None, "num_batches": None,
                              "resamples": 2, "seed": 0}),
    "remove_channels": (remove_channels, lambda: {"model": Net(), "losses": square_losses, "data": vectors(),
                        "example_inputs": vectors()[0], "amount": 0.5, "reduction": "mean", "normalizer": None,
                        "max_pruning_ratio": 1.0, "round_to": None, "parameters": None, "customized_pruners": None}),
    "DiSparseImportance": (DiSparseImportance, lambda: {"scores": _scored(), "normalizer": None, "parameters": None}),
    "attention_heads": (attention_heads, lambda: {"model": Net()}),
    "sync_attention": (sync_attention, lambda: {"heads": {}, "model": Net()}),
    "record_removal": (record_removal, lambda: {"pruner": None}),
}  # fmt: skip
# Any object is a batch to torch, and the model is run on what it is given. The report is drawn before it is written.
_ANYTHING = {("permute_labels", "batch"), ("remove_channels", "data"), ("remove_channels", "example_inputs"),
             ("html_report", "path")}  # fmt: skip
_CASES = [(name, argument) for name, (_, good) in CALLS.items() for argument in good() if argument]


@pytest.mark.parametrize(("name", "argument"), [case for case in _CASES if case not in _ANYTHING])
def test_another_kind(name, argument, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function, good = CALLS[name]
    for value in (object(), Own, 1j):
        with pytest.raises((TypeError, ValueError), match=f"^{argument}: "):
            function(**{**good(), argument: value})
    assert list(tmp_path.iterdir()) == []


FLAGS = {
    "cycle": lambda v: score_tasks(Net(), square_losses, vectors(), num_batches=1, cycle=v),
    "progress": lambda v: disparse_static(Net(), square_losses, vectors(), 0.5, progress=v),
    "regrow_dropped": lambda v: _scheduled(regrow_dropped=v),
    "rank_correlation": lambda v: task_overlap(_scored(), 0.5, rank_correlation=v),
    "as_scored": lambda v: own_masks(_scored(), 0.5, as_scored=v),
    "summed": lambda v: criteria.register("flagged", summed=v)(Own()),
    "elementwise": lambda v: Criterion("flagged", Own(), elementwise=v),
    "replace": lambda v: criteria.register("flagged", replace=v),
    "replace ": lambda v: arbiters.register("flagged", replace=v),
    "fold": lambda v: DiSparsePruning("static", 0.5, fold=v),
    "regrow_dropped ": lambda v: DiSparsePruning("dynamic", 0.5, regrow_dropped=v),
    "exact": lambda v: remove_channels(Net(), square_losses, vectors(), vectors()[0], 0.5, exact=v),
    "bias": lambda v: channel_parameters(Net(), bias=v),
}


@pytest.mark.parametrize("value", ["no", 1, np.array([True])], ids=["text", "one", "array"])
@pytest.mark.parametrize("argument", FLAGS)
def test_what_is_no_bool(argument, value):
    with pytest.raises(TypeError, match=f"^{argument.strip()}: must be True or False.*, found {type(value).__name__}"):
        FLAGS[argument](value)


def test_a_bool_of_numpy():
    assert len(channel_parameters(Net(), bias=np.bool_(True))) == 6


@pytest.mark.parametrize("value", [5, "trunk", nn.Linear(2, 2)], ids=["number", "text", "module"])
@pytest.mark.parametrize("argument", ["exclude", "exempt"])
def test_something_else_for_a_list(argument, value):
    with pytest.raises(TypeError, match=f"^{argument}: must be a list"):
        _scheduled(**{argument: value})
    with pytest.raises(TypeError, match=r"^exclude: must be a list"):
        remove_channels(Net(), square_losses, vectors(), vectors()[0], 0.5, exclude=value)
