"""The null models, the ceiling, and the watershed that is judged against them."""

import collections
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from disparse_plugin import layer_adaptive, score_tasks
from disparse_plugin.analysis import (
    Controls,
    Overlap,
    Stratum,
    TaskOverlap,
    overlap_with_controls,
    own_masks,
    task_overlap,
)
from disparse_plugin.analysis.change_point import find_drop
from layouts import build
from networks import Snapshot, TwoHeads, digit_batches, digit_losses


class Tower(nn.Module):
    """Two trunk layers and heads that all start from the same weights, so that tasks differ only by their labels."""

    def __init__(self, tasks):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh())
        head = nn.Linear(24, 4)
        self.heads = nn.ModuleDict({task: nn.Linear(24, 4) for task in tasks})
        for other in self.heads.values():
            other.load_state_dict(head.state_dict())


def tower_losses(labels_of):
    def losses(model, batch):
        features = model.trunk(batch[0])
        return {task: F.cross_entropy(model.heads[task](features), batch[column]) for task, column in labels_of.items()}

    return losses


def labelled(count=8, size=6, seed=0):
    """Batches of vectors with two sets of labels that have nothing to do with each other."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 12, generator=generator), *torch.randint(4, (2, size), generator=generator))
        for _ in range(count)
    ]


def kappas(layers):
    return [layer.kappa for layer in layers]


def test_the_observed_part_is_that_of_scoring_once():
    model, data = TwoHeads().eval(), digit_batches(6)
    plain = task_overlap(score_tasks(model, digit_losses, data), 0.7)
    found = overlap_with_controls(model, digit_losses, data, 0.7, groups=3)
    np.testing.assert_allclose(kappas(found), kappas(plain), atol=0.02)  # sums in another order may swap near-ties
    assert found.names == plain.names
    assert [layer.kept_by for layer in found.private] == [layer.kept_by for layer in plain.private]


@pytest.mark.parametrize("criterion", ["snip", "magnitude", layer_adaptive("taylor")])
def test_identical_tasks_reach_the_ceiling_exactly(criterion):
    model = Tower(["a", "b"])
    found = overlap_with_controls(
        model, tower_losses({"a": 1, "b": 1}), labelled(), 0.8, criterion=criterion, resamples=3
    )
    assert kappas(found.controls.across) == pytest.approx(kappas(found.controls.ceiling))
    assert found.controls.relative_agreement() == pytest.approx([1.0] * 2)
    assert kappas(found) == pytest.approx([1.0] * 2)
    assert found.watershed() is None


def test_the_ceiling_is_scoring_both_halves():
    model, data = Tower(["a", "b"]), labelled()
    losses = tower_losses({"a": 1, "b": 2})
    found = overlap_with_controls(model, losses, data, 0.8, groups=4).controls
    # Groups of two batches; every other group makes one half.
    halves = [[batch for start in starts for batch in data[start : start + 2]] for starts in ((0, 4), (2, 6))]
    one, other = (task_overlap_masks(model, losses, half) for half in halves)
    for place, layer in enumerate(found.ceiling):
        both = [int((one[task][place] & other[task][place]).sum()) for task in "ab"]
        assert [stratum.kept_by[2] for stratum in layer.strata] == both
        crossed = [int((one[s][place] & other[t][place]).sum()) for s, t in ("ab", "ba")]
        assert [stratum.kept_by[2] for stratum in found.across[place].strata] == crossed


def task_overlap_masks(model, losses, batches):
    scores = score_tasks(model, losses, batches)
    return {task: list(masks.values()) for task, masks in own_masks(scores, 0.8).items()}


def test_labels_that_matter_show_between_observed_and_permuted():
    """Each task's labels pick its own half of the inputs; without labels the two tasks look more alike."""
    generator = torch.Generator().manual_seed(0)
    data = []
    for _ in range(8):
        x = torch.randn(32, 12, generator=generator)
        data.append((x, x[:, :4].argmax(1), x[:, 4:8].argmax(1)))
    found = overlap_with_controls(Tower(["a", "b"]), tower_losses({"a": 1, "b": 2}), data, 0.8)
    first = 0
    assert found.controls.across[first].kappa < found.controls.ceiling[first].kappa - 0.1
    assert found.layers[first].kappa < found.controls.permuted[first].kappa


