"""Patterns of weights that lie as (inputs, outputs): transposed convolutions, and the Conv1D of transformers."""

import numpy as np
import pytest
import torch
from torch import nn

from disparse_plugin import TaskScores
from disparse_plugin.sparse_training import GradualPruning

LAYERS = {
    "one group": lambda: nn.ConvTranspose2d(3, 4, 2),
    "groups": lambda: nn.ConvTranspose1d(6, 8, 3, groups=2),
    "outputs first": lambda: nn.Conv2d(3, 4, 2),
}


def outputs_of(layer: nn.Module, values: np.ndarray) -> list[np.ndarray]:
    """Return the entries of each output channel, from the layer's definition."""
    if not layer.transposed:
        return list(values)
    inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    groups = range(layer.groups)
    return [values[g * inputs : (g + 1) * inputs, place] for g in groups for place in range(outputs)]


@pytest.mark.parametrize("kind", LAYERS)
def test_channels_are_output_channels(kind):
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    key = (layer, "weight")
    score = torch.rand(layer.weight.shape)
    scores = TaskScores(layer, {"a": {key: score}})
    for amount in (1, 0.5, layer.out_channels - 1):
        mask = scores.masks(amount, pattern="channels")[key].numpy()
        count = amount if isinstance(amount, int) else round(amount * layer.out_channels)
        sums = [entries.astype(np.float64).sum() for entries in outputs_of(layer, score.numpy())]
        lowest = set(np.argsort(sums)[:count].tolist())
        assert [not kept.any() for kept in outputs_of(layer, mask)] == [c in lowest for c in range(layer.out_channels)]
        assert all(kept.all() or not kept.any() for kept in outputs_of(layer, mask))


@pytest.mark.parametrize("kind", LAYERS)
def test_masked_channels_are_silent_after_gradual_pruning(kind):
    torch.manual_seed(0)
    net = nn.Sequential(LAYERS[kind]())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x = torch.randn(2, net[0].in_channels, *[5] * (net[0].weight.dim() - 2))

    def losses(model, batch):
        out = model(batch)
        return {"a": out.square().mean(), "b": (out - 1).square().mean()}

    options = {"amount": 0.5, "pattern": "channels", "update_every": 1, "stop_at": 2}
    pruning = GradualPruning(net, optimizer, losses, **options)
    for _ in range(2):
        optimizer.zero_grad()
        sum(losses(net, x).values()).backward()
        optimizer.step()
        stage = pruning.step(x)
    assert stage.sparsity == 0.5
    out = net(x) - net[0].bias.view(1, -1, *[1] * (x.dim() - 2))
    assert int((out.abs().amax(dim=(0, *range(2, out.dim()))) == 0).sum()) == net[0].out_channels // 2
    assert pruning.unfinished() is None


def test_n_of_m_along_the_inputs_is_refused_where_they_do_not_come_second():
    layer = nn.ConvTranspose2d(4, 4, 1)
    scores = TaskScores(layer, {"a": {(layer, "weight"): torch.rand(layer.weight.shape)}})
    message = r"pattern: with '2:4' every input dimension \(dimension 1; transposed convolutions have no such\).*weight"
    with pytest.raises(ValueError, match=message):
        scores.masks(pattern="2:4")


def test_n_of_m_of_a_number_is_refused_like_all_that_does_not_fit():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))

    model = Scaled()
    with pytest.raises(ValueError, match=r"pattern: with '2:4'.*scale of shape \(\)"):
        TaskScores(model, {"a": {(model, "scale"): torch.tensor(0.5)}}).masks(pattern="2:4")
