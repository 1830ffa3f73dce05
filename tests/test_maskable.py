"""What cannot be masked is left out by default, and refused with a list to paste where it was asked for."""

import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from disparse_plugin import disparse_static, prunable_parameters
from disparse_plugin.maskable import check_parameters, select
from disparse_plugin.masks import attach_masks, fold
from disparse_plugin.masks.in_place import attach_in_place
from disparse_plugin.sparse_training import GradualPruning
from networks import TwoHeads


def mixed():
    """Each of the obstacles that an unrun model shows, and two layers without any."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(8)))
    parametrizations.weight_norm(model[1])
    model[3].weight = model[2].weight
    model[4].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.complex64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nothing to initialise, and of what is deprecated
        model[5] = nn.Linear(0, 4)
        nn.utils.weight_norm(model[6])
    model.add_module("attention", nn.MultiheadAttention(4, 2))
    return model


def test_by_default_it_is_left_out_with_the_reason():
    selection = select(mixed(), None)
    assert selection.names == ("0.weight", "7.weight")
    assert not selection.listed
    expected = {
        "1.weight": "computed by a parametrization",
        "2.weight": r"2\.weight and 3\.weight tied",
        "3.weight": r"2\.weight and 3\.weight tied",
        "4.weight": r"torch\.complex64",
        "5.weight": r"shape \(4, 0\)",
        "6.weight": "what torch.nn.utils.weight_norm makes anew at every forward",
        "attention.out_proj.weight": "a parent reads it directly",
    }
    assert list(selection.skipped) == list(expected)
    assert all(re.search(reason, selection.skipped[name]) for name, reason in expected.items())


def test_one_warning_says_all_of_it_and_what_to_paste_does_away_with_it():
    model = mixed()
    with pytest.warns(UserWarning, match=r"parameters: 7 of 9 cannot be masked .* 4\.weight \(torch") as seen:
        keys = check_parameters(model, None)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    pasted = re.search(r"exclude=(\[.*\])", str(seen[0].message))[1]
    assert check_parameters(model, None, exclude=eval(pasted)) == keys


def test_listed_it_is_refused_and_what_to_paste_works():
    model = mixed()
    with pytest.raises(ValueError, match=r"1\.weight must be a plain parameter, .* \(and so for 2\.weight, ") as caught:
        select(model, prunable_parameters(model), exclude=())
    pasted = re.search(r"exclude=(\[.*\])", str(caught.value))[1]
    selection = select(model, prunable_parameters(model), exclude=eval(pasted))
    assert selection.names == ("0.weight", "7.weight")
    assert selection.skipped == {}
    assert selection.listed


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_an_old_norm_goes_as_the_message_says(norm):
    layer = nn.Linear(4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are deprecated
        getattr(nn.utils, norm)(layer)
    with pytest.raises(ValueError, match="parameters: weight must be a plain parameter") as caught:
        check_parameters(layer, prunable_parameters(layer))
    advised = re.search(r"call torch\.nn\.utils\.(\w+) first", str(caught.value))[1]
    getattr(nn.utils, advised)(layer)
    assert check_parameters(layer, None) == ((layer, "weight"),)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: nn.LazyLinear(4), "must have a shape, found a lazy parameter; run one batch through the model first$"),
        (lambda: nn.Linear(4, 4, device="meta"), "must hold values, found the meta device; materialise the model"),
    ],
)
def test_what_one_step_cures_is_never_left_out(layer, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that lazy modules are in development
        model = nn.Sequential(nn.Linear(4, 4), layer())
    with pytest.raises(ValueError, match=message):
        select(model, None)


def test_parts_of_one_flat_memory_are_tied_to_it_all():
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(3)))
    model.register_parameter("flat", nn.Parameter(torch.zeros(36)))
    for place, layer in enumerate([model[0], model[1]]):
        layer.weight = nn.Parameter(model.flat.detach()[9 * place : 9 * place + 9].view(3, 3))
    selection = select(model, None)
    assert selection.names == ("2.weight",)
    assert selection.skipped["1.weight"] == "flat and 1.weight tied"


def test_an_attention_that_runs_its_projection_keeps_it():
    class Own(nn.MultiheadAttention):
        def forward(self, x):
            return self.out_proj(x)

    assert select(nn.Sequential(Own(4, 2)), None).names == ("0.out_proj.weight",)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            lambda model: model.parameters(),
            r"found a Parameter of shape \(6, 1, 3, 3\) \(model.parameters\(\) does not",
        ),
        (lambda model: model.named_parameters(), r"found \('trunk.0.weight', a Parameter\), as of model.named_par"),
        (lambda model: model, r"parameters: must be a list of \(module, name\) pairs, found TwoHeads"),
        (lambda model: "trunk.0.weight", "parameters: must be a list .* found str"),
        (lambda model: 3, "parameters: must be a list .* found int"),
        (lambda model: ["trunk.0.weight"], "found str 'trunk.0.weight'; use prunable_parameters"),
        (lambda model: [(model.trunk[0], 0)], "every entry must be a .module, name. pair, found a tuple"),
    ],
)
def test_what_is_no_list_of_pairs(parameters, message):
    model = TwoHeads()
    with pytest.raises(TypeError, match=message):
        select(model, parameters(model))


class Causal(nn.Linear):
    """Keeps a triangle of its weights, by a buffer that has the name which torch gives to masks."""

    def __init__(self):
        super().__init__(4, 4, bias=False)
        self.register_buffer("weight_mask", torch.ones(4, 4).tril())

    def forward(self, x):
        return x @ (self.weight * self.weight_mask).T


class Noted(nn.Linear):
    """Has an attribute of the name that torch gives to the weight behind a mask."""

    weight_orig = None


@pytest.mark.parametrize(("kind", "name"), [(Causal, "weight_mask"), (lambda: Noted(4, 4), "weight_orig")])
def test_a_layer_with_a_mask_of_its_own_keeps_it(kind, name):
    model = nn.Sequential(kind(), nn.Linear(4, 2))
    before = getattr(model[0], name)

    def losses(model, x):
        return {"a": model(x)[:, 0].square().mean(), "b": model(x)[:, 1].square().mean()}

    with pytest.warns(UserWarning, match=f"0.weight .*{name} of its own"):
        scores = disparse_static(model, losses, [torch.randn(3, 4)], 0.5)
    assert list(scores.skipped) == ["0.weight"]
    assert getattr(model[0], name) is before
    assert fold(model)(torch.randn(3, 4)).shape == (3, 2)
    with pytest.raises(ValueError, match=f"leave the name {name} free"):
        attach_masks(model, {"0.weight": torch.ones(4, 4, dtype=torch.bool)})


def test_a_mask_that_scales_weights_is_refused():
    layer = nn.Linear(2, 1)
    prune.custom_from_mask(layer, "weight", torch.tensor([[0.5, 1.0]]))
    mask = {"weight": torch.tensor([[False, True]])}
    with pytest.raises(ValueError, match="weight must carry a mask of zeros and ones, if any, found a mask with"):
        attach_in_place(layer, mask)
    with pytest.raises(ValueError, match="zeros and ones"):
        GradualPruning(
            layer, torch.optim.SGD(layer.parameters(), 0.1), lambda model, x: {"a": model(x)}, amount=0.5, stop_at=1
        )
    assert layer.weight_mask.tolist() == [[0.5, 1.0]]
    attach_masks(layer, mask)
    assert layer.weight_mask.tolist() == [[0.0, 1.0]]
    attach_in_place(layer, mask)  # one of zeros and ones is combined with another
    assert layer.weight_mask.tolist() == [[0.0, 1.0]]
