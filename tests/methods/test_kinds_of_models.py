"""Models out of the ordinary that work: types, layouts, buffers, containers, shared and frozen parts.

Those that do not are in ``test_refused_models``.
"""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from disparse_plugin import disparse_static, prunable_parameters, score_tasks
from disparse_plugin.masks import attach_masks, clone_pruned, fold, masks_of, sparsity_report
from disparse_plugin.sparse_training import DiSparseScheduler, GradualPruning
from networks import Around, Snapshot, TwoHeads, digit_batches, digit_losses, square_losses, vectors
from pruning_cases import METHODS, each_method, pruning_hooks


class Counting(nn.Module):
    """Integer, bool and empty buffers, and an integer parameter, beside a weight."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("nothing", None)
        self.order = nn.Parameter(torch.arange(5).flip(0), requires_grad=False)

    def forward(self, x):
        self.calls += 1
        return self.linear(x)[..., self.order]


class Twice(nn.Module):
    """One module under two names, run twice in a forward."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.again = self.linear

    def forward(self, x):
        return self.again(self.linear(x).tanh())


class Lists(nn.Module):
    """Modules and parameters in lists and dicts; a key called ``weight``."""

    def __init__(self):
        super().__init__()
        self.many = nn.ModuleList([nn.Linear(5, 5), nn.Sequential(nn.Linear(5, 5))])
        self.named = nn.ModuleDict({"weight": nn.Linear(5, 5)})
        self.plain = nn.ParameterList([torch.eye(5)])

    def forward(self, x):
        for module in [*self.many, *self.named.values()]:
            x = module(x)
        return x @ self.plain[0]


WORKS = {
    "integer buffers": (Counting, ["first.linear.weight"]),
    "a module used twice": (Twice, ["first.linear.weight"]),
    "lists and dicts": (Lists, ["first.many.0.weight", "first.many.1.0.weight", "first.named.weight.weight"]),
    "a frozen trunk": (lambda: nn.Linear(5, 5).requires_grad_(False), ["first.weight"]),
}


@pytest.mark.parametrize(("first", "names"), WORKS.values(), ids=WORKS)
def test_the_whole_way_from_scores_to_a_plain_model(first, names):
    model = Around(first())
    before, total = Snapshot(model), sum(module.weight.numel() for module, _ in prunable_parameters(model))
    scores = score_tasks(model, square_losses, vectors())
    before.check()
    assert scores.names == (*names, "heads.a.weight", "heads.b.weight")
    disparse_static(model, square_losses, vectors(), 0.5)
    assert all(len(pruning_hooks(module)) == 1 for module, _ in scores.parameters)
    assert sum(int((module.weight == 0).sum()) for module, _ in scores.parameters) == round(0.5 * total)
    assert sparsity_report(model, scores).alive == total - round(0.5 * total)
    output = model(vectors(1)[0])["a"]
    fresh = Around(first())
    attach_masks(fresh, masks_of(model))
    fresh.load_state_dict(model.state_dict())
    for twin in (fresh, clone_pruned(model), fold(model)):
        assert torch.equal(twin(vectors(1)[0])["a"], output)


class FirstOutput(nn.Module):
    """What a recurrent or an attention module returns first."""

    def __init__(self, inner, inputs):
        super().__init__()
        self.inner, self.inputs = inner, inputs

    def forward(self, x):
        return self.inner(*[x[:, None]] * self.inputs)[0][:, 0]


