"""What holds for every network, every loss, every amount: drawn at random; with the marker ``slow``, for minutes."""

import inspect
import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from disparse_plugin import (
    Budget,
    TaskScores,
    at_least,
    disparse_static,
    layer_adaptive,
    prunable_parameters,
    score_tasks,
)
from disparse_plugin.agreement.patterns import NofM
from disparse_plugin.masks import fold
from networks import Snapshot
from random_nets import WIDTH, recipes

LENGTHS = [pytest.param(60, id="short"), pytest.param(1000, id="long", marks=pytest.mark.slow)]
ARBITERS = st.sampled_from(["unanimous", "majority", "mean", "any", "at_least(2)", at_least(3)])
CRITERIA = ("snip", "taylor", "gradient", "fisher", "magnitude", "layer_adaptive(taylor)")

pytestmark = [
    pytest.mark.filterwarnings("ignore:parameters. .* reached by no task:UserWarning"),
    pytest.mark.filterwarnings("ignore:scores. .* score exactly zero:UserWarning"),
    pytest.mark.filterwarnings("ignore:amount. .* is a number of weights:UserWarning"),
]


def check(examples, function, **strategies):
    """Run a property on so many examples."""
    settings(max_examples=examples)(given(**strategies)(function))()


def excluded(recipe):
    return ["tied", "also_tied"] if recipe.tied else []


def scored(recipe, model, losses=None, **options):
    return score_tasks(model, losses or recipe.losses(), recipe.data(), exclude=excluded(recipe), **options)


def reaching(recipe):
    """Which tasks reach which weight, from the recipe alone; frozen weights count as all others."""
    found = {f"heads.{task}.weight": (task,) for task in recipe.reach}
    for index in range(len(recipe.blocks)):
        tasks = tuple(task for task, reached in recipe.reach.items() if index in reached)
        inner = {"linear": "", "conv": "conv.", "recurrent": "cell.", "rnn": "first."}.get(
            recipe.blocks[index], "linear."
        )
        if tasks:
            found[f"blocks.{index}.{inner}weight"] = tasks
    return found


@pytest.mark.parametrize("examples", LENGTHS)
def test_scoring_leaves_the_model_alone_and_finds_who_reaches_what(examples):
    def holds(recipe, criterion):
        model = recipe.build()
        before = Snapshot(model)
        scores = scored(recipe, model, criterion=criterion)
        before.check()
        found = {name: scores.tasks_reaching(*key) for name, key in zip(scores.names, scores.parameters, strict=True)}
        assert found == reaching(recipe)
        for task in scores:
            for (module, _), score in scores[task].items():
                assert score.shape == module.weight.shape
                assert score.dtype == (torch.float64 if recipe.dtype == torch.float64 else torch.float32)

    check(examples, holds, recipe=recipes(), criterion=st.sampled_from(CRITERIA))


@pytest.mark.parametrize("examples", LENGTHS)
def test_every_amount_is_exact_and_what_is_masked_is_masked(examples):
    def holds(recipe, share, arbiter, counted):
        model = recipe.build()
        scores = scored(recipe, model)
        total = alive = sum(module.weight.numel() for module, _ in scores.parameters)
        for _ in range(2):
            gone = round(share * alive)
            masks = scores.masks(gone if counted else share, arbiter)
            alive -= gone
            assert sum(int(mask.sum()) for mask in masks.values()) == alive
            for (module, name), mask in masks.items():
                prune.custom_from_mask(module, name, mask)
        assert sum(int(module.weight_mask.sum()) for module, _ in scores.parameters) == alive <= total
        model.eval()
        outputs = model(recipe.data()[0])
        fold(model)
        assert all(torch.equal(output, outputs[task]) for task, output in model(recipe.data()[0]).items())
        assert sum(int(module.weight.count_nonzero()) for module, _ in scores.parameters) <= alive

    check(examples, holds, recipe=recipes(), share=st.floats(0, 1), arbiter=ARBITERS, counted=st.booleans())


