"""fasterai takes any object ``criteria(module, granularity, squeeze)``, so our agreement scores go in as one."""

import pytest
import torch
from torch import nn

from client_runs import AMOUNT, client, images, masked, outputs, same, scored, zeros
from disparse_plugin.masks import attach_masks, masks_of
from networks import TwoHeads

pytestmark = pytest.mark.clients

DIMENSION = {"filter": 0, "row": 0, "shared_kernel": 1, "column": 1}


class Agreement:
    """What a user writes: agreement scores as criteria; of a channel, the mean over its weights."""

    def __init__(self, scores):
        self.importance = scores.importance()

    def __call__(self, module, granularity, squeeze=False):
        scores = self.importance[module, "weight"]
        if granularity == "weight":
            return scores
        over = [axis for axis in range(scores.dim()) if axis != DIMENSION[granularity]]
        return scores.mean(over, keepdim=not squeeze)

    def update_weights(self, _):
        pass


class TestSparsifier:
    def sparsifier(self, model, scores, granularity="weight", context="global"):
        layers = (nn.Conv2d, nn.Linear)
        kind = client("fasterai.sparse.all").Sparsifier
        return kind(model, granularity, context, criteria=Agreement(scores), layer_type=layers)

    def test_global_masks_are_ours_at_the_count_that_it_reaches(self):
        """It keeps all scores from a threshold on, so it prunes one weight less than asked, and ties together."""
        model, scores = scored()
        fitting = dict(zip(scores.names, scores.parameters, strict=True))
        self.sparsifier(model, scores).sparsify_model(AMOUNT)
        pruned, total = sum(int(z.sum()) for z in zeros(model).values()), sum(z.numel() for z in zeros(model).values())
        assert pruned == pytest.approx(AMOUNT * total, abs=3)
        expected = scores.masks(pruned)
        assert same(zeros(model), {name: ~expected[key] for name, key in fitting.items()})
        assert all(torch.equal(module._mask != 0, expected[module, name]) for module, name in scores.parameters)

    def test_whole_filters(self):
        model, scores = scored()
        self.sparsifier(model, scores, "filter", "local").sparsify_model({"trunk.3": 0.5})
        gone = (model.trunk[3].weight.flatten(1) == 0).all(1)
        order = scores.importance()[model.trunk[3], "weight"].mean((1, 2, 3)).argsort()
        assert 0 < int(gone.sum()) <= 3
        assert set(gone.nonzero().flatten().tolist()) == set(order[: int(gone.sum())].tolist())

    def test_its_masks_become_those_of_torch(self):
        """It holds its masks in ``_mask`` buffers, which neither torch nor we read: hand them over."""
        model, scores = scored()
        sparsifier = self.sparsifier(model, scores)
        sparsifier.sparsify_model(AMOUNT)
        expected = outputs(model)
        assert masks_of(model) == {}
        attach_masks(model, {key: key[0]._mask != 0 for key in scores.parameters})
        assert same(outputs(model), expected)

    def test_a_model_that_torch_has_pruned_is_not_sparsified(self):
        """Its writes go to the effective weight, which the next forward makes anew from ``weight_orig``."""
        model = masked()
        before = outputs(model)
        _, scores = scored(model)
        self.sparsifier(model, scores).sparsify_model(0.9)
        assert same(outputs(model), before)


class TestPruner:
    """It hands torch-pruning an importance of its own, which asks the criteria for each layer of a group."""

    def test_channels_go_by_their_agreement(self):
        model, scores = scored(TwoHeads(width=8))
        first, second, dense = model.trunk[0], model.trunk[3], model.trunk[0].weight.detach().clone()
        importance = scores.importance()
        of_channel = importance[first, "weight"].mean((1, 2, 3)) + importance[second, "weight"].mean((0, 2, 3))
        kept = of_channel.argsort(descending=True)[:4].sort().values
        kind = client("fasterai.prune.all").Pruner
        kind(model, 0.5, "local", Agreement(scores), example_inputs=images()).prune_model()
        assert torch.equal(model.trunk[0].weight, dense[kept])
        assert (second.in_channels, second.out_channels) == (4, 4)
        assert {task: tuple(out.shape) for task, out in outputs(model).items()} == {"a": (4, 3), "b": (4, 3)}

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
    def test_a_masked_model_is_to_be_folded_first(self):
        """torch-pruning makes a Parameter of the effective weight, and the mask's hook cannot set it any more."""
        model, scores = scored(masked(TwoHeads(width=8)))
        kind = client("fasterai.prune.all").Pruner
        pruner = kind(model, 0.5, "local", Agreement(scores), example_inputs=images())
        pruner.prune_model()
        with pytest.raises(TypeError, match=r"cannot assign .* as parameter 'weight'"):
            outputs(model)