def test_the_model_is_left_alone_and_the_result_is_reproducible():
    model, data = TwoHeads(), digit_batches(4)
    before = Snapshot(model)
    first = overlap_with_controls(model, digit_losses, data, 0.5, groups=4, resamples=2)
    before.check()
    model.eval()
    again = [overlap_with_controls(model, digit_losses, iter(data), 0.5, groups=4, resamples=2) for _ in range(2)]
    assert again[0].to_dict() == again[1].to_dict()
    assert len(first.controls.resamples) == 2
    json.dumps(first.to_dict(), allow_nan=False)
    assert "permuted kappa" in first.rows()[0]
    assert "ceiling" in str(first)


@pytest.mark.parametrize(("groups", "resamples"), [(2, 0), (3, 0), (4, 5)])
def test_few_groups_give_no_resamples(groups, resamples):
    found = overlap_with_controls(TwoHeads().eval(), digit_losses, digit_batches(4), 0.5, groups=groups, resamples=5)
    assert len(found.controls.resamples) == resamples


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (digit_batches(1), {}, "at least two batches"),
        ([], {}, "at least two batches"),
        (digit_batches(4), {"groups": 1}, "groups"),
        (digit_batches(2), {"num_batches": 5}, "num_batches"),
        (digit_batches(4, size=1), {}, "larger batches"),
    ],
)
def test_bad_calls(data, options, message):
    model = TwoHeads().eval()
    before = Snapshot(model)
    with pytest.raises(ValueError, match=message):
        overlap_with_controls(model, digit_losses, data, 0.5, **options)
    before.check()


class Fields(collections.UserDict):
    """A batch whose entries are attributes too, as those of Hugging Face's tokenizers."""

    def __getattr__(self, key):
        return self.__dict__["data"][key]


def test_losses_may_read_entries_of_a_batch_as_attributes():
    batches = [Fields({"x": x, "a": a, "b": b}) for x, a, b in labelled()]
    model = Tower(["a", "b"])

    def losses(model, batch):
        features = model.trunk(batch.x)
        return {task: F.cross_entropy(model.heads[task](features), getattr(batch, task)) for task in "ab"}

    found = overlap_with_controls(model, losses, batches, 0.8)
    assert kappas(found) == kappas(overlap_with_controls(model, tower_losses({"a": 1, "b": 2}), labelled(), 0.8))


# The change-point rule


def noisy(levels, seed=0, scale=0.03):
    return np.asarray(levels) + np.random.default_rng(seed).normal(0, scale, len(levels))


@pytest.mark.parametrize("place", [3, 10, 17])
@pytest.mark.parametrize("seed", range(3))
def test_a_step_is_found_where_it_is(place, seed):
    drop = find_drop(noisy([0.8] * place + [0.4] * (20 - place), seed), min_drop=0.1, significance=0.05)
    assert drop.place == place
    assert drop.before == pytest.approx(0.8, abs=0.05)
    assert drop.after == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize(
    "values",
    [
        [0.5] * 20,
        noisy(np.linspace(0.9, 0.1, 20)),
        1 / (1 + np.exp((np.arange(20) - 9.5) / 1.3)),
        noisy([0.4] * 10 + [0.8] * 10),
        noisy([0.8] * 10 + [0.75] * 10, scale=0.01),
        [0.9, 0.1, 0.9],
        [],
    ],
    ids=["constant", "steady decline", "bent decline", "rise", "too small", "too short", "nothing"],
)
def test_what_is_no_drop(values):
    assert find_drop(values, min_drop=0.1, significance=0.05) is None


def test_noise_is_rarely_taken_for_a_drop():
    found = [find_drop(noisy([0.5] * 24, seed, 0.3), min_drop=0.0, significance=0.05) for seed in range(200)]
    assert sum(drop is not None for drop in found) / len(found) < 0.08


def profile(similarities, size=400, seed=0):
    """An overlap in which the two tasks' scores are alike to a given degree in each layer."""
    generator = np.random.default_rng(seed)
    tables = {"a": {}, "b": {}}
    for index, alike in enumerate(similarities):
        a = generator.random(size)
        fresh = generator.random(size) < 1 - alike
        tables["a"][index], tables["b"][index] = a.tolist(), np.where(fresh, generator.random(size), a).tolist()
    return task_overlap(build(tables, [size] * len(similarities))[1], 0.7)