@pytest.mark.parametrize("examples", LENGTHS)
def test_scale_and_order_of_the_tasks_change_nothing(examples):
    def holds(recipe, data, share, arbiter, pattern):
        scale = {task: 2.0 ** data.draw(st.integers(-10, 10)) for task in recipe.reach}
        order = data.draw(st.permutations(list(recipe.reach)))
        amount = None if pattern == "2:4" else share
        masks = []
        for losses in (recipe.losses(), recipe.losses(scale, order)):
            scores = scored(recipe, recipe.build(), losses)
            fit = (
                scores.parameters
                if pattern == "weights"
                else [k for k in scores.parameters if k[0].weight.shape[1] % 4 == 0]
            )
            some = {
                task: {key: table[key] for key in fit if key in table}
                for task, table in zip(scores, map(scores.__getitem__, scores), strict=True)
            }
            small = TaskScores(nn.ModuleList([module for module, _ in fit]), some, parameters=fit)
            masks.append(small.masks(amount, arbiter, pattern=pattern))
        assert all(torch.equal(one, two) for one, two in zip(*(found.values() for found in masks), strict=True))

    check(
        examples,
        holds,
        recipe=recipes(),
        data=st.data(),
        share=st.floats(0, 1),
        arbiter=ARBITERS,
        pattern=st.sampled_from(["weights", "2:4", "channels"]),
    )


class MyError(Exception):
    """Raised by a user's code."""


def late(result):
    """Losses that do something else at the second batch, when much has been changed already."""

    def make(recipe):
        batches = []

        def losses(model, batch):
            found = recipe.losses()(model, batch)
            batches.append(batch)
            return found if len(batches) < 2 else result(found)

        return {"losses": losses}

    return make


def raised(*_):
    raise MyError


FAULTS = {
    "losses that raise": late(raised),
    "a loss that is NaN": late(lambda found: {task: loss * torch.nan for task, loss in found.items()}),
    "a loss that is infinite": late(lambda found: {task: loss / 0 for task, loss in found.items()}),
    "losses that are a list": late(lambda found: list(found.values())),
    "no losses": late(lambda found: {}),
    "floats": late(lambda found: {task: loss.item() for task, loss in found.items()}),
    "another task": late(lambda found: {**found, "new": next(iter(found.values()))}),
    "a vector": late(lambda found: {task: loss.expand(2) for task, loss in found.items()}),
    "detached losses": lambda recipe: {
        "losses": lambda model, batch: {task: loss.detach() for task, loss in recipe.losses()(model, batch).items()}
    },
    "no function": lambda recipe: {"losses": {"a": 1.0}},
    "a class of losses": lambda recipe: {"losses": nn.MSELoss},
    "a class of arbiters": lambda recipe: {"arbiter": nn.Identity},
    "at least how many": lambda recipe: {"arbiter": at_least},
    "a class of criteria": lambda recipe: {"criterion": nn.Identity},
    "a wrapper of no criterion": lambda recipe: {"criterion": layer_adaptive},
    "a class of budgets": lambda recipe: {"amount": Budget},
    "a class of patterns": lambda recipe: {"pattern": NofM},
    "losses of None": lambda recipe: {"losses": lambda m, b: None},
    "no batches": lambda recipe: {"data": []},
    "one number": lambda recipe: {"data": 3},
    "too few batches": lambda recipe: {"num_batches": 9},
    "minus one batch": lambda recipe: {"num_batches": -1},
    "half a batch": lambda recipe: {"num_batches": 0.5},
    "cycle for ever": lambda recipe: {"cycle": True},
    "a criterion that is none": lambda recipe: {"criterion": "snipp"},
    "a criterion of a number": lambda recipe: {"criterion": 3},
    "a criterion that raises": lambda recipe: {"criterion": raised},
    "a criterion of another shape": lambda recipe: {"criterion": lambda w, g: (w * g).sum()},
    "a criterion that is NaN": lambda recipe: {"criterion": lambda w, g: w * torch.nan},
    "a module of another model": lambda recipe: {"exclude": [nn.Linear(2, 2)]},
    "a name of nothing": lambda recipe: {"exclude": ["nothing.*"]},
    "one name": lambda recipe: {"exclude": "unused"},
    "parameters of another model": lambda recipe: {"parameters": prunable_parameters(nn.Linear(2, 2))},
    "parameters that are none": lambda recipe: {"parameters": []},
    "parameters that are no pairs": lambda recipe: {"parameters": ["heads.task0.weight"]},
    "an arbiter that is none": lambda recipe: {"arbiter": "everyone"},
    "an arbiter of another shape": lambda recipe: {"arbiter": lambda p: p.nan_to_num(0)},
    "an arbiter of the right count and the wrong shape": lambda recipe: {
        "arbiter": lambda p: p.nan_to_num(0).amax(0).unsqueeze(0)
    },
    "an arbiter of percentages": lambda recipe: {"arbiter": lambda p: 100 * p.nan_to_num(0).amax(0)},
    "an arbiter that is NaN": lambda recipe: {"arbiter": lambda p: p.amax(0) * torch.nan},
    "an arbiter of bools": lambda recipe: {"arbiter": lambda p: p.nan_to_num(0).amax(0) > 0.5},
    "an arbiter that raises": lambda recipe: {"arbiter": raised},
    "90 %": lambda recipe: {"amount": 90.0},
    "minus one": lambda recipe: {"amount": -1},
    "NaN": lambda recipe: {"amount": float("nan")},
    "true": lambda recipe: {"amount": True},
    "a string": lambda recipe: {"amount": "0.5"},
    "no amount": lambda recipe: {"amount": None},
    "more than there is": lambda recipe: {"amount": 10**9},
    "parts that are none": lambda recipe: {"amount": {"trunk": 0.5}},
    "floors above all": lambda recipe: {"min_keep": 10**6, "amount": 0.5},
    "a floor of one": lambda recipe: {"min_keep": 1.0},
    "a floor of text": lambda recipe: {"min_keep": "1"},
    "a pattern that is none": lambda recipe: {"pattern": "two of four"},
    "a pattern that fits nothing": lambda recipe: {"pattern": "2:1000", "amount": None},
    "a pattern of a number": lambda recipe: {"pattern": 24},
    "floors with a pattern": lambda recipe: {"pattern": "1:1", "amount": None, "min_keep": 2},
}  # fmt: skip
ARGUMENTS = list(inspect.signature(disparse_static).parameters)


