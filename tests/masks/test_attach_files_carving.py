"""Masks survive copies, checkpoints and files; and the report counts them."""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from disparse_plugin import DiSparseStatic, disparse_static, score_tasks
from disparse_plugin.masks import (
    apply_masks,
    attach_masks,
    clone_pruned,
    fold,
    keep_tasks,
    load_masks,
    masks_of,
    save_masks,
    sparsity_report,
)
from layouts import build, kept_entries, layouts, oracle
from networks import PartlyShared, Snapshot, TwoHeads, digit_batches, digit_losses, square_losses, vectors


@pytest.fixture
def model():
    return TwoHeads().eval()


@pytest.fixture
def pruned(model):
    disparse_static(model, digit_losses, digit_batches(), 0.9)
    return model


def outputs(model):
    with torch.no_grad():
        return torch.cat(list(model.eval()(digit_batches(1)[0][0]).values()))


def equal_masks(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class TestClone:
    def test_right_after_pruning(self, pruned):
        before = Snapshot(pruned)
        twin = clone_pruned(pruned)
        before.check()
        assert torch.equal(outputs(twin), outputs(pruned))
        assert equal_masks(masks_of(twin), masks_of(pruned))
        assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in pruned.parameters()}

    def test_the_copy_can_be_copied_by_deepcopy(self, pruned):
        again = copy.deepcopy(clone_pruned(pruned))
        assert torch.equal(outputs(again), outputs(pruned))

    def test_the_copy_trains_on_its_own(self, pruned):
        twin, before = clone_pruned(pruned), outputs(pruned)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        sum(digit_losses(twin, digit_batches(1)[0]).values()).backward()
        optimizer.step()
        assert torch.equal(outputs(pruned), before)
        assert not torch.equal(outputs(twin), before)

    def test_a_dense_model(self, model):
        assert torch.equal(outputs(clone_pruned(model)), outputs(model))


class TestAttach:
    def test_a_checkpoint_of_a_pruned_model_loads_strictly(self, pruned):
        fresh = TwoHeads().eval()
        with pytest.raises(RuntimeError, match="weight_mask"):
            fresh.load_state_dict(pruned.state_dict())
        attach_masks(fresh, masks_of(pruned))
        fresh.load_state_dict(pruned.state_dict())
        assert torch.equal(outputs(fresh), outputs(pruned))

    def test_a_folded_model_loads_strictly_into_a_dense_one(self, pruned):
        expected = outputs(pruned)
        fresh = TwoHeads().eval()
        fresh.load_state_dict(fold(pruned).state_dict())
        assert torch.equal(outputs(fresh), expected)

    def test_an_existing_mask_is_replaced_in_place(self, pruned):
        layer = pruned.trunk[0]
        buffer, hooks = layer.weight_mask, list(layer._forward_pre_hooks.values())
        attach_masks(pruned, {(layer, "weight"): ~masks_of(pruned)["trunk.0.weight"]})
        assert layer.weight_mask is buffer
        assert list(layer._forward_pre_hooks.values()) == hooks
        assert torch.equal(layer.weight, layer.weight_orig * layer.weight_mask)

    @pytest.mark.parametrize(
        ("masks", "error", "message"),
        [
            ({"nothing.weight": torch.ones(1).bool()}, ValueError, "found nothing.weight which is not"),
            ({(nn.Linear(2, 2), "weight"): torch.ones(2, 2).bool()}, ValueError, r"found \(Linear, 'weight'\)"),
            ({"trunk.0.weight": torch.ones(6, 1, 3, 3)}, TypeError, "must be a bool tensor, found torch.float32"),
            ({"trunk.0.weight": torch.ones(3).bool()}, ValueError, r"shape \(6, 1, 3, 3\), found \(3,\)"),
        ],
    )
    def test_what_does_not_fit_changes_nothing(self, model, masks, error, message):
        masks = {"trunk.3.weight": torch.ones(6, 6, 3, 3).bool(), **masks}
        before = Snapshot(model)
        for function in (attach_masks, apply_masks):
            with pytest.raises(error, match=message):
                function(model, masks)
        before.check()


