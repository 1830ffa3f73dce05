"""Models out of the ordinary: types, layouts, buffers, containers, shared and frozen parts; each works or is refused.

What scoring alone says of them is in ``test_bad_input`` and ``test_scoring``.
"""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from disparse_plugin import disparse_static, prunable_parameters, score_tasks
from disparse_plugin.masks import attach_masks, clone_pruned, fold, masks_of, sparsity_report
from disparse_plugin.sparse_training import DiSparseScheduler, GradualPruning

from networks import Snapshot, TwoHeads, digit_batches, digit_losses, square_losses, vectors
from pruning_cases import METHODS, each_method, pruning_hooks


class Around(nn.Module):
    """Two heads of five inputs behind whatever comes first."""

    def __init__(self, first):
        super().__init__()
        self.first, self.heads = first, nn.ModuleDict({"a": nn.Linear(5, 4), "b": nn.Linear(5, 4)})

    def forward(self, x):
        x = self.first(x).tanh()
        return {task: head(x) for task, head in self.heads.items()}


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


@pytest.mark.parametrize("scheduler", [DiSparseScheduler, GradualPruning])
@pytest.mark.parametrize("first", [first for first, _ in WORKS.values()], ids=WORKS)
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


def quietly(make):
    """Make a module that torch announces as deprecated, or as in development."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def lazy():
    return quietly(lambda: nn.LazyLinear(5))


REFUSED = {
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(5, 5)), "weight must be a plain parameter, found"),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(5, 5)), "computed by a parametrization"),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(5, 5)), "remove_parametrizations first"),
    "old weight_norm": (
        lambda: quietly(lambda: nn.utils.weight_norm(nn.Linear(5, 5))),
        r"found Tensor; .*'weight_g', 'weight_v'",
    ),
    "old spectral_norm": (
        lambda: quietly(lambda: nn.utils.spectral_norm(nn.Linear(5, 5))),
        "found Tensor; .*'weight_orig'",
    ),
    "lazy": (lazy, "weight must have a shape, found a lazy parameter; run one batch"),
    "meta": (lambda: nn.Linear(5, 5, device="meta"), "weight must hold values, found the meta device; materialise"),
    "complex": (
        lambda: nn.Linear(5, 5, dtype=torch.complex64),
        "must be of a floating point type, found torch.complex64",
    ),
}
refused = pytest.mark.parametrize(("first", "message"), REFUSED.values(), ids=REFUSED)


@refused
@each_method
def test_what_cannot_be_masked_is_refused_by_every_method(first, message, method):
    module = first()
    parameters, hooks = dict(module.named_parameters()), len(module._forward_pre_hooks)
    with pytest.raises(ValueError, match=f"parameters: .*({message})"):
        METHODS[method](module, "weight")
    assert {name: id(value) for name, value in module.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert len(module._forward_pre_hooks) == hooks


@refused
@pytest.mark.parametrize("scheduler", [DiSparseScheduler, GradualPruning])
def test_what_cannot_be_masked_is_refused_before_training(first, message, scheduler):
    model = Around(first())
    optimizer = torch.optim.SGD(model.heads.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=f"parameters: first.*({message})"):
        scheduler(model, optimizer, square_losses, amount=0.5, stop_at=4)
    assert not prune.is_pruned(model)


def test_the_old_spectral_norm_is_not_taken_for_a_mask():
    """It too has a Parameter called ``weight_orig``."""
    model = Around(quietly(lambda: nn.utils.spectral_norm(nn.Linear(5, 5))))
    heads = [(head, "weight") for head in model.heads.values()]
    scores = score_tasks(model, square_losses, vectors(), parameters=heads)
    attach_masks(model, scores.masks(0.5))
    assert set(masks_of(model)) == {"heads.a.weight", "heads.b.weight"}
    report = sparsity_report(model)  # of what could be masked, as with a parametrization
    assert (report.alive, report.total) == (20, 40)
    with pytest.raises(ValueError, match=r"found first\.weight which is not"):
        attach_masks(model, {"first.weight": torch.ones(5, 5, dtype=torch.bool)})
    output = model.eval()(vectors(1)[0])["a"]
    assert torch.equal(fold(model)(vectors(1)[0])["a"], output)


def test_after_removing_the_parametrization_it_works():
    model = Around(parametrizations.weight_norm(nn.Linear(5, 5)))
    parametrize.remove_parametrizations(model.first, "weight")
    disparse_static(model, square_losses, vectors(), 0.5)
    assert prune.is_pruned(model.first)


def test_a_lazy_module_waits_for_its_first_batch():
    model, masks = Around(lazy()), {"first.weight": torch.ones(5, 5, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"masks: first\.weight must have a shape, found a lazy parameter; run one"):
        attach_masks(model, {"heads.a.weight": torch.ones(4, 5, dtype=torch.bool), **masks})
    assert not prune.is_pruned(model)
    with pytest.raises(ValueError, match=r"model: every parameter must have a shape, found first\.weight lazy"):
        sparsity_report(model)
    model(vectors(1)[0])
    attach_masks(model, masks)
    disparse_static(model, square_losses, vectors(), 0.5)
    assert sparsity_report(model).alive == 65 - round(0.5 * 65)


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
