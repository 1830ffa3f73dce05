"""Importances of torch-pruning as the per-task criterion of DiSparseImportance."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

from disparse_plugin.structured import DiSparseImportance, sync_attention
from disparse_plugin.structured.adapter.base_fisher import fisher_per_task
from disparse_plugin.structured.masked_copy import masked_copy
from oracles.structured import cuts_of, kept_units
from structured_networks import batches, build, deviation, losses, make_pruner

BASES = {
    "taylor": lambda: tp.importance.GroupTaylorImportance(),
    "hessian": lambda: tp.importance.GroupHessianImportance(),
    "magnitude": lambda: tp.importance.GroupMagnitudeImportance(),
    "lamp": lambda: tp.importance.LAMPImportance(),
    "obdc": lambda: tp.importance.OBDCImportance(),
}

pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("kind", ["batchnorm", "grouped", "transformer"])
def test_any_importance_as_the_criterion(base: str, kind: str) -> None:
    model = build(kind)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    pruner = make_pruner(model, options={"base": BASES[base]()})
    before = kept_units(pruner)
    groups = list(pruner.step(interactive=True))
    assert all(bool((p.grad == 7.0).all()) for p in model.parameters())
    soft = masked_copy(model, cuts_of(pruner, groups))
    for group in groups:
        group.prune()
    sync_attention(pruner.num_heads, model)
    assert deviation(soft, model) < 1e-5
    assert abs(kept_units(pruner) / before - 0.5) * before <= 1


def test_hessian_as_the_criterion_sees_every_batch() -> None:
    """torch-pruning's own accumulation keeps the last batch only."""
    model = build("batchnorm")
    first, second = batches(2)
    found = {}
    for name, data in {"both": [first, second], "swapped": [second, first], "last": [second]}.items():
        importance = DiSparseImportance(
            rescore=(losses, data), base=tp.importance.GroupHessianImportance(normalizer=None)
        )
        graph = tp.DependencyGraph().build_dependency(model, (first,))
        group = next(g for g in graph.get_all_groups() if any(dep.target.module is model.stem for dep, _ in g))
        found[name] = importance.task_scores(group)["label"]
    torch.testing.assert_close(found["both"], found["swapped"])
    assert not torch.allclose(found["both"], found["last"], rtol=1e-2)


def only_label(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    return {"label": model(batch)["label"].logsumexp(1).mean()}


class Plain(nn.Module):
    """What torch-pruning's own OBDC can collect from: no biases, no groups, no second use of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, bias=False)
        self.second = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.hidden, self.label_out = nn.Linear(12, 10, bias=False), nn.Linear(10, 5, bias=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.second(self.first(x).relu()).relu().mean((2, 3))
        return {"label": self.label_out(self.hidden(h).relu())}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_obdc_of_one_task_is_that_of_torch_pruning() -> None:
    torch.manual_seed(0)
    model, data = Plain(), batches(3)
    own = tp.importance.OBDCImportance(num_classes=5)
    graph = tp.DependencyGraph().build_dependency(model, (data[0],))
    for layer in model.children():  # by hand: `_prepare_model` of 1.6.1 fails on every model without attention
        own.modules.append(layer)
        layer.register_forward_pre_hook(own._save_input)
        layer.register_full_backward_hook(own._save_grad_output)
    for batch in data:
        only_label(model, batch)["label"].backward()
        own.step()
    own._rm_hooks(model)
    expected = [own(group) for group in graph.get_all_groups([model.label_out])]
    ours = DiSparseImportance(rescore=(only_label, data), base=tp.importance.OBDCImportance(), normalizer=None)
    found = [ours.task_scores(group)["label"] for group in graph.get_all_groups([model.label_out])]
    assert len(found) == 3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.double(), rtol=1e-4, atol=1e-9)


class Unusual(nn.Module):
    """What torch-pruning's collection fails on: bias, groups, a transposed convolution, tokens, two uses, in-place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.tokens = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x), inplace=True)
        h = self.up(self.grouped(self.grouped(h).relu_())).flatten(2).mT
        return self.tokens(self.tokens(h)).mean(1)


def test_fisher_is_the_sum_over_samples_of_squared_gradients() -> None:
    """From the definition: one backward per sample, without any hook."""

    def task(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        return {"only": model(batch).square().sum(1).mean()}

    torch.manual_seed(0)
    model, data = Unusual(), [torch.randn(3, 3, 4, 4), torch.randn(2, 3, 4, 4)]
    layers = list(model.children())
    expected = {layer: torch.zeros_like(layer.weight) for layer in layers}
    for sample in torch.cat(data).split(1):
        grads = torch.autograd.grad(task(model, sample)["only"], [layer.weight for layer in layers])
        for layer, grad in zip(layers, grads, strict=True):
            expected[layer] += grad.square() / len(data)
    found = fisher_per_task(model, task, data, layers)["only"]
    assert set(found) == set(layers)
    for layer in layers:
        torch.testing.assert_close(found[layer], expected[layer], rtol=1e-4, atol=1e-9)
        assert not layer._forward_hooks


def test_obdc_sees_no_other_task_and_keeps_what_it_was_given() -> None:
    model = build("batchnorm")
    base = tp.importance.OBDCImportance(num_classes=24)  # the width of the hidden layer, which it would skip
    before = dict(base.__dict__)
    pruner = make_pruner(model, options={"base": base})
    groups = {group[0].dep.target.name.split()[0]: group for group in pruner.DG.get_all_groups(pruner.ignored_layers)}
    assert set(pruner.importance.task_scores(groups["hidden"])) == {"label"}
    assert set(pruner.importance.task_scores(groups["dense.0"])) == {"dense"}
    assert base.__dict__ == before


def test_obdc_with_biases_is_refused() -> None:
    pruner = make_pruner(build("batchnorm"), options={"base": tp.importance.OBDCImportance(bias=True)})
    with pytest.raises(ValueError, match="bias=False"):
        pruner.step()