def test_a_watershed_names_its_layers_and_says_what_it_means():
    overlap = profile([0.9] * 6 + [0.2] * 6)
    found = overlap.watershed()
    assert (found.layer, found.next_layer) == ("5.weight", "6.weight")
    assert found.before > 0.7 > 0.4 > found.after
    assert found.interval is None
    assert not found.relative
    assert "Watershed after 5.weight" in str(found)
    assert overlap.watershed(min_drop=0.95) is None


def test_branching_costs_the_copies_of_the_later_layers():
    overlap = profile([0.9] * 6 + [0.2] * 6)
    branch = overlap.suggest_branch()
    assert branch.after == "5.weight"
    assert branch.layers == tuple(f"{index}.weight" for index in range(6, 12))
    assert branch.weights == 6 * 400
    assert branch.share == pytest.approx(0.5)
    assert branch.kept == sum(overlap[name].kept_by[2] for name in branch.layers)
    assert "2,400 more weights" in str(branch)
    assert overlap.suggest_branch(after="10.weight").layers == ("11.weight",)
    assert profile([0.5] * 12).suggest_branch() is None
    with pytest.raises(KeyError):
        overlap.suggest_branch(after="head")


STEP, FLAT = (0.9,) * 6 + (0.2,) * 6, (0.6, 0.5) * 6


def with_profiles(relative, resamples=(), observed=STEP, permuted=FLAT):
    """An overlap of twelve layers with the given kappas, under a ceiling of 1."""
    layers, across, below, ceiling = (
        tuple(scaled(f"{index}.weight", value) for index, value in enumerate(kappas))
        for kappas in (observed, relative, permuted, (1.0,) * 12)
    )
    return TaskOverlap(("a", "b"), 0.5, "per_task", layers, controls=Controls(below, across, ceiling, resamples))


def scaled(name, agreement):
    """A layer of 2,000 weights, half of them kept, with the given kappa."""
    both = round(500 * (1 + agreement))
    kept = {"a": 1000, "b": 1000}
    stratum = Stratum(2000, kept, (both, 2000 - 2 * both, both), {("a", "b"): both}, {("a", "b"): math.nan})
    return Overlap(name, (stratum,))


def test_with_controls_the_watershed_is_about_agreement_relative_to_the_ceiling():
    assert with_profiles(FLAT).watershed() is None
    found = with_profiles(STEP, (STEP,) * 10).watershed()
    assert found.relative
    assert found.layer == "5.weight"
    assert (found.interval, found.support) == (("5.weight", "5.weight"), 1.0)
    assert "middle 80 %" in str(found)


def test_a_drop_that_permuted_labels_make_as_well_is_no_watershed():
    overlap = with_profiles(STEP, (STEP,) * 10, permuted=STEP)
    assert overlap.watershed() is None
    assert "not what the tasks have to learn" in overlap.explain_watershed()


@pytest.mark.parametrize(
    "resamples",
    [
        (FLAT,) * 6 + (STEP,) * 4,
        tuple((0.9,) * place + (0.2,) * (12 - place) for place in (2, 3, 4, 5, 6, 7, 8, 9, 10)),
    ],
    ids=["rarely found again", "found all over the place"],
)
def test_resamples_can_take_a_watershed_away(resamples):
    assert "do not confirm" in with_profiles(STEP, resamples).explain_watershed()


def test_layers_with_a_low_ceiling_are_left_out():
    overlap = with_profiles(STEP)
    low = tuple(
        scaled(layer.name, 0.05) if place in (6, 7) else layer for place, layer in enumerate(overlap.controls.ceiling)
    )
    overlap = dataclasses.replace(overlap, controls=dataclasses.replace(overlap.controls, ceiling=low))
    assert [math.isnan(value) for value in overlap.controls.relative_agreement()] == [
        place in (6, 7) for place in range(12)
    ]
    assert overlap.watershed().next_layer == "8.weight"
    assert overlap.select(lambda name: name not in ("0.weight", "6.weight")).watershed().next_layer == "8.weight"


def test_a_default_device_does_not_get_in_the_way():
    """What is made without a device would be on the meta device, which holds no values."""
    model, data = TwoHeads().eval(), digit_batches(4)
    expected = overlap_with_controls(model, digit_losses, data, 0.5, groups=4, resamples=2)
    torch.set_default_device("meta")
    try:
        found = overlap_with_controls(model, digit_losses, data, 0.5, groups=4, resamples=2)
    finally:
        torch.set_default_device(None)
    assert found.to_dict() == expected.to_dict()


