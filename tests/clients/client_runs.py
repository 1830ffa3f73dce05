"""What the tests of clients share: reaching a client without its warnings, and a pruned model of two tasks."""

import importlib
import warnings

import pytest
import torch

from disparse_plugin import DiSparseStatic, score_tasks
from disparse_plugin.masks import masks_of
from networks import TwoHeads, digit_batches, digit_losses

AMOUNT = 0.6


def client(module):
    """Import a module of a client, or skip the test; a client that is there but cannot be imported fails it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a client warns of while it is imported is not ours to mend
        reason = f"needs {module.split('.')[0]}: pip install 'disparse-plugin[clients]'"
        return pytest.importorskip(module, reason=reason, exc_type=ModuleNotFoundError)


def our_callback():
    """The module of our callback; once the client is there, it must be importable."""
    client("transformers")
    return importlib.import_module("disparse_plugin.hf_trainer")


def scored(model=None):
    """A model in eval mode, and its scores."""
    model = (TwoHeads() if model is None else model).eval()
    return model, score_tasks(model, digit_losses, digit_batches())


def masked(model=None):
    """A model pruned by our masks through torch."""
    model, scores = scored(model)
    prune_by(scores)
    return model


def prune_by(scores):
    torch.nn.utils.prune.global_unstructured(
        scores.parameters, DiSparseStatic, importance_scores=scores.importance(), amount=AMOUNT
    )


def images():
    return digit_batches(1)[0][0]


def outputs(model):
    """What the model computes, one tensor per task."""
    with torch.no_grad():
        return model(images())


def same(one, other, tolerance=0.0):
    return one.keys() == other.keys() and all(
        torch.allclose(one[task].float(), other[task].float(), rtol=tolerance, atol=tolerance) for task in one
    )


def zeros(model):
    """Where the weights that the model computes with are 0."""
    return {name: weight == 0 for name, weight in effective(model).items()}


def effective(model):
    return {
        f"{path}.weight": module.weight.detach()
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)
    }


def masks_by_name(model):
    """The masks of a model pruned through torch, under the names that :func:`zeros` gives."""
    return {name: ~mask for name, mask in masks_of(model).items()}
