"""Under torchrun with gloo: equal masks on all ranks, equal to one process on all data, and failures on all ranks."""

import pytest
import torch

from disparse_plugin import score_tasks
from distributed_worker import (
    STEPS,
    gradually,
    model_and_shards,
    scheduled,
    some_tasks,
    square_losses,
    train,
    used_parameters,
)
from places import HELPERS, python
from runs import masks_of

SCENARIOS = [
    "score",
    "dynamic",
    "uneven_shards",
    "failing_rank",
    "nan_on_one_rank",
    "other_seed",
    "other_options",
    "unequal_weights",
    "uneven_accumulation",
    "missing_tasks",
    "random_growth",
    "gradual",
    "skipped_step",
    "other_fraction",
    "other_amount",
    "checkpoints_of_different_steps",
    "no_batch",
    "bad_argument",
    "losses_that_call_the_wrapper",
    "other_one_shot_amount",
    "bad_one_shot_amount",
    "bad_one_shot_criterion",
    "other_criterion",
    "other_parameters",
    "drifted_weights",
    "channels",
    "bad_inputs_for_channels",
    "bad_channel_option",
    "channels_that_do_not_reach",
    "other_channel_amount",
    "other_channel_steps",
    "failing_between_steps",
    "measured_channels",
]
TOGETHER = ["score", "dynamic", "missing_tasks", "random_growth", "gradual"]


def torchrun(ranks, scenarios, folder):
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return python(*command, HELPERS / "distributed_worker.py", ",".join(scenarios), folder, timeout=120)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def results(request, tmp_path_factory):
    """One launch for all scenarios; that the later ones work shows that failures leave the group in order."""
    folder = tmp_path_factory.mktemp("ranks")
    process = torchrun(request.param, SCENARIOS, folder)
    assert process.returncode == 0, process.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("scenario", TOGETHER)
def test_all_ranks_have_the_same_masks(results, scenario):
    first = results[0][scenario]["masks"]
    assert any(bool((mask == 0).any()) for mask in first.values())
    assert all(equal(first, other[scenario]["masks"]) for other in results[1:])


def test_scores_are_those_of_one_process_on_all_data(results):
    model, shards = model_and_shards(len(results))
    everything = [batch for shard in shards for batch in shard]
    scores = score_tasks(model, square_losses, everything, parameters=used_parameters(model))
    expected = dict(zip(scores.names, scores.masks(0.6).values(), strict=True))
    assert equal(results[0]["score"]["masks"], expected)


@pytest.mark.parametrize(
    ("scenario", "losses", "options"),
    [
        ("dynamic", square_losses, {}),
        ("missing_tasks", some_tasks, {}),
        ("random_growth", square_losses, {"criterion": "random"}),
    ],
)
def test_sparse_training_is_that_of_one_process_on_all_data(results, scenario, losses, options):
    model, shards = model_and_shards(len(results))
    optimizer, scheduler = scheduled(model, losses, **options)
    start = masks_of(model)
    train(model, optimizer, scheduler, [[shard[step] for shard in shards] for step in range(STEPS)])
    assert not equal(start, masks_of(model))
    assert equal(results[0][scenario]["masks"], masks_of(model))


def test_gradual_pruning_is_that_of_one_process_on_all_data(results):
    model, shards = model_and_shards(len(results))
    optimizer, pruning = gradually(model)
    train(model, optimizer, pruning, [[shard[step] for shard in shards] for step in range(STEPS)])
    assert equal(results[0]["gradual"]["masks"], masks_of(model))


def test_all_ranks_remove_the_same_channels(results):
    first = results[0]["channels"]["gone"]
    assert len(first[0]) == 4
    assert all(other["channels"]["gone"] == first for other in results[1:])


@pytest.mark.parametrize(
    ("scenario", "failing", "own", "others"),
    [
        ("uneven_accumulation", None, "ValueError: data: must be the same on all ranks, found [1, 2", None),
        ("uneven_shards", None, "ValueError: data: must be the same on all ranks, found [6, 5", None),
        (
            "failing_rank",
            1,
            "KeyError: 'labels'",
            "RuntimeError: distributed: all ranks must",
        ),
        ("nan_on_one_rank", -1, "NonFiniteError: losses: every loss must be finite", "RuntimeError: distributed: all"),
        ("other_seed", None, "ValueError: masks: must be the same on all ranks", None),
        ("other_options", None, "ValueError: settings: must be the same on all ranks", None),
        ("unequal_weights", None, "ValueError: masks: must be the same on all ranks", None),
        ("losses_that_call_the_wrapper", None, "ValueError: losses: must run the model that they are given, fou", None),
        ("skipped_step", None, "ValueError: step: all ranks must have completed the same number of optimizer s", None),
        ("other_fraction", None, "ValueError: drop_fraction: must be the same on all ranks, found [0.0, 0.5", None),
        ("other_amount", None, "ValueError: amount: must be the same on all ranks, found [63, 76", None),
        ("checkpoints_of_different_steps", None, "ValueError: step: all ranks must have completed the same numb", None),
        ("other_one_shot_amount", None, "ValueError: amount: must be the same on all ranks, found [0.5, 0.6", None),
        ("bad_one_shot_amount", 1, "ValueError: amount: a float must be", "RuntimeError: distributed: all ranks must"),
        ("bad_one_shot_criterion", 1, "ValueError: criterion: must be one of", "RuntimeError: distributed: all ranks"),
        ("other_criterion", None, "ValueError: criterion: must be the same on all ranks, found ['taylor', 'fish", None),
        ("other_parameters", None, "ValueError: parameters: must be the same on all ranks, found", None),
        ("drifted_weights", None, "ValueError: model: must be the same on all ranks, found ab.weight to differ", None),
        ("no_batch", 1, "TypeError: batch: step() needs the batch", "RuntimeError: distributed: all ranks must"),
        ("bad_inputs_for_channels", 1, "ValueError: example_inputs:", "RuntimeError: distributed: all ranks must succ"),
        ("bad_channel_option", 1, "ValueError: round_to: must be a positive int", "RuntimeError: distributed: all ran"),
        ("channels_that_do_not_reach", 1, "ValueError: amount: ", "RuntimeError: distributed: all ranks must succ"),
        ("other_channel_amount", None, "ValueError: channels: must be the same on all ranks, found ['", None),
        (
            "other_channel_steps",
            None,
            "ValueError: steps: must be the same on all ranks, found [[1.0], [0.5",
            None,
        ),
        ("failing_between_steps", 1, "KeyError: 'between'", "RuntimeError: distributed: all ranks must succeed"),
        ("measured_channels", None, "ValueError: of: must be counted, not measured, on several ranks", None),
        (
            "bad_argument",
            1,
            "TypeError: seed: must be an int, found str",
            "RuntimeError: distributed: all ranks must succeed",
        ),
    ],
)
def test_a_failure_is_an_error_on_all_ranks(results, scenario, failing, own, others):
    failing = None if failing is None else failing % len(results)
    for rank, result in enumerate(results):
        expected = own if failing in (None, rank) else others
        assert str(result[scenario]).startswith(expected)


def test_a_rank_that_dies_ends_the_run(tmp_path):
    assert torchrun(2, ["dying_rank"], tmp_path).returncode != 0
