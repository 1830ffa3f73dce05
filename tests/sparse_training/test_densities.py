"""How many weights each layer keeps at first: the formula, an exact total, and no layer emptied or filled."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from disparse_plugin.sparse_training import DiSparseScheduler, layer_counts
from networks import TwoHeads, digit_losses
from runs import alive_count, masks_of, weights_total

SHAPES = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 40), st.integers(1, 40)),
        st.tuples(st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, 3]), st.sampled_from([1, 3])),
    ),
    min_size=1,
    max_size=6,
)


def erk_densities(shapes, total):
    """The densities by bisection on the scale, instead of the usual loop over the layers that are full."""
    raw = [(sum(shape) / math.prod(shape)) ** 0.9 for shape in shapes]
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        kept = sum(min(1, middle * r) * math.prod(shape) for r, shape in zip(raw, shapes, strict=True))
        low, high = (middle, high) if kept < total else (low, middle)
    return [min(1, high * r) for r in raw]


@given(SHAPES, st.floats(0, 1), st.sampled_from(["erk", "uniform"]))
def test_the_total_is_exact_and_no_layer_is_emptied_or_filled(shapes, amount, distribution):
    sizes = [math.prod(shape) for shape in shapes]
    target = sum(sizes) - round(amount * sum(sizes))
    try:
        counts = layer_counts(shapes, amount, distribution)
    except ValueError:
        # Impossible only if there are too few to give each layer one, or so many that a layer has to be filled.
        assert not len(shapes) <= target <= 0.5 * sum(sizes)
        return
    assert sum(counts) == target
    assert all(1 <= count <= size for count, size in zip(counts, sizes, strict=True))
    if distribution == "uniform" and round(amount * sum(sizes)) > 0:
        assert all(count < size or size == 1 for count, size in zip(counts, sizes, strict=True))


@given(st.lists(st.tuples(st.integers(8, 60), st.integers(8, 60)), min_size=2, max_size=6), st.floats(0.3, 0.95))
def test_erk_is_the_formula_within_rounding(shapes, amount):
    sizes = [math.prod(shape) for shape in shapes]
    total = sum(sizes) - round(amount * sum(sizes))
    for count, size, density in zip(layer_counts(shapes, amount), sizes, erk_densities(shapes, total), strict=True):
        assert count == size if density == 1 else abs(count - density * size) <= 2


@pytest.mark.parametrize(
    ("shapes", "amount", "distribution", "expected"),
    [
        ([(10, 10), (20, 10)], 0.05, "uniform", [95, 190]),  # nearly dense is not dense
        ([(1, 2), (10, 10)], 0.95, "uniform", [1, 4]),  # none is emptied
        ([(3, 5), (7, 5), (2, 5)], 0.5, "uniform", [8, 17, 5]),  # of equal remainders the first
        ([(2, 4), (3, 5)], 0.7, "uniform", [2, 5]),  # 2.4 and 4.6: the larger remainder
        ([(1, 10), (1, 10)], 0.5, {0: 0.25}, [2, 8]),  # 2.5 and 7.5: what the user gave is rounded by itself
        ([(1, 10), (1, 10)], 0.5, {0: 0.27}, [3, 7]),
        ([(1, 10), (1, 10)], 0.75, {0: 0.25, 1: 0.25}, [3, 2]),  # and gives way by one entry where nothing else can
    ],
)
def test_how_whole_numbers_are_found(shapes, amount, distribution, expected):
    assert layer_counts(shapes, amount, distribution) == expected


@pytest.mark.parametrize(
    ("shapes", "amount", "distribution"),
    [
        ([(1, 2), (1, 2)], 0.25, "uniform"),  # three of four would fill a layer
        ([(1, 10), (1, 10)], 0.8, {0: 0.5, 1: 0.5}),  # densities that the amount contradicts, either way
        ([(1, 10), (1, 10)], 0.2, {0: 0.5, 1: 0.5}),
    ],
)
def test_totals_that_no_whole_numbers_meet(shapes, amount, distribution):
    with pytest.raises(ValueError, match="amount: the layers must be able to keep"):
        layer_counts(shapes, amount, distribution)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"distribution": {"fc": 0.5}}, TypeError, "distribution: must be an int, found str: 'fc'"),
        ({"distribution": {2: 0.5}}, ValueError, "distribution: must hold indices of layers, 0 to 1, found 2"),
        ({"dense": ["fc"]}, TypeError, "dense: must be an int, found str: 'fc'"),
        ({"dense": [-1]}, ValueError, "dense: must be at least 0, found -1"),
    ],
)
def test_layers_are_told_by_their_index(options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        layer_counts([(4, 4), (4, 4)], 0.5, **options)


def deeplab_shapes(classes=(40, 3)):
    """The weights of the paper's network: a ResNet-34 trunk and, for each task, four parallel heads."""
    shapes, width = [(64, 3, 7, 7)], 64
    for out, blocks in zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True):
        for block in range(blocks):
            shapes += [(out, width, 3, 3), (out, out, 3, 3)]
            if block == 0 and (out != width or out != 64):
                shapes.append((out, width, 1, 1))
            width = out
    trunk = len(shapes)
    for task in classes:
        shapes += 4 * [(1024, 512, 3, 3), (1024, 1024, 1, 1), (task, 1024, 1, 1)]
    return shapes, trunk


