"""The sub-network of some tasks: the union of their own masks, or a refusal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils import prune

from disparse_plugin import DiSparseStatic, disparse_pretrained, disparse_static, score_tasks
from disparse_plugin.masks import attach_masks, keep_tasks, masks_of
from layouts import build, kept_entries, layouts, oracle
from masks import equal_masks
from networks import TwoHeads, digit_batches, digit_losses


@pytest.fixture
def model():
    return TwoHeads().eval()


@given(layouts(), st.integers(0, 45), st.data())
def test_it_is_the_union_of_the_chosen_tasks_own_masks(layout, count, data):
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
    expected = {entry for entry in whole if max(percentiles[entry].get(task, -1) for task in chosen) >= max(cut, 1e-9)}
    assert kept_entries(keep_tasks(model, scores, chosen), scores.parameters) == expected


def test_all_tasks_keep_everything(model):
    scores = disparse_static(model, digit_losses, digit_batches(), 0.9)
    masks = keep_tasks(model, scores, ["a", "b"])
    named = {name: masks[key] for name, key in zip(scores.names, scores.parameters, strict=True)}
    assert equal_masks(named, masks_of(model))


def test_a_carved_task_keeps_its_output(model):
    scores = disparse_static(model, digit_losses, digit_batches(), 0.5)
    attach_masks(model, keep_tasks(model, scores, ["a"]))
    assert (model.heads["b"].weight == 0).all()
    assert (model.heads["a"].weight != 0).any()


def test_masks_cut_by_sums_of_shares_are_refused_with_the_way_out(model):
    scores = disparse_pretrained(model, digit_losses, digit_batches(), 0.9)
    with pytest.raises(ValueError, match=r"by the unanimous rule, found that .* prune with arbiter='unanimous'"):
        keep_tasks(model, scores, ["a"])


def test_masks_of_other_scores_are_refused(model):
    scores = score_tasks(model, digit_losses, digit_batches())
    prune.random_unstructured(model.trunk[3], "weight", 0.5)
    with pytest.raises(ValueError, match="scores: must be those that the model was pruned with"):
        keep_tasks(model, scores, ["a"])
    for tasks, found in ((["c"], "found c"), ([], "found none")):
        with pytest.raises(ValueError, match=f"tasks: must be some of a, b, {found}"):
            keep_tasks(model, scores, tasks)