def test_an_average_takes_the_masks_of_the_model(pruned):
    average = TwoHeads().eval()
    apply_masks(average, pruned)
    assert not prune.is_pruned(average)
    weights = dict(average.named_parameters())
    for name, mask in masks_of(pruned).items():
        assert (weights[name][~mask] == 0).all()
        assert (weights[name][mask] != 0).all()


def test_fold_leaves_a_plain_model(pruned):
    before = outputs(pruned)
    assert fold(pruned) is pruned
    assert not prune.is_pruned(pruned)
    assert set(pruned.state_dict()) == set(TwoHeads().state_dict())
    assert torch.equal(outputs(pruned), before)


class TestKeepTasks:
    @given(layouts(), st.integers(0, 45), st.data())
    def test_it_is_the_union_of_the_chosen_tasks_own_masks(self, layout, count, data):
        tables, sizes = layout
        chosen = data.draw(st.lists(st.sampled_from(sorted(tables)), min_size=1, unique=True))
        model, scores = build(tables, sizes)
        prune.global_unstructured(
            scores.parameters, DiSparseStatic, importance_scores=scores.importance(), amount=min(count, sum(sizes))
        )
        reference = oracle(tables, sizes)
        whole = reference.kept(min(count, sum(sizes)), "unanimous")
        percentiles = reference.percentiles()
        agreement = {entry: max(percentiles[entry].values()) for entry in percentiles}
        cut = max((agreement[entry] for entry in percentiles if entry not in whole), default=0)
        expected = {
            entry for entry in whole if max(percentiles[entry].get(task, -1) for task in chosen) >= max(cut, 1e-9)
        }
        assert kept_entries(keep_tasks(model, scores, chosen), scores.parameters) == expected

    def test_all_tasks_keep_everything(self, model):
        scores = disparse_static(model, digit_losses, digit_batches(), 0.9)
        masks = keep_tasks(model, scores, ["a", "b"])
        named = {name: masks[key] for name, key in zip(scores.names, scores.parameters, strict=True)}
        assert equal_masks(named, masks_of(model))

    def test_a_carved_task_keeps_its_output(self, model):
        scores = disparse_static(model, digit_losses, digit_batches(), 0.5)
        attach_masks(model, keep_tasks(model, scores, ["a"]))
        assert (model.heads["b"].weight == 0).all()
        assert (model.heads["a"].weight != 0).any()

    def test_masks_of_other_scores_are_refused(self, model):
        scores = score_tasks(model, digit_losses, digit_batches())
        prune.random_unstructured(model.trunk[3], "weight", 0.5)
        with pytest.raises(ValueError, match="scores: must be those that the model was pruned with"):
            keep_tasks(model, scores, ["a"])
        for tasks, found in ((["c"], "found c"), ([], "found none")):
            with pytest.raises(ValueError, match=f"tasks: must be some of a, b, {found}"):
                keep_tasks(model, scores, tasks)