OWN_PARAMETERS = {
    "LSTM": (lambda: nn.LSTM(5, 5, num_layers=2), 1, ["weight_ih_l0", "weight_hh_l1"]),
    "GRU": (lambda: nn.GRU(5, 5), 1, ["weight_hh_l0"]),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(5, 1), 3, ["in_proj_weight"]),
}


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize(("make", "inputs", "names"), OWN_PARAMETERS.values(), ids=OWN_PARAMETERS)
def test_recurrent_and_attention_weights_are_scored_as_defined(make, inputs, names, pruned):
    """Asked for by name; the effective weight is what counts, wherever the module keeps it."""
    model, plain = (Around(FirstOutput(make(), inputs)) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    own, (batch,) = [(model.first.inner, name) for name in names], vectors(1)
    for module, name in own if pruned else []:
        prune.random_unstructured(module, name, 0.5)
        with torch.no_grad():
            getattr(plain.first.inner, name).mul_(getattr(module, f"{name}_mask"))
    keys = [*own, *((head, "weight") for head in model.heads.values())]
    scores = score_tasks(model, square_losses, [batch], parameters=keys)
    for task in scores:
        plain.zero_grad()
        square_losses(plain, batch)[task].backward()
        for key in own:
            weight = getattr(plain.first.inner, key[1])
            torch.testing.assert_close(scores[task][key], (weight * weight.grad).abs().detach())
    alive = sum(int((getattr(*key) != 0).sum()) for key in keys)
    disparse_static(model, square_losses, [batch], 0.5, parameters=keys)
    model(batch)
    assert sum(int((getattr(*key) != 0).sum()) for key in keys) == alive - round(0.5 * alive)


@pytest.mark.parametrize("scheduler", [DiSparseScheduler, GradualPruning])
@pytest.mark.parametrize("first", [first for first, _ in WORKS.values()], ids=WORKS)
@pytest.mark.filterwarnings("ignore:parameters. 1 of 3 are frozen")
def test_sparse_training(scheduler, first):
    model = Around(first())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.is_floating_point()], lr=0.1)
    pruning = scheduler(model, optimizer, square_losses, amount=0.5, update_every=1, stop_at=4)
    for batch in vectors(4):
        optimizer.zero_grad()
        sum(square_losses(model, batch).values()).backward()
        optimizer.step()
        pruning.step(batch)
    report = sparsity_report(model)
    assert report.alive == report.total - round(0.5 * report.total)


def test_a_frozen_weight_stays_frozen_and_its_values_stay():
    model = Around(nn.Linear(5, 5).requires_grad_(False))
    weight, values = model.first.weight, model.first.weight.clone()
    disparse_static(model, square_losses, vectors(), 0.5)
    sum(square_losses(model, vectors(1)[0]).values()).backward()
    assert not model.first.weight_orig.requires_grad
    assert weight.grad is None
    assert torch.equal(model.first.weight, values * model.first.weight_mask)
    fold(model)
    assert model.first.weight is weight
    assert not weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_types_and_layouts_keep_themselves(dtype, layout):
    """Everything stays in the type of the model, and the count is exact in each; only scores are wider."""
    model = TwoHeads().eval().to(dtype=dtype, memory_format=layout)
    batches = [(images.to(dtype), labels) for images, labels in digit_batches()]
    scores = disparse_static(model, digit_losses, batches, 0.9, min_keep=3)
    total = sum(module.weight.numel() for module, _ in scores.parameters)
    assert sum(int((module.weight == 0).sum()) for module, _ in scores.parameters) == round(0.9 * total)
    assert {tensor.dtype for name, tensor in model.state_dict().items() if "num_batches" not in name} == {dtype}
    assert model.trunk[3].weight_orig.is_contiguous(memory_format=layout)
    output = model(batches[0][0])["a"]
    assert output.dtype == dtype
    assert torch.equal(fold(model)(batches[0][0])["a"], output)


@each_method
def test_channels_last_weights_are_pruned_like_contiguous_ones(method):
    one, other = nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3)
    other.load_state_dict(one.state_dict())
    other = other.to(memory_format=torch.channels_last)
    for layer in (one, other):
        torch.manual_seed(0)
        METHODS[method](layer, "weight")
        torch.manual_seed(1)
        METHODS[method](layer, "weight")
    assert torch.equal(one.weight_mask, other.weight_mask)
    assert other.weight_orig.is_contiguous(memory_format=torch.channels_last)


def test_masks_can_be_attached_on_the_meta_device_and_filled_from_a_checkpoint():
    model = Around(nn.Linear(5, 5))
    disparse_static(model, square_losses, vectors(), 0.5)
    with torch.device("meta"):
        empty = Around(nn.Linear(5, 5))
    attach_masks(empty, masks_of(model))
    assert empty.first.weight_mask.is_meta
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(vectors(1)[0])["a"], model(vectors(1)[0])["a"])
    assert sparsity_report(empty).alive == sparsity_report(model).alive
