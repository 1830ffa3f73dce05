"""The pruning methods inside torch.nn.utils.prune, and inside clients that cannot pass scores."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from disparse_plugin import (
    DiSparsePretrained,
    DiSparseStatic,
    disparse_pretrained,
    disparse_static,
    layer_adaptive,
    prunable_parameters,
    score_tasks,
)
from disparse_plugin.criteria import damped
from networks import Snapshot, TwoHeads, digit_batches, digit_losses

METHODS = [DiSparseStatic, DiSparsePretrained]


@pytest.fixture
def model():
    return TwoHeads().eval()


@pytest.fixture
def scores(model):
    return score_tasks(model, digit_losses, digit_batches())


def masks_of(model):
    return {module: module.weight_mask.clone() for module, _ in prunable_parameters(model)}


def same_masks(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("amount", [0.9, 0.0, 1.0, 17, 0, 0.123])
def test_three_lines(model, scores, method, amount):
    prune.global_unstructured(scores.parameters, method, importance_scores=scores.importance(), amount=amount)
    total = sum(module.weight.numel() for module, _ in scores.parameters)
    pruned = amount if isinstance(amount, int) else round(amount * total)
    assert sum(int((module.weight == 0).sum()) for module, _ in scores.parameters) == pruned
    assert prune.is_pruned(model)


def test_torch_users_find_what_they_know(model, scores):
    weight = model.trunk[0].weight
    prune.global_unstructured(scores.parameters, DiSparseStatic, importance_scores=scores.importance(), amount=0.5)
    assert model.trunk[0].weight_orig is weight
    assert {"trunk.0.weight_orig", "trunk.0.weight_mask"} <= set(model.state_dict())
    assert model.trunk[0].weight_mask.dtype == weight.dtype
    output = model(digit_batches(1)[0][0])["a"]
    for module, name in scores.parameters:
        prune.remove(module, name)
    assert not prune.is_pruned(model)
    assert set(model.state_dict()) == set(TwoHeads().state_dict())
    assert torch.equal(model(digit_batches(1)[0][0])["a"], output)


def test_pruned_weights_stay_zero_in_training(model, scores):
    prune.global_unstructured(scores.parameters, DiSparseStatic, importance_scores=scores.importance(), amount=0.8)
    before = masks_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for batch in digit_batches():
        optimizer.zero_grad()
        sum(digit_losses(model.train(), batch).values()).backward()
        optimizer.step()
    model.eval()(digit_batches(1)[0][0])
    assert same_masks(masks_of(model), before)
    assert all((module.weight[before[module] == 0] == 0).all() for module in before)


@pytest.mark.parametrize(
    ("function", "method", "criterion", "default"),
    [
        (disparse_static, DiSparseStatic, "snip", "unanimous"),
        (disparse_pretrained, DiSparsePretrained, "layer_adaptive(damped(taylor, 0.25))", "sum"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"arbiter": "unanimous"}, {"arbiter": "mean"}])
def test_one_call_is_score_then_global_unstructured(model, function, method, criterion, default, options):
    other = copy.deepcopy(model)
    scores = function(model, digit_losses, digit_batches(), 0.9, **options)
    assert scores.criterion == criterion
    expected = score_tasks(other, digit_losses, digit_batches(), criterion=criterion)
    importance = expected.importance(options.get("arbiter", default))
    prune.global_unstructured(expected.parameters, method, importance_scores=importance, amount=0.9)
    assert same_masks(masks_of(model), masks_of(other))


def test_the_papers_rule_is_one_argument_away(model):
    """A criterion that is named is joined as in the paper; to write the default out changes nothing."""
    other, spelled, plain = (copy.deepcopy(model) for _ in range(3))
    disparse_pretrained(model, digit_losses, digit_batches(), 0.9, criterion="taylor")
    scores = score_tasks(other, digit_losses, digit_batches(), criterion="taylor")
    prune.global_unstructured(scores.parameters, DiSparsePretrained, importance_scores=scores.importance(), amount=0.9)
    assert same_masks(masks_of(model), masks_of(other))
    disparse_pretrained(plain, digit_losses, digit_batches(), 0.9)
    written_out = layer_adaptive(damped("taylor", 0.25))
    disparse_pretrained(spelled, digit_losses, digit_batches(), 0.9, criterion=written_out)
    assert same_masks(masks_of(plain), masks_of(spelled))
    assert not same_masks(masks_of(plain), masks_of(model))


def test_channels_last_weights(model):
    """torch's global_unstructured cannot flatten them; the one-call forms do not need to."""
    model.to(memory_format=torch.channels_last)
    other = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    disparse_static(model, digit_losses, digit_batches(1), 0.5, criterion="magnitude")
    disparse_static(other, digit_losses, digit_batches(1), 0.5, criterion="magnitude")
    assert model.trunk[3].weight_orig.is_contiguous(memory_format=torch.channels_last)
    assert same_masks(masks_of(model), masks_of(other))