@pytest.mark.parametrize("examples", [pytest.param(3, id="short"), pytest.param(50, id="long", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_names_its_argument_and_leaves_the_model_alone(fault, examples):
    def holds(recipe):
        model = recipe.build()
        given_by_default = {
            "losses": recipe.losses(),
            "data": recipe.data(),
            "amount": 0.5,
            "exclude": excluded(recipe),
        }
        options = {**given_by_default, **FAULTS[fault](recipe)}
        if options.get("parameters"):
            options["exclude"] = []
        before = Snapshot(model)
        with pytest.raises((MyError, TypeError, ValueError)) as error:
            disparse_static(model, **options)
        before.check()
        if not isinstance(error.value, MyError):
            argument = re.match(r"(\w+)(\[.*?\])?( of task .*?)?: ", str(error.value))
            assert argument, error.value
            assert argument[1] in ARGUMENTS, error.value

    check(examples, holds, recipe=recipes())


@pytest.mark.parametrize(
    "examples", [pytest.param(15, id="short"), pytest.param(500, id="long", marks=pytest.mark.slow)]
)
def test_one_call_is_scoring_and_a_cut(examples):
    def holds(recipe, share):
        model, same = recipe.build(), recipe.build()
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            disparse_static(model, recipe.losses(), recipe.data(), share, exclude=excluded(recipe))
            torch.manual_seed(0)
            masks = scored(recipe, same).masks(share)
        for (module, _), mask in zip(_masked(model), masks.values(), strict=True):
            assert torch.equal(module.weight_mask.bool(), mask)
        assert model(torch.zeros(3, WIDTH, dtype=recipe.dtype)).keys() == recipe.reach.keys()

    check(examples, holds, recipe=recipes(), share=st.floats(0, 1))


def _masked(model):
    return [key for key in prunable_parameters(model) if hasattr(key[0], "weight_mask")]