def test_erk_on_the_papers_network_gives_the_authors_densities():
    shapes, trunk = deeplab_shapes()
    sizes = [math.prod(shape) for shape in shapes]
    assert sum(sizes) == 67_581_120
    counts = layer_counts(shapes, 0.9)
    assert sum(counts[:trunk]) / sum(sizes[:trunk]) == pytest.approx(0.110, abs=5e-4)
    full = [shape for shape, count, size in zip(shapes, counts, sizes, strict=True) if count == size]
    assert full[0] == (64, 3, 7, 7)
    assert sum(shape[0] in (40, 3) and shape[1] == 1024 for shape in full) == 8


def make(**options):
    model = TwoHeads()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, DiSparseScheduler(model, optimizer, digit_losses, stop_at=10, **options)


@pytest.mark.parametrize("distribution", ["erk", "uniform"])
def test_the_scheduler_masks_exactly_the_amount(distribution):
    model, _ = make(amount=0.83, distribution=distribution)
    assert alive_count(model) == weights_total(model) - round(0.83 * weights_total(model))


def test_densities_by_name_or_pair_and_the_rest_by_erk():
    model = TwoHeads()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    densities = {"heads.a.weight": 0.25, (model.trunk[0], "weight"): 0.5}
    DiSparseScheduler(model, optimizer, digit_losses, stop_at=10, amount=0.8, distribution=densities)
    assert int(model.heads["a"].weight_mask.sum()) == round(0.25 * model.heads["a"].weight_mask.numel())
    assert int(model.trunk[0].weight_mask.sum()) == 27
    assert alive_count(model) == weights_total(model) - round(0.8 * weights_total(model))


def test_a_density_for_every_layer_needs_no_amount():
    densities = {"trunk.0.weight": 1.0, "trunk.3.weight": 0.1, "heads.a.weight": 0.2, "heads.b.weight": 0.3}
    model, _ = make(distribution=densities)
    for name, mask in masks_of(model).items():
        assert int(mask.sum()) == round(densities[name.replace("_mask", "")] * mask.numel())


def test_exempt_layers_stay_untouched_and_count_in_the_total():
    with pytest.warns(DeprecationWarning, match=r"distribution={'NAME.weight': 1.0, .* exclude=\[...\]"):
        model, _ = make(amount=0.7, exempt=["trunk.0.weight"])
    assert "weight" in model.trunk[0]._parameters
    pruned = sum(int((mask == 0).sum()) for mask in masks_of(model).values())
    assert pruned == round(0.7 * weights_total(model))


def test_a_density_of_one_does_what_exempt_did():
    model, _ = make(amount=0.7, distribution={"trunk.0.weight": 1.0})
    assert bool(model.trunk[0].weight_mask.all())
    assert alive_count(model) == weights_total(model) - round(0.7 * weights_total(model))


def test_excluded_layers_stay_untouched_and_do_not_count():
    model = TwoHeads()
    dense = model.trunk[0].weight.numel()
    total = weights_total(model) - dense
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = DiSparseScheduler(model, optimizer, digit_losses, amount=0.7, stop_at=10, exclude=["trunk.0"])
    assert "weight" in model.trunk[0]._parameters
    assert alive_count(model) == total - round(0.7 * total)
    assert scheduler.masks.names == ("trunk.3.weight", "heads.a.weight", "heads.b.weight")


def test_which_weights_stay_is_random_by_the_seed_alone():
    masks = []
    for seed in (1, 1, 2):
        torch.rand(7)  # the global generator must not matter
        masks.append(torch.cat([mask.flatten() for mask in masks_of(make(amount=0.8, seed=seed)[0]).values()]))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.filterwarnings("ignore:exempt:DeprecationWarning")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amount": 1.0}, "amount: the layers must be able to keep 0 of"),
        ({}, "amount: must say how much"),
        ({"amount": 0.9, "distribution": "er"}, "distribution: must be 'erk', 'uniform' or"),
        ({"amount": 0.9, "distribution": {"heads.z.weight": 0.5}}, "distribution: every key"),
        ({"amount": 0.9, "distribution": {"heads.a.weight": 0.0}}, "distribution: every density"),
        ({"amount": 0.9, "exempt": ["heads.z.weight"]}, "exempt: every entry"),
        ({"amount": 0.9, "exempt": [nn.Linear(2, 2)]}, "exempt: every entry"),
        ({"amount": 0.9, "exempt": ["heads.a.weight", "heads.b.weight", "trunk.3.weight"]}, "would fit"),
        ({"amount": 0.5, "distribution": "existing"}, "amount: must be left out"),
        ({"amount": 9}, "amount: 9 is a number of weights, 0.94 % of 954; for 9 % pass 0.09"),
        ({"amount": 0.9, "exclude": ["heads.z"]}, "exclude: .* found 'heads.z'"),
        ({"amount": 0.9, "update_every": 0}, "update_every: must be at least 1"),
        ({"amount": 0.9, "drop_fraction": 1.5}, "drop_fraction: must be in"),
        ({"amount": 0.9, "criterion": "snip"}, "criterion: must tell masked weights apart"),
        ({"amount": 0.9, "criterion": "magnitude"}, "criterion: must tell masked weights apart"),
        ({"amount": 0.9, "arbiter": "dictator"}, "arbiter: must be one of"),
    ],
)
def test_bad_options_leave_the_model_dense(options, message):
    model = TwoHeads()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"^{message}|{message}"):
        DiSparseScheduler(model, optimizer, digit_losses, stop_at=10, **options)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