def test_options_are_passed_on(model):
    some = prunable_parameters(model, exclude=[model.heads])
    scores = disparse_pretrained(
        model, digit_losses, digit_batches(), 0.5, criterion=layer_adaptive("fisher"), parameters=some, num_batches=2
    )
    assert (scores.criterion, scores.num_batches) == ("layer_adaptive(fisher)", 2)
    assert not prune.is_pruned(model.heads)


@pytest.mark.parametrize("method", METHODS)
def test_apply_prunes_one_tensor(model, scores, method):
    key = (model.trunk[3], "weight")
    method.apply(*key, amount=0.75, importance_scores=scores.importance()[key])
    order = scores.importance()[key].flatten().argsort(stable=True)
    pruned = (model.trunk[3].weight_mask.flatten() == 0).nonzero().flatten()
    # importance() now ranks the alive entries only, but their order is what it was
    assert len(pruned) == round(0.75 * model.trunk[3].weight.numel())
    assert set(order[: len(pruned)].tolist()) == set(pruned.tolist())


@pytest.mark.parametrize("values", [[[3.0, -1.0, 2.0, 7.0]], [[0.3, 0.1, 0.2, 0.7]], [[5.0, 5.0, 5.0, 9.0]]])
def test_apply_takes_any_scores_of_one_tensor(values):
    layer = nn.Linear(4, 1)
    DiSparseStatic.apply(layer, "weight", 2, importance_scores=torch.tensor(values))
    expected = torch.ones(4)
    expected[torch.tensor(values[0]).argsort(stable=True)[:2]] = 0
    assert torch.equal(layer.weight_mask[0], expected)


def test_apply_composes_with_other_methods(model, scores):
    layer = model.trunk[3]
    prune.random_unstructured(layer, "weight", 0.5)
    before = layer.weight_mask.bool()
    hook = DiSparseStatic.apply(layer, "weight", 0.5, importance_scores=scores.importance()[layer, "weight"])
    assert isinstance(hook, prune.PruningContainer)
    assert isinstance(hook[-1], DiSparseStatic)
    after = layer.weight_mask.bool()
    assert int(after.sum()) == int(before.sum()) - round(0.5 * int(before.sum()))
    assert not (after & ~before).any()


@pytest.mark.parametrize("method", METHODS)
def test_raw_scores_in_the_range_of_agreement_scores_are_warned_of(model, scores, method):
    task = scores.tasks[0]
    raw = {key: scores[task][key] / max(map(float, map(torch.max, scores[task].values()))) for key in scores[task]}
    with pytest.warns(UserWarning, match=r"needs agreement scores, which are float64, found torch.float32: raw scores"):
        prune.global_unstructured(list(raw), method, importance_scores=raw, amount=0.5)


def test_prune_on_a_loose_tensor():
    weight, agreement = torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([0.1, 0.9, 0.2, 0.3]).double()
    pruned = DiSparseStatic(0.5).prune(weight, importance_scores=agreement)
    assert pruned.tolist() == [0.0, 3.0, 0.0, 1.0]
    partly = DiSparseStatic(1).prune(weight, default_mask=torch.tensor([0.0, 1, 1, 1]), importance_scores=agreement)
    assert partly.tolist() == [0.0, 3.0, 0.0, 1.0]


