"""What version 0.1.0 wrote, every later version reads: files of each kind, and whole models as pickles."""

import importlib
import pickle

import pytest
import torch
from torch.nn.utils import prune

from disparse_plugin import TaskScores, disparse_static
from disparse_plugin._support.public_path import home
from disparse_plugin.masks import load_masks, masks_of, sparsity_report
from disparse_plugin.sparse_training import DiSparseDynamic, DiSparseScheduler, load_checkpoint
from disparse_plugin.structured import replay_removal
from masks import equal_masks
from networks import PartlyShared, square_losses, vectors
from places import FILES as OF_ALL_VERSIONS

FILES = OF_ALL_VERSIONS / "0.1.0"


@pytest.fixture
def pruned_state():
    return torch.load(FILES / "pruned_state.pt", weights_only=True)


def test_scores(pruned_state):
    torch.manual_seed(0)
    model = PartlyShared()
    scores = TaskScores.load(FILES / "scores.safetensors", model)
    assert (scores.tasks, scores.criterion, scores.num_batches) == (("a", "b", "c", "d"), "snip", 3)
    assert scores.unreached == ("unused.weight",)
    with pytest.warns(UserWarning, match="unused"):
        again = disparse_static(model, square_losses, vectors(), 0.5)
    for task in scores:
        for key, score in scores[task].items():
            torch.testing.assert_close(score, again[task][key])


def test_masks(pruned_state):
    model = PartlyShared()
    load_masks(model, FILES / "masks.safetensors")
    model.load_state_dict(pruned_state)
    saved = {name.removesuffix("_mask"): value != 0 for name, value in pruned_state.items() if name.endswith("_mask")}
    assert equal_masks(masks_of(model), saved)
    assert sparsity_report(model).alive == 51 + 25  # of 101 that a task reaches, half; and all of no task


def test_a_removal():
    model = PartlyShared()
    replay_removal(model, FILES / "removal.safetensors")
    state = torch.load(FILES / "removed_state.pt", weights_only=True)
    model.load_state_dict(state)
    assert model.abc.out_features == state["abc.weight"].shape[0] < 6


@pytest.mark.filterwarnings("ignore:parameters. 1 of 7 are reached by no task")
def test_a_checkpoint_goes_on_where_it_stopped():
    model = PartlyShared()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = DiSparseScheduler(model, optimizer, square_losses, amount=0.6, update_every=2, stop_at=20)
    load_checkpoint(FILES / "checkpoint.pt", model=model, optimizer=optimizer, scheduler=scheduler)
    for batch in vectors(count=5, seed=1):
        optimizer.zero_grad()
        sum(square_losses(model, batch).values()).backward()
        optimizer.step()
        scheduler.step(batch)
    later = torch.load(FILES / "five_steps_later.pt", weights_only=True)
    assert equal_masks(
        {name: value for name, value in later.items() if name.endswith("_mask")},
        {name: value for name, value in model.state_dict().items() if name.endswith("_mask")},
    )
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, later[name])


@pytest.mark.parametrize("name", ["pruned_model", "sparse_model"])
def test_whole_models(name):
    model = torch.load(FILES / f"{name}.pt", weights_only=False)
    assert prune.is_pruned(model)
    before = model.abc.weight_orig.detach().clone()
    sum(square_losses(model, vectors()[0]).values()).backward()
    assert torch.equal(model.abc.weight, before * model.abc.weight_mask)
    if name == "sparse_model":
        assert isinstance(DiSparseDynamic.find(model.abc, "weight"), DiSparseDynamic)


OLD_PATHS = [
    ("dynamic_method", "DiSparseDynamic"),
    ("methods", "DiSparseStatic"),
    ("methods", "DiSparsePretrained"),
    ("patterns", "DiSparseStructured"),
    ("patterns", "DiSparseSemiStructured"),
    ("checkpoint_masks", "_before_load"),
    ("scores", "TaskScores"),
]


@pytest.mark.parametrize(("module", "name"), OLD_PATHS)
def test_pickles_find_what_has_moved(module, name):
    old = importlib.import_module(f"disparse_plugin.{module}")
    found = getattr(old, name)
    assert pickle.loads(f"cdisparse_plugin.{module}\n{name}\n.".encode()) is found
    assert pickle.loads(pickle.dumps(found)) is found


PUBLIC = ["", ".masks", ".analysis", ".sparse_training", ".structured"]


@pytest.mark.parametrize("room", PUBLIC)
def test_public_classes_are_pickled_by_their_public_path(room):
    public = importlib.import_module(f"disparse_plugin{room}")
    classes = [value for name in public.__all__ if isinstance(value := getattr(public, name), type)]
    classes = [cls for cls in classes if home(cls).startswith("disparse_plugin")]  # Batch is typing.Any
    assert classes
    for cls in classes:
        assert cls.__module__ in {f"disparse_plugin{room}" for room in PUBLIC}
        assert getattr(importlib.import_module(cls.__module__), cls.__name__) is cls
