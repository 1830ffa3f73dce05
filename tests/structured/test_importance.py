"""DiSparseImportance inside torch-pruning's own pruners."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import nn

from disparse_plugin import score_tasks
from disparse_plugin.structured import DiSparseImportance, channel_parameters, sync_attention
from disparse_plugin.structured.masked_copy import masked_copy
from oracles.structured import cuts_of, kept_units
from structured_networks import TwoTasks, batches, build, deviation, losses, make_pruner

KINDS = ["batchnorm", "grouped", "depthwise", "groupnorm", "instancenorm", "transformer"]
PRUNERS = [tp.pruner.BasePruner, tp.pruner.MetaPruner, tp.pruner.BNScalePruner, tp.pruner.GroupNormPruner,
           tp.pruner.GrowingRegPruner]  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def prune(pruner: Any) -> nn.Module:
    """Take one step, and return the full model with the same channels masked."""
    full = copy.deepcopy(pruner.model)
    groups = list(pruner.step(interactive=True))
    soft = masked_copy(full, cuts_of(pruner, groups))
    for group in groups:
        group.prune()
    sync_attention(pruner.num_heads, pruner.model)
    return soft


@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("everywhere", [True, False], ids=["global", "local"])
@pytest.mark.parametrize("kind", KINDS)
def test_removing_equals_masking(kind: str, everywhere: bool, ratio: float) -> None:
    model = build(kind)
    soft = prune(make_pruner(model, global_pruning=everywhere, pruning_ratio=ratio))
    assert deviation(soft, model) < 1e-5
    assert deviation(build(kind), model) > 1e-3  # something did happen


def test_masking_is_what_it_says() -> None:
    """The oracle of the tests above, on numbers that can be followed by hand."""
    net = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.ReLU(), nn.Linear(3, 2))
    names = {"0": ("out", 3), "1": ("out", 3), "3": ("in", 3)}
    from disparse_plugin.structured.cuts import Cut

    cuts = [Cut(name, side, -1, count, torch.tensor([1])) for name, (side, count) in names.items()]  # type: ignore[arg-type]
    x = torch.randn(4, 2)
    first, second = (net[i].weight.detach().double().numpy() for i in (0, 3))
    hidden = (x.double().numpy() @ first.T + net[0].bias.detach().double().numpy())[:, [0, 2]]
    hidden = (hidden - hidden.mean(1, keepdims=True)) / np.sqrt(hidden.var(1, keepdims=True) + 1e-5)
    expected = np.maximum(hidden, 0) @ second[:, [0, 2]].T + net[3].bias.detach().double().numpy()
    found = masked_copy(net, cuts)(x).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["batchnorm", "depthwise", "transformer"])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_the_ratio_is_met_exactly(kind: str, ratio: float) -> None:
    pruner = make_pruner(build(kind), pruning_ratio=ratio)
    before = kept_units(pruner)
    gone = sum(len(group[0].idxs) // pruner._get_channel_groups(group) for group in pruner.step(interactive=True))
    assert gone == before - int(before * (1 - ratio))


@pytest.mark.parametrize("kind", ["batchnorm", "transformer"])
def test_no_layer_is_given_up_or_emptied(kind: str) -> None:
    """At 97 % torch-pruning alone leaves whole layers intact, because they would be emptied."""
    model = build(kind)
    pruner = make_pruner(model, pruning_ratio=0.97)
    before = dict(pruner.layer_init_out_ch)
    pruner.step()
    outs = {m: pruner.DG.get_out_channels(m) for m in before if isinstance(m, nn.Conv2d | nn.Linear)}
    kept = [m for m in outs if m not in (model.dense_out, model.label_out)]
    assert all(1 <= outs[m] < before[m] for m in kept)


def test_max_pruning_ratio_holds_in_one_shot() -> None:
    pruner = make_pruner(build("batchnorm"), pruning_ratio=0.6, max_pruning_ratio=0.7)
    before = dict(pruner.layer_init_out_ch)
    pruner.step()
    shares = [pruner.DG.get_out_channels(m) / n for m, n in before.items() if isinstance(m, nn.Conv2d)]
    assert min(shares) >= 0.3 - 1e-9
    assert min(shares) < 0.4


def percentiles(pruner: Any, groups: list[Any]) -> list[np.ndarray]:
    """For each group, the percentiles of its tasks among all channels that each task reaches: ``(tasks, channels)``."""
    raw = [pruner.importance.task_scores(group) for group in groups]
    ranked: list[dict[str, np.ndarray]] = [{} for _ in groups]
    for task in ("dense", "label"):
        values = np.concatenate([scores[task].numpy() for scores in raw if task in scores])
        places = (np.argsort(np.argsort(values, kind="stable"), kind="stable") + 1) / len(values)
        for place, scores in enumerate(raw):
            if task in scores:
                count = len(scores[task])
                ranked[place][task], places = places[:count], places[count:]
    return [np.stack([*by_task.values()]) for by_task in ranked]


def all_groups(pruner: Any) -> list[Any]:
    return list(pruner.DG.get_all_groups(pruner.ignored_layers, pruner.root_module_types))


def removed(pruner: Any, groups: list[Any]) -> list[set[int]]:
    """Take one step without removing, and return the channels that would go from each group."""
    gone = {group[0].dep.target.module: set(group[0].idxs) for group in pruner.step(interactive=True)}
    return [gone.get(group[0].dep.target.module, set()) for group in groups]


def test_only_channels_that_all_their_tasks_rank_low_go() -> None:
    """Unanimity, written out: per task, percentiles over all channels it reaches; the cut is one line through them."""
    pruner = make_pruner(build("batchnorm"), pruning_ratio=0.4, options={"across": None})
    groups = all_groups(pruner)
    worst = [rows.max(0) for rows in percentiles(pruner, groups)]
    pruned, kept = [], []
    for idxs, values in zip(removed(pruner, groups), worst, strict=True):
        pruned += [v for c, v in enumerate(values) if c in idxs]
        protected = int(np.argmax(values))
        kept += [v for c, v in enumerate(values) if c not in idxs and c != protected]
    assert len(pruned) == round(0.4 * sum(len(v) for v in worst))
    assert max(pruned) <= min(kept)


@pytest.mark.parametrize("ratio", [0.25, 0.4, 0.6])
def test_across_decides_how_many_go_and_the_arbiter_which(ratio: float) -> None:
    alone = make_pruner(build("batchnorm"), pruning_ratio=ratio, options={"arbiter": "mean"})
    both = make_pruner(build("batchnorm"), pruning_ratio=ratio)
    plain = make_pruner(build("batchnorm"), pruning_ratio=ratio, options={"across": None})
    groups = all_groups(both)
    found = removed(both, groups)
    assert [len(gone) for gone in found] == [len(gone) for gone in removed(alone, all_groups(alone))]
    for gone, rows in zip(found, percentiles(both, groups), strict=True):
        assert gone == set(np.argsort(rows.max(0), kind="stable")[: len(gone)].tolist())
    assert found != removed(plain, all_groups(plain))


def test_a_private_head_is_judged_by_its_own_task() -> None:
    def other_scale(model: nn.Module, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        out = losses(model, batch)
        return {"dense": out["dense"], "label": 1e6 * out["label"]}

    model = build("batchnorm")
    pruner = make_pruner(model)
    groups = list(pruner.DG.get_all_groups(pruner.ignored_layers, pruner.root_module_types))
    tasks = {
        dep.target.name.split()[0]: set(pruner.importance.task_scores(group))
        for group in groups
        for dep, _ in group
        if pruner.DG.is_out_channel_pruning_fn(dep.handler)
    }
    assert tasks["dense.0"] == {"dense"}
    assert tasks["hidden"] == {"label"}
    assert tasks["stem"] == {"dense", "label"}
    chosen = [sorted(g[0].idxs) for g in pruner.step(interactive=True)]
    scaled = make_pruner(build("batchnorm"), options={"rescore": (other_scale, batches())})
    assert [sorted(g[0].idxs) for g in scaled.step(interactive=True)] == chosen


def test_one_task_scores_as_taylor_of_torch_pruning() -> None:
    """With one task, weights only and no normalisation, the score is tp's TaylorImportance."""

    def one(model: nn.Module, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        out = model(batch)
        return {"only": out["dense"].square().mean() + out["label"].square().mean()}

    model, batch = build("batchnorm"), batches(1)
    weights = [
        key for key in channel_parameters(model) if isinstance(key[0], nn.Conv2d | nn.ConvTranspose2d | nn.Linear)
    ]
    importance = DiSparseImportance(score_tasks(model, one, batch, parameters=weights), normalizer=None)
    one(model, batch[0])["only"].backward()
    theirs = tp.importance.GroupTaylorImportance(normalizer=None, target_types=[nn.modules.conv._ConvNd, nn.Linear])
    graph = tp.DependencyGraph().build_dependency(model, (batch[0],))
    compared = 0
    for group in graph.get_all_groups():
        ours = importance.task_scores(group)["only"]
        torch.testing.assert_close(ours, theirs(group).double(), rtol=1e-4, atol=1e-9)
        compared += 1
    assert compared == 11


def test_iterative_steps_score_afresh_and_reach_the_ratio() -> None:
    calls: list[int] = []

    def counted(model: nn.Module, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        calls.append(model.stem.out_channels)
        return losses(model, batch)

    model = build("batchnorm")
    pruner = make_pruner(model, options={"rescore": (counted, batches(1))}, iterative_steps=3, pruning_ratio=0.6)
    before = kept_units(pruner)
    for _ in range(3):
        soft = prune(pruner)
        assert deviation(soft, model) < 1e-5
    assert len(calls) == 3
    assert calls[2] <= calls[1] <= calls[0]
    assert abs(kept_units(pruner) / before - 0.4) * before <= 1


def test_stale_scores_are_an_error_and_leave_the_model_whole() -> None:
    model = build("batchnorm")
    scores = score_tasks(model, losses, batches(), parameters=channel_parameters(model))
    pruner = make_pruner(model, options={"rescore": None, "scores": scores}, iterative_steps=2)
    pruner.step()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="stale"):
        pruner.step()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    with pytest.raises(ValueError, match="stale"):
        DiSparseImportance(scores)(next(iter(pruner.DG.get_all_groups())))


@pytest.mark.parametrize("cls", PRUNERS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("kind", ["upsampled", "transformer"])
def test_every_pruner_of_torch_pruning(cls: Any, kind: str) -> None:
    model = build(kind)
    pruner = make_pruner(model, cls=cls)
    before = kept_units(pruner)
    if hasattr(pruner, "update_reg"):
        pruner.update_reg()
    sum(losses(model, batches()[0]).values()).backward()
    if cls is not tp.pruner.BasePruner:
        pruner.regularize(model)
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    soft = prune(pruner)
    assert abs(kept_units(pruner) / before - 0.5) * before <= 1
    assert deviation(soft, model) < 1e-5


@pytest.mark.parametrize(
    "arguments",
    [
        {"isomorphic": True},
        {"round_to": 4},
        {"round_to": 4, "global_pruning": False},
        {"max_pruning_ratio": 0.5, "pruning_ratio": 0.45},
        {"iterative_steps": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["batchnorm", "grouped", "groupnorm", "transformer"])
def test_options_of_the_pruner(kind: str, arguments: dict[str, Any]) -> None:
    model = build(kind)
    pruner = make_pruner(model, **arguments)
    before = kept_units(pruner)
    soft = prune(pruner)
    assert kept_units(pruner) < before
    assert deviation(soft, model) < 1e-5
    if "round_to" in arguments:
        changed = [m for m, n in pruner.layer_init_out_ch.items()
                   if isinstance(m, nn.Conv2d) and pruner.DG.get_out_channels(m) < n]  # fmt: skip
        assert changed
        assert all(pruner.DG.get_out_channels(m) % 4 == 0 for m in changed)


def test_pruning_ratio_dict_and_ignored_layers() -> None:
    model = build("batchnorm")
    block = model.blocks[0]
    pruner = make_pruner(
        model,
        pruning_ratio_dict={block.conv1: 0.75, (model.hidden, model.dense): 0.25},
        ignored_layers=[model.blocks[1].conv2],
    )
    soft = prune(pruner)
    assert block.conv1.out_channels == 8
    assert model.hidden.out_features + model.dense[0].out_channels == 30
    assert model.blocks[1].conv2.out_channels == 32
    assert deviation(soft, model) < 1e-5


def test_unwrapped_parameters_follow() -> None:
    model = build("transformer")
    pruner = make_pruner(model, unwrapped_parameters=[(model.position, 2)])
    prune(pruner)
    assert model.position.shape == (1, 16, model.patch.out_channels)
    assert model.patch.out_channels < 32


def test_without_attaching() -> None:
    """Ratio and equality hold on a plain network, and LayerNorm is repaired, without a word to the pruner."""
    model = build("batchnorm")
    importance = DiSparseImportance(rescore=(losses, batches()))
    ignored = [model.dense_out, model.label_out]
    pruner = tp.pruner.BasePruner(
        model, (batches()[0],), importance=importance, global_pruning=True, ignored_layers=ignored
    )
    before = kept_units(pruner)
    soft = prune(pruner)
    assert abs(kept_units(pruner) / before - 0.5) * before <= 1
    assert deviation(soft, model) < 1e-5


def test_groups_that_no_task_reaches_are_left_alone() -> None:
    def only_label(model: nn.Module, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"label": model(batch)["label"].square().mean()}

    model = build("batchnorm")
    with pytest.warns(UserWarning, match="reached by no task"):
        pruner = make_pruner(model, options={"rescore": (only_label, batches(1))}, cls=tp.pruner.GroupNormPruner)
    with pytest.warns(UserWarning, match="reached by no task"):
        pruner.step()
    assert model.dense[0].out_channels == 16
    assert model.hidden.out_features < 24 or model.stem.out_channels < 16


def test_groups_are_told_apart_that_nobody_scored() -> None:
    model = build("batchnorm")
    importance = DiSparseImportance(rescore=(losses, batches(1)), parameters=[(model.stem, "weight")])
    pruner = tp.pruner.BasePruner(model, (batches()[0],), importance=importance, global_pruning=True)
    importance.attach(pruner)
    pruner.step()
    assert importance.skipped["hidden"] == "has no scored parameter"
    assert "stem" not in importance.skipped


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "found neither"),
        ({"rescore": losses}, "pair"),
        ({"scores": 3}, "TaskScores"),
        ({"rescore": (losses, []), "reduction": "median"}, "reduction"),
        ({"rescore": (losses, []), "normalizer": "lamp"}, "normalizer"),
        ({"rescore": (losses, []), "arbiter": "nobody"}, "arbiter"),
        ({"rescore": (losses, []), "across": "nobody"}, "across"),
        ({"rescore": (losses, []), "criterion": "nothing"}, "criterion"),
    ],
)
def test_bad_options(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        DiSparseImportance(**arguments)


def test_settings_of_a_pruner_that_cannot_work() -> None:
    with pytest.raises(ValueError, match="isomorphic"):
        make_pruner(build("batchnorm"), isomorphic=True, global_pruning=False)
    with pytest.raises(ValueError, match="below 1"):
        make_pruner(build("batchnorm"), pruning_ratio=1.0)
    importance = DiSparseImportance(rescore=(losses, batches()))
    with pytest.raises(ValueError, match="this importance"):
        importance.attach(make_pruner(build("batchnorm")))


def test_scores_that_are_not_finite_stop_the_step() -> None:
    def broken(model: nn.Module, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {**losses(model, batch), "label": model(batch)["label"].mean() * torch.nan}

    model = build("batchnorm")
    pruner = make_pruner(model, options={"rescore": (broken, batches(1))})
    with pytest.raises(ValueError, match="finite"):
        pruner.step()
    assert model.stem.out_channels == TwoTasks().stem.out_channels


@pytest.mark.parametrize("given", [False, True], ids=["rescore", "scores and rescore"])
def test_invalidate_scores_afresh(given: bool) -> None:
    calls: list[int] = []

    def counted(model: nn.Module, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        calls.append(1)
        return losses(model, batch)

    model = build("batchnorm")
    scores = score_tasks(model, losses, batches(), parameters=channel_parameters(model)) if given else None
    pruner = make_pruner(model, options={"rescore": (counted, batches(1)), "scores": scores})
    group = all_groups(pruner)[0]
    first = 0 if given else 1
    for _ in range(2):
        pruner.importance.task_scores(group)
        assert len(calls) == first
    for more in (1, 2):
        pruner.importance.invalidate()
        pruner.importance.task_scores(group)
        assert len(calls) == first + more


def test_a_masked_model_is_refused_before_anything_is_cut() -> None:
    model = build("batchnorm")
    pruner = make_pruner(model)
    torch.nn.utils.prune.l1_unstructured(model.down, "weight", 0.3)
    with pytest.raises(ValueError, match="must carry no masks"):
        pruner.importance.attach(pruner)