@pytest.mark.parametrize("low", [range(6, 12), range(6)])
def test_where_permuted_labels_keep_nothing_a_drop_is_no_watershed(low):
    overlap = with_profiles(STEP, (STEP,) * 10, permuted=STEP)
    empty = {place: none_kept(f"{place}.weight") for place in low}
    permuted = tuple(empty.get(place, layer) for place, layer in enumerate(overlap.controls.permuted))
    overlap = dataclasses.replace(overlap, controls=dataclasses.replace(overlap.controls, permuted=permuted))
    assert overlap.watershed() is None
    assert "cannot be told: on one side every task keeps all weights then, or none" in overlap.explain_watershed()


def none_kept(name):
    stratum = Stratum(2000, {"a": 0, "b": 0}, (2000, 0, 0), {("a", "b"): 0}, {("a", "b"): math.nan})
    return Overlap(name, (stratum,))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"min_drop": None}, "min_drop: must be a number, found NoneType"),
        ({"min_drop": math.nan}, "min_drop: must be from 0 to 2, found nan"),
        ({"min_drop": -1}, "min_drop: must be from 0 to 2, found -1"),
        ({"significance": 5}, "significance: must be .*, found 5"),
    ],
)
def test_options_of_the_watershed_are_checked(options, error):
    with pytest.raises((TypeError, ValueError), match=error):
        with_profiles(STEP).watershed(**options)


class Noisy(Tower):
    """A tower with dropout, which notes what it draws."""

    def __init__(self, tasks):
        super().__init__(tasks)
        self.drawn = []
        self.trunk.register_forward_hook(lambda *_: self.drawn.append(float(torch.rand(()))))
        self.trunk.append(nn.Dropout(0.5))


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_the_noise_of_a_model_is_that_of_scoring_once_however_many_groups(groups):
    """The same random numbers in every group would make each task agree with itself."""
    model, data, losses = Noisy(["a", "b"]), labelled(), tower_losses({"a": 1, "b": 2})
    plain, once = task_overlap(score_tasks(model, losses, data), 0.8), list(model.drawn)
    model.drawn.clear()
    before = torch.get_rng_state()
    found = overlap_with_controls(model, losses, data, 0.8, groups=groups)
    assert torch.equal(torch.get_rng_state(), before)
    size = len(data) // groups
    chunks = [once[start : start + size] for start in range(0, len(data), size)]
    assert model.drawn == [number for chunk in chunks for number in (*chunk, *chunk)]  # with labels, and permuted
    assert len(set(once)) == len(data)
    np.testing.assert_allclose(kappas(found), kappas(plain), atol=0.02)


@pytest.mark.filterwarnings("ignore:parameters. 1 of 4 are reached by no task")
def test_groups_of_other_tasks_are_refused():
    def losses(model, batch):
        every = tower_losses({"a": 1, "b": 2})(model, batch)
        return every if batch[0][0, 0] < 10 else {"a": every["a"]}

    data = labelled(4)
    data[3][0][0, 0] = 20.0
    with pytest.raises(ValueError, match=r"every batch must return the same tasks, found \['a'\] after \['a', 'b'\]"):
        overlap_with_controls(Tower(["a", "b"]), losses, data, 0.8, groups=4)


def test_data_without_a_length_are_read_first():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(labelled(6))

    loader = torch.utils.data.DataLoader(Endless(), batch_size=None)
    model, losses = Tower(["a", "b"]), tower_losses({"a": 1, "b": 2})
    found = overlap_with_controls(model, losses, loader, 0.8)
    assert kappas(found) == kappas(overlap_with_controls(model, losses, labelled(6), 0.8))
    assert found.num_batches == 6


def test_a_count_that_looks_like_a_percentage_is_told():
    with pytest.warns(UserWarning, match="amount: 90 is a number of weights"):
        overlap_with_controls(Tower(["a", "b"]), tower_losses({"a": 1, "b": 2}), labelled(4), 90, resamples=0)


def test_a_task_whose_name_is_another_again_has_its_own_ceiling():
    named, plain = (
        overlap_with_controls(Tower(tasks), tower_losses(dict(zip(tasks, (1, 2), strict=True))), labelled(), 0.8)
        for tasks in (["a", "a again"], ["a", "b"])
    )
    assert named.controls.ceiling_of("a again").size == plain.controls.ceiling_of("b").size
    assert len(named.controls.ceiling_of("a again").strata) == 2
