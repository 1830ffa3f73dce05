"""Weights that no hook can mask are refused with the reason, by every method and scheduler, before anything changes.

What scoring says of them is in ``test_bad_input``.
"""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from disparse_plugin import disparse_static, score_tasks
from disparse_plugin.masks import attach_masks, fold, masks_of, sparsity_report
from disparse_plugin.sparse_training import DiSparseScheduler, GradualPruning
from networks import Around, square_losses, vectors
from pruning_cases import METHODS, each_method


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
        "found what torch.nn.utils.weight_norm makes anew .* call torch.nn.utils.remove_weight_norm first",
    ),
    "old spectral_norm": (
        lambda: quietly(lambda: nn.utils.spectral_norm(nn.Linear(5, 5))),
        "found what torch.nn.utils.spectral_norm makes anew .* call torch.nn.utils.remove_spectral_norm first",
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
    keys = [(model.first, "weight"), *((head, "weight") for head in model.heads.values())]
    with pytest.raises(ValueError, match=f"parameters: first.*({message})"):
        scheduler(model, optimizer, square_losses, amount=0.5, stop_at=4, parameters=keys)
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