class TestBound:
    """``bind`` makes a class for clients that cannot pass importance_scores."""

    @pytest.mark.parametrize("method", METHODS)
    def test_prunes_like_the_unbound_method(self, model, scores, method):
        bound = method.bind(scores)
        assert issubclass(bound, method)
        assert bound.PRUNING_TYPE == "unstructured"
        prune.global_unstructured(scores.parameters, bound, amount=0.9)
        found = masks_of(model)
        for module, name in scores.parameters:
            prune.remove(module, name)
        prune.global_unstructured(scores.parameters, method, importance_scores=scores.importance(), amount=0.9)
        assert same_masks(masks_of(model), found)

    def test_repeats(self, model, scores):
        bound, alive = DiSparseStatic.bind(scores, "majority"), sum(m.weight.numel() for m, _ in scores.parameters)
        for _ in range(3):
            prune.global_unstructured(scores.parameters, bound, amount=0.5)
            alive -= round(0.5 * alive)
            assert sum(int(mask.sum()) for mask in masks_of(model).values()) == alive

    def test_apply_uses_its_own_scores(self, model, scores):
        layer, expected = model.trunk[0], scores.importance()[model.trunk[0], "weight"]
        DiSparseStatic.bind(scores).apply(layer, "weight", 0.5)
        assert expected[layer.weight_mask == 0].max() < expected[layer.weight_mask == 1].min()

    def test_follows_the_model_through_training(self, model, scores):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
        prune.global_unstructured(scores.parameters, DiSparseStatic.bind(scores), amount=0.9)
        assert prune.is_pruned(model)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda keys: keys[:-1], "found .* alive entries; prune exactly scores.parameters"),
            (lambda keys: [*keys, (keys[0][0], "bias")], "found .* alive entries; prune exactly scores.parameters"),
            (lambda keys: [keys[1], keys[0], *keys[2:]], "found other values from trunk.0.weight on"),
            (lambda keys: [*keys[:2], keys[3], keys[2]], "found other values from heads.a.weight on"),
            (lambda keys: [(m, "weight") for m, _ in prunable_parameters(TwoHeads())], "from trunk.0.weight on"),
        ],
    )
    def test_says_what_differs(self, model, scores, change, message):
        chosen = change(list(scores.parameters))
        before = Snapshot(model)
        with pytest.raises(ValueError, match=message):
            prune.global_unstructured(chosen, DiSparseStatic.bind(scores), amount=0.5)
        before.check()

    def test_refuses_other_scores(self, model, scores):
        bound = DiSparseStatic.bind(scores)
        with pytest.raises(ValueError, match="no importance_scores"):
            prune.global_unstructured(scores.parameters, bound, importance_scores=scores.importance(), amount=0.5)
        with pytest.raises(ValueError, match="importance_scores: BoundDiSparseStatic carries its own"):
            bound.apply(model.trunk[0], "weight", 0.5, importance_scores=torch.ones(1))
        with pytest.raises(ValueError, match="name: 'bias' of Conv2d must be among the parameters"):
            bound.apply(model.trunk[0], "bias", 0.5)

    def test_needs_scores(self):
        with pytest.raises(TypeError, match="scores: must be TaskScores, found dict; make them with score_tasks"):
            DiSparseStatic.bind({})


