"""The report counts masks, by layer and by task."""

import json

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from disparse_plugin import disparse_static, score_tasks
from disparse_plugin.masks import clone_pruned, sparsity_report
from networks import PartlyShared, TwoHeads, digit_batches, digit_losses, square_losses, vectors


@pytest.fixture
def model():
    return TwoHeads().eval()


@pytest.fixture
def pruned(model):
    disparse_static(model, digit_losses, digit_batches(), 0.9)
    return model


def test_counts_masks_not_zeros(pruned):
    with torch.no_grad():
        pruned.heads["a"].weight_orig.zero_()
    report = sparsity_report(pruned)
    total = sum(layer.weight_mask.numel() for layer in (pruned.trunk[0], pruned.trunk[3], *pruned.heads.values()))
    assert (report.total, report.alive) == (total, total - round(0.9 * total))
    assert report.all_parameters == sum(parameter.numel() for parameter in pruned.parameters())
    assert report.sparsity == pytest.approx(0.9, abs=1e-3)
    assert report.sparsity_of_all == pytest.approx(round(0.9 * total) / report.all_parameters)


def test_parts_follow_the_tasks():
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


def test_flops_are_those_of_the_forward_times_density(pruned):
    report = sparsity_report(pruned, example_inputs=(digit_batches(1)[0][0],))
    by_name = {layer.name: layer for layer in report.layers}
    assert by_name["trunk.3.weight"].flops == 2 * 4 * 6 * 6 * 9 * 16
    assert by_name["heads.a.weight"].flops == 2 * 4 * 96 * 3
    sparse, dense = report.theoretical_flops
    assert sparse == pytest.approx(sum(layer.flops * layer.alive / layer.total for layer in report.layers))
    assert f"of {dense:,} (" in str(report)
    assert sparsity_report(pruned).theoretical_flops is None


def test_a_masked_bias_adds_no_operations():
    net, x = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5)), torch.randn(4, 10)
    prune.l1_unstructured(net[0], "weight", 0.5)
    assert sparsity_report(net, example_inputs=x).theoretical_flops == (1600, 2400)
    prune.l1_unstructured(net[0], "bias", 0.5)
    report = sparsity_report(net, example_inputs=x)
    assert report.theoretical_flops == (2 * 4 * (100 + 100), 2 * 4 * (200 + 100))
    assert {layer.name: layer.flops for layer in report.layers}["0.bias"] == 0


def test_weights_of_one_layer_share_its_operations():
    layer, steps = nn.RNN(6, 4, num_layers=2), torch.randn(5, 3, 6)
    names = [name for name, _ in layer.named_parameters()]
    for name in names:
        prune.l1_unstructured(layer, name, 0.5)
    own = {name: getattr(layer, name).numel() if name.startswith("weight") else 0 for name in names}
    report = sparsity_report(layer, example_inputs=steps)
    assert {layer.name: layer.flops for layer in report.layers} == {name: 2 * 15 * n for name, n in own.items()}
    assert report.theoretical_flops == (15 * sum(own.values()), 30 * sum(own.values()))


def test_what_runs_inside_a_module_with_a_parameter_counts_once():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift, self.inner = nn.Parameter(torch.ones(2, 3)), nn.Linear(6, 3)
            self.again = self.inner

        def forward(self, x):
            return self.inner(x).view(-1, 2, 3) + self.shift

    net = Shifted()
    prune.l1_unstructured(net, "shift", 2)
    report = sparsity_report(net, example_inputs=torch.randn(4, 6))
    assert {layer.name: layer.flops for layer in report.layers} == {"shift": 0, "inner.weight": 2 * 4 * 18}


def test_plain_values(pruned):
    report = sparsity_report(pruned)
    assert json.loads(json.dumps(report.to_dict()))["prunable"]["alive"] == report.alive
    assert [row["name"] for row in report.rows()] == [layer.name for layer in report.layers]


def test_nothing_to_report():
    with pytest.raises(ValueError, match="model: must have a prunable parameter"):
        sparsity_report(nn.BatchNorm1d(3))


def test_what_was_left_out_of_scoring_is_listed():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.a, self.b = nn.Linear(8, 2), nn.Linear(8, 3)

        def forward(self, x):
            x = self.encoder(x[:, None])[:, 0]
            return {"a": self.a(x), "b": self.b(x)}

    model = Model()
    with pytest.warns(UserWarning, match="1 of 5 cannot be masked"):
        scores = disparse_static(model, square_losses, [torch.randn(4, 8)], 0.5)
    report = sparsity_report(model, scores)
    assert list(report.skipped) == list(report.to_dict()["skipped"]) == ["encoder.self_attn.out_proj.weight"]
    assert "left out: encoder.self_attn.out_proj.weight (a parent reads it directly" in " ".join(str(report).split())
    assert not sparsity_report(model).skipped


def test_a_mask_that_only_scales_leaves_alive():
    layer = prune.custom_from_mask(nn.Linear(3, 1, bias=False), "weight", torch.tensor([[0.25, 0.0, 1.0]]))
    assert sparsity_report(layer).alive == 2


def test_scores_of_another_model_object_are_refused(model):
    scores = disparse_static(model, digit_losses, digit_batches(), 0.9)
    with pytest.raises(ValueError, match="scores: must be of this model object"):
        sparsity_report(clone_pruned(model), scores)


def test_a_weight_that_two_layers_share_counts_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    report = sparsity_report(model)
    assert [layer.name for layer in report.layers] == ["0.weight"]
    assert report.total == report.all_parameters == 16


def test_scores_of_other_parameters_of_the_model_are_no_scores_of_another(model):
    scores = score_tasks(model, digit_losses, digit_batches(), parameters=[(model.trunk[0], "bias")])
    assert sparsity_report(model, scores).layers[0].tasks == ()


def test_a_tensor_is_one_input(model):
    x = digit_batches(1)[0][0]
    assert sparsity_report(model, example_inputs=x).to_dict() == sparsity_report(model, example_inputs=(x,)).to_dict()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_what_has_no_weights_or_does_not_run_divides_nothing():
    net = nn.Sequential(nn.Linear(0, 4), nn.Linear(4, 2))
    report = sparsity_report(net)
    assert [layer.name for layer in report.layers] == ["1.weight"]

    class Idle(nn.Sequential):
        def forward(self, x):
            return x

    assert "0 of 0 (no prunable layer ran)" in str(sparsity_report(Idle(nn.Linear(4, 2)), example_inputs=torch.ones(1)))
