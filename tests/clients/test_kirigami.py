"""torch-kirigami takes any metric with ``score(context, candidates, accepted_impact=...)``: here, our agreement."""

import pytest
import torch

from client_runs import client, images, masked, outputs, scored
from disparse_plugin.masks import fold
from networks import TwoHeads

pytestmark = pytest.mark.clients


class Agreement:
    """What a user writes: of the weights that a candidate removes, the mean agreement score; biases have none."""

    def __init__(self, scores):
        self.importance = {id(getattr(*key)): values for key, values in scores.importance().items()}

    def score(self, context, candidates, *, accepted_impact):
        importance = {ref: self.importance.get(id(tensor)) for ref, tensor in context.graph.tensor_bindings()}
        return [self.mean(context, candidate, accepted_impact, importance) for candidate in candidates]

    def mean(self, context, candidate, accepted_impact, importance):
        regions = client("torch_kirigami.pruning").parameter_regions
        gone = regions(context, candidate, accepted_impact=accepted_impact)
        found = [values_at(importance[part.tensor], part) for part in gone if importance[part.tensor] is not None]
        return float(torch.cat(found).mean())


def values_at(values, selection):
    return torch.cat([values[_grid(region)].flatten() for region in selection.regions])


def _grid(region):
    return torch.meshgrid(*(torch.tensor(list(places)) for places in region.axes), indexing="ij")


def removed(model, metric, width):
    """Remove channels of every layer until this many are left, by greedy choice."""
    kirigami, pruning = client("torch_kirigami"), client("torch_kirigami.pruning")
    pruner = pruning.Pruner(model, graph=kirigami.DependencyGraph.build(model, args=(images(),)))
    candidates = pruner.discover_candidates()
    budget = pruning.ChannelRatio(1 - width / 8)
    return pruner.prune(candidates, budget=budget, strategy=pruning.Greedy(metric))


def test_channels_go_by_their_agreement():
    model, scores = scored(TwoHeads(width=8))
    dense = model.trunk[0].weight.detach().clone()
    weights = [scores.importance()[layer, "weight"] for layer in (model.trunk[0], model.trunk[3])]
    of_channel = torch.cat([weights[0].flatten(1), weights[1].transpose(0, 1).flatten(1)], 1).mean(1)
    kept = of_channel.argsort(descending=True)[:4].sort().values
    pruned, _ = removed(model, Agreement(scores), 4)
    assert torch.equal(pruned.trunk[0].weight, dense[kept])
    assert (pruned.trunk[3].in_channels, pruned.trunk[3].out_channels) == (4, 4)
    assert {task: tuple(out.shape) for task, out in outputs(pruned).items()} == {"a": (4, 3), "b": (4, 3)}


def test_zeros_of_a_folded_model_survive_the_cut():
    model = fold(masked(TwoHeads(width=8)))
    before = model.trunk[0].weight.detach().clone()
    pruned, _ = removed(model, client("torch_kirigami.pruning").Magnitude(), 4)
    assert {tuple(row.flatten().tolist()) for row in pruned.trunk[0].weight} <= {
        tuple(row.flatten().tolist()) for row in before
    }


def test_a_masked_model_is_refused():
    """Its graph knows no hooks, so it says which layers have one: fold first."""
    error = client("torch_kirigami").CaptureError
    with pytest.raises(error, match=r"Forward hooks are outside captured semantics: \('trunk.0', 'trunk.3'"):
        removed(masked(TwoHeads(width=8)), client("torch_kirigami.pruning").Magnitude(), 4)