class TestBadInput:
    """Nothing is changed before everything has been checked."""

    @pytest.mark.parametrize(
        ("amount", "error", "message"),
        [
            (1.5, ValueError, r"amount: a float must be a fraction in \[0, 1\], found 1.5"),
            (-0.1, ValueError, r"found -0.1"),
            (float("nan"), ValueError, "found nan"),
            (-1, ValueError, "amount: an int must be a count of at least 0, found -1"),
            ("0.9", TypeError, r"amount: must be a float \(fraction\) or an int \(count\), found str"),
            (True, TypeError, "found bool"),
            (None, TypeError, "found NoneType"),
            (10**9, ValueError, "amount: a count must be at most the number of entries still alive, found 1000000000"),
        ],
    )
    def test_amounts(self, model, scores, amount, error, message):
        before, layer = Snapshot(model), model.trunk[0]
        importance = scores.importance()
        calls = [
            lambda: prune.global_unstructured(
                scores.parameters, DiSparseStatic, importance_scores=importance, amount=amount
            ),
            lambda: prune.global_unstructured(scores.parameters, DiSparseStatic.bind(scores), amount=amount),
            lambda: DiSparseStatic.apply(layer, "weight", amount, importance_scores=importance[layer, "weight"]),
            lambda: scores.masks(amount),
            lambda: disparse_static(model, digit_losses, digit_batches(), amount),
        ]
        for call in calls:
            with pytest.raises(error, match=message):
                call()
            before.check()

    @pytest.mark.parametrize("frozen", [False, True])
    def test_no_scores_is_never_a_magnitude_prune(self, model, scores, frozen):
        model.requires_grad_(not frozen)
        before = Snapshot(model)
        with pytest.raises(ValueError, match=r"importance_scores: DiSparseStatic needs .*pass importance_scores="):
            prune.global_unstructured(scores.parameters, DiSparseStatic, amount=0.5)
        with pytest.raises(ValueError, match="needs scores, found None; pass importance_scores="):
            DiSparseStatic.apply(model.trunk[0], "weight", 0.5)
        before.check()

    def test_scores_missing_for_one_parameter(self, model, scores):
        importance = scores.importance()
        del importance[scores.parameters[1]]
        before = Snapshot(model)
        with pytest.raises(ValueError, match="for every parameter, found weights in their place"):
            prune.global_unstructured(scores.parameters, DiSparseStatic, importance_scores=importance, amount=0.5)
        before.check()

    def test_scores_of_another_model(self, model, scores):
        other = TwoHeads()
        before = Snapshot(other)
        with pytest.raises(ValueError, match="found weights in their place"):
            prune.global_unstructured(
                prunable_parameters(other), DiSparseStatic, importance_scores=scores.importance(), amount=0.5
            )
        before.check()

    def test_scores_that_are_no_agreement_scores(self, model, scores):
        before = Snapshot(model)
        for bad in (5.0, -0.1, float("nan")):
            importance = scores.importance()
            importance[scores.parameters[0]][0, 0, 0, 0] = bad
            with pytest.raises(ValueError, match=rf"agreement scores in \[0, 1\], found {bad}"):
                prune.global_unstructured(scores.parameters, DiSparseStatic, importance_scores=importance, amount=0.5)
        before.check()

    @pytest.mark.parametrize("pruned", [False, True])
    @pytest.mark.parametrize(
        ("given", "error", "message"),
        [
            (torch.ones(2), ValueError, r"must have the tensor's shape \(6, 1, 3, 3\), found \(2,\)"),
            (torch.full((6, 1, 3, 3), torch.nan), ValueError, "must be finite, found NaN"),
            (torch.ones(6, 1, 3, 3, dtype=torch.long), TypeError, "must be a floating point tensor, found torch.int64"),
            ([1.0], TypeError, "must be a floating point tensor, found list"),
        ],
    )
    def test_apply(self, model, pruned, given, error, message):
        if pruned:
            prune.random_unstructured(model.trunk[0], "weight", 0.5)
        before = Snapshot(model)
        with pytest.raises(error, match=message):
            DiSparseStatic.apply(model.trunk[0], "weight", 0.5, importance_scores=given)
        before.check()

    def test_apply_to_what_is_no_parameter(self, model):
        with pytest.raises(ValueError, match=r"parameters: weigth must be a parameter, found .*\['bias', 'weight'\]"):
            DiSparseStatic.apply(model.trunk[0], "weigth", 0.5, importance_scores=torch.ones(1))


@pytest.mark.parametrize("without", ["gradients", "training"])
def test_biases_without_scores_are_noticed_where_nothing_asks_for_a_gradient(model, scores, without):
    if without == "training":
        model.requires_grad_(False)
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()
    biases = [(module, "bias") for module, _ in scores.parameters]
    with torch.set_grad_enabled(without != "gradients"), pytest.warns(UserWarning, match="exactly 0 or 1, as biases"):
        prune.global_unstructured(
            [*scores.parameters, *biases], DiSparseStatic, importance_scores=scores.importance(), amount=0.5
        )


def test_one_call_masks_all_or_none(model, monkeypatch):
    custom, calls = prune.custom_from_mask, []

    def failing(module, name, mask):
        calls.append(module)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return custom(module, name, mask)

    monkeypatch.setattr(prune, "custom_from_mask", failing)
    before = Snapshot(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        disparse_static(model, digit_losses, digit_batches(), 0.5)
    before.check()


def test_scores_of_a_weight_that_was_another_are_refused(model, scores):
    for again in (scores.masks, scores.importance):
        layer = scores.parameters[0][0]
        values = layer.weight.data
        layer.weight.data = values.reshape(values.shape[0], -1)[:, :-1]
        with pytest.raises(ValueError, match=r"scores: must be of the model as it is, found .* score the model again"):
            again(0.5) if again == scores.masks else again()
        layer.weight.data = values
