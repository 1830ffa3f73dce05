"""Scores kept in few bits, elsewhere than their weights, or made of a few tasks at a time."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils import prune

from disparse_plugin import DiSparseStatic, TaskScores, at_least, disparse_static, score_tasks
from disparse_plugin.agreement import band
from disparse_plugin.analysis import GradientConflict
from disparse_plugin.scoring.sums import ScoreSums
from layouts import build, kept_entries, layouts, oracle
from networks import PartlyShared, TwoHeads, digit_batches, digit_losses, square_losses, vectors
from oracles.agreement import ARBITERS

TASKS = ("a", "b", "c", "d", "e")

BY_NAME = {"at_least(2)": at_least(2), "at_least(3)": at_least(3)}


def means(model, batch):
    outputs = model(batch[0])
    return {task: output.square().mean() * (1 + number) for number, (task, output) in enumerate(outputs.items())}


def same(one, other):
    assert one.tasks == other.tasks
    assert one.names == other.names
    assert (one.unreached, one.skipped, one.num_batches) == (other.unreached, other.skipped, other.num_batches)
    for task in one:
        for score, expected in zip(one[task].values(), other[task].values(), strict=True):
            assert torch.equal(score, expected)


def rounded(value):
    """The nearest number of eight significant bits, of two the even one: by whole numbers, without torch."""
    mantissa, exponent = math.frexp(value)
    return round(mantissa * 256) / 256 * 2.0**exponent


@given(
    layouts(values=st.just(st.floats(2**-20, 2**20, width=32))), st.integers(0, 45), st.sampled_from(sorted(ARBITERS))
)
def test_masks_are_those_of_the_rounded_scores(layout, count, arbiter):
    tables, sizes = layout
    model, scores = build(tables, sizes)
    kept = TaskScores(model, {task: {key: row.bfloat16() for key, row in scores[task].items()} for task in scores})
    few = {task: {index: [rounded(x) for x in row] for index, row in table.items()} for task, table in tables.items()}
    for task, table in few.items():
        for index, row in table.items():
            assert kept[task][model[index], "weight"].tolist() == [row]
    count = min(count, sum(sizes))
    rule = BY_NAME.get(arbiter, arbiter)
    assert kept_entries(kept.masks(count, rule), kept.parameters) == oracle(few, sizes).kept(count, arbiter)
    importance = kept.importance()
    masks = kept.masks(count)
    prune.global_unstructured(kept.parameters, DiSparseStatic, importance_scores=importance, amount=count)
    assert all(torch.equal(layer.weight_mask.bool(), masks[layer, "weight"]) for layer in model)


@pytest.mark.parametrize("criterion", ["snip", "magnitude", "layer_adaptive(damped(taylor, 0.5))"])
def test_sums_are_rounded_once(criterion):
    model = TwoHeads().eval()
    full = score_tasks(model, digit_losses, digit_batches(), criterion=criterion)
    half = score_tasks(model, digit_losses, digit_batches(), criterion=criterion, dtype=torch.bfloat16)
    for task in full:
        for score, kept in zip(full[task].values(), half[task].values(), strict=True):
            assert kept.dtype == torch.bfloat16
            assert torch.equal(kept, score.bfloat16())
            assert ((kept.double() - score).abs() <= score.double().abs() * 2**-8).all()


def test_files_keep_the_type(tmp_path):
    model = TwoHeads().eval()
    scores = score_tasks(model, digit_losses, digit_batches(), dtype=torch.bfloat16)
    scores.save(tmp_path / "scores")
    again = TaskScores.load(tmp_path / "scores", model)
    same(again, scores)
    assert {row.dtype for task in again for row in again[task].values()} == {torch.bfloat16}
    assert all(torch.equal(mask, again.masks(0.7)[key]) for key, mask in scores.masks(0.7).items())


def test_a_cut_by_a_sample_of_rounded_scores(monkeypatch):
    sizes = [3000, 2000, 4000]
    tables = {task: {i: torch.rand(sizes[i]).tolist() for i in (0, which)} for task, which in (("a", 1), ("b", 2))}
    model, scores = build(tables, sizes)
    kept = TaskScores(model, {task: {key: row.bfloat16() for key, row in scores[task].items()} for task in scores})
    for layer in model:
        prune.custom_from_mask(layer, "weight", torch.rand_like(layer.weight) > 0.2)
    full = kept.masks(0.8)
    monkeypatch.setattr(band, "SAMPLE", 2000)
    monkeypatch.setattr(band, "HALF_WIDTH", 0.05)
    quick = kept.masks(0.8)
    assert all(torch.equal(full[key], quick[key]) for key in full)


@pytest.mark.parametrize("at_once", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("train", [False, True])
def test_a_few_tasks_at_a_time_are_scored_as_all_at_once(at_once, train):
    model, batches = TwoHeads(TASKS).train(train), digit_batches(3)

    before = torch.get_rng_state()
    every = score_tasks(model, means, batches)
    few = score_tasks(model, means, batches, tasks_at_once=at_once)
    same(few, every)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_no_task_reaches_is_known_after_the_last():
    model = PartlyShared()
    with pytest.warns(UserWarning, match=r"1 of 7 are reached by no task's loss .*: unused.weight$") as found:
        few = score_tasks(model, square_losses, vectors(), tasks_at_once=1)
    assert len(found) == 1
    with pytest.warns(UserWarning, match="unused"):
        same(few, score_tasks(model, square_losses, vectors()))


def test_no_more_sums_are_held_than_tasks_at_once(monkeypatch):
    held, tables = [], ScoreSums.tables

    def counted(sums, *args, **options):
        held.append(len(sums.by_task))
        return tables(sums, *args, **options)

    monkeypatch.setattr(ScoreSums, "tables", counted)
    score_tasks(TwoHeads(TASKS), means, digit_batches(2), tasks_at_once=2)
    assert held == [2, 2, 1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "bfloat16"}, TypeError, r"dtype: must be a torch.dtype or None, found"),
        ({"dtype": torch.float16}, ValueError, r"dtype: must be one of torch.bfloat16, .*, found torch.float16"),
        ({"device": "nowhere"}, RuntimeError, r"device: must be a device or None, found"),
        ({"tasks_at_once": 0}, ValueError, r"tasks_at_once: "),
        ({"tasks_at_once": 1.5}, TypeError, r"tasks_at_once: "),
        (
            {"tasks_at_once": 1, "data": iter(digit_batches())},
            ValueError,
            "data: must be readable again",
        ),
    ],
)
def test_bad_options(options, error, message):
    model = TwoHeads()
    data = options.pop("data", digit_batches())
    with pytest.raises(error, match=message):
        score_tasks(model, digit_losses, data, **options)


def test_an_observer_needs_all_tasks():
    with pytest.raises(ValueError, match=r"observe: must be None with tasks_at_once"):
        score_tasks(TwoHeads(), digit_losses, digit_batches(), observe=GradientConflict(), tasks_at_once=1)


def test_scores_kept_on_the_host_cut_weights_where_they_are(accelerator):
    model = TwoHeads().eval().to(accelerator)
    batches = [tuple(part.to(accelerator) for part in batch) for batch in digit_batches()]
    disparse_static(model, digit_losses, batches, 0.3)
    there = score_tasks(model, digit_losses, batches)
    here = score_tasks(model, digit_losses, batches, device="cpu", dtype=torch.float32)
    assert {row.device.type for task in here for row in here[task].values()} == {"cpu"}
    for options in ({"amount": 0.6}, {"amount": 0.5, "pattern": "channels"}, {"amount": 0.5, "min_keep": 3}):
        for key, mask in here.masks(**options).items():
            assert mask.device.type == accelerator.type
            assert torch.equal(mask.cpu(), there.masks(**options)[key].cpu())
    for key, value in here.importance(min_keep=2).items():
        assert value.device.type == accelerator.type
        assert torch.equal(value.cpu(), there.importance(min_keep=2)[key].cpu())


@pytest.mark.parametrize("options", [{"device": "cpu"}, {"device": "cpu", "dtype": torch.bfloat16, "tasks_at_once": 1}])
def test_no_wait_in_the_loop_for_scores_kept_on_the_host(device, waits, options):
    model, found = TwoHeads().to(device), []

    class Watched:
        def __iter__(self):
            for images, labels in digit_batches(3):
                batch = images.to(device), labels.to(device)
                waits.clear()
                yield batch
                found.append(dict(waits))

    score_tasks(model, digit_losses, Watched(), **options)
    assert found == [{}] * len(found)
    assert len(found) in (3, 6)


@pytest.mark.parametrize("at_once", [None, 1])
def test_scores_on_their_way_to_the_host_are_waited_for_once(device, waits, at_once):
    model = TwoHeads().to(device)
    batches = [tuple(part.to(device) for part in batch) for batch in digit_batches()]
    waited = []
    for options in ({}, {"device": "cpu"}):
        waits.clear()
        score_tasks(model, digit_losses, batches, tasks_at_once=at_once, **options)
        waited.append(Counter(place.partition(" ")[2] for place in waits.elements()))
    assert waited[1]["synchronize"] == 1  # not once for each tensor
    assert waited[1].total() <= waited[0].total() + 1


@pytest.mark.parametrize("other", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_row_of_few_bits_leaves_the_others_as_precise_as_they_are(other):
    layer = torch.nn.Linear(4, 1)
    key = (layer, "weight")
    layer.weight.data = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    tiny = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64) * 1e-50  # zeros in single precision
    scores = TaskScores(layer, {"a": {key: tiny}, "b": {key: torch.ones(1, 4, dtype=other)}})
    # Of the equal scores of b the smaller weight is the lower, so the two tasks order the weights the other way round.
    assert scores.masks(2)[key].tolist() == [[True, False, False, True]]