class TestFiles:
    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / "masks.safetensors"

    def test_round_trip(self, pruned, path):
        facts = {"method": "DiSparseStatic", "criterion": "snip", "amount": 0.9, "tasks": ["a", "b"]}
        save_masks(pruned, path, facts=facts)
        fresh = TwoHeads()
        assert load_masks(fresh, path) == facts
        assert equal_masks(masks_of(fresh), masks_of(pruned))

    def test_masks_take_one_bit_per_weight(self, path):
        model = nn.Sequential(nn.Linear(400, 400))
        prune.random_unstructured(model[0], "weight", 0.5)
        save_masks(model, path)
        assert path.stat().st_size < 400 * 400 / 8 + 1000

    def test_masks_of_single_tasks(self, model, path):
        scores = disparse_static(model, digit_losses, digit_batches(), 0.9)
        own = keep_tasks(model, scores, ["b"])
        save_masks(model, path, tasks={"b": own})
        fresh = TwoHeads()
        load_masks(fresh, path, task="b")
        assert equal_masks(masks_of(fresh), {n: own[k] for n, k in zip(scores.names, scores.parameters, strict=True)})
        with pytest.raises(ValueError, match=r"task: must be one of \['b'\] stored in .*, found 'a'"):
            load_masks(fresh, path, task="a")

    def test_what_does_not_fit_changes_nothing(self, pruned, path):
        save_masks(pruned, path)
        other, wider = nn.Sequential(nn.Linear(2, 2)), TwoHeads(width=7)
        marked = TwoHeads()
        prune.random_unstructured(marked.trunk[0], "bias", 1)
        cases = [
            (other, "every name must be a parameter of the model"),
            (wider, "must have the shape"),
            (marked, r"model: must carry no other masks .* \(first: trunk.0.bias\)"),
        ]
        for model, message in cases:
            before = Snapshot(model)
            with pytest.raises(ValueError, match=message):
                load_masks(model, path)
            before.check()

    def test_files_of_another_kind(self, pruned, path):
        score_tasks(pruned, digit_losses, digit_batches()).save(path)
        with pytest.raises(
            ValueError, match=r"must be a file of kind 'disparse_plugin\.masks', found 'disparse_plugin"
        ):
            load_masks(TwoHeads(), path)
        with pytest.raises(ValueError, match="model: must carry at least one mask, found none"):
            save_masks(TwoHeads(), path)


class TestReport:
    def test_counts_masks_not_zeros(self, pruned):
        with torch.no_grad():
            pruned.heads["a"].weight_orig.zero_()
        report = sparsity_report(pruned)
        total = sum(layer.weight_mask.numel() for layer in (pruned.trunk[0], pruned.trunk[3], *pruned.heads.values()))
        assert (report.total, report.alive) == (total, total - round(0.9 * total))
        assert report.all_parameters == sum(parameter.numel() for parameter in pruned.parameters())
        assert report.sparsity == pytest.approx(0.9, abs=1e-3)
        assert report.sparsity_of_all == pytest.approx(round(0.9 * total) / report.all_parameters)

    def test_parts_follow_the_tasks(self):
        model = PartlyShared()
        with pytest.warns(UserWarning, match="no task"):
            scores = disparse_static(model, square_losses, vectors(), 0.5)
        report = sparsity_report(model, scores)
        assert list(report.parts) == ["a + b + c", "a + b", "a", "b", "c", "d", "no task"]
        assert report.parts["no task"] == (25, 25)
        assert sum(alive for alive, _ in report.parts.values()) == report.alive
        text = str(report)
        assert all(part in text for part in report.parts)
        assert "abc.weight" in text

    def test_flops_are_those_of_the_forward_times_density(self, pruned):
        report = sparsity_report(pruned, example_inputs=(digit_batches(1)[0][0],))
        by_name = {layer.name: layer for layer in report.layers}
        assert by_name["trunk.3.weight"].flops == 2 * 4 * 6 * 6 * 9 * 16
        assert by_name["heads.a.weight"].flops == 2 * 4 * 96 * 3
        sparse, dense = report.theoretical_flops
        assert sparse == pytest.approx(sum(layer.flops * layer.alive / layer.total for layer in report.layers))
        assert f"of {dense:,} (" in str(report)
        assert sparsity_report(pruned).theoretical_flops is None

    def test_plain_values(self, pruned):
        report = sparsity_report(pruned)
        assert json.loads(json.dumps(report.to_dict()))["prunable"]["alive"] == report.alive
        assert [row["name"] for row in report.rows()] == [layer.name for layer in report.layers]

    def test_nothing_to_report(self):
        with pytest.raises(ValueError, match="model: must have a prunable parameter"):
            sparsity_report(nn.BatchNorm1d(3))
