"""Masked weights stay exactly zero under every optimizer, and regrown ones start with fresh moments."""

import pytest
import torch
from torch import nn

from disparse_plugin import prunable_parameters
from disparse_plugin.sparse_training import DiSparseScheduler, register_optimizer
from disparse_plugin.sparse_training.optimizer_state import forget
from networks import TwoHeads, digit_losses
from runs import Run, masks_of

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.1),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01, weight_decay=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.5, weight_decay=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, weight_decay=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01, weight_decay=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.02),
}
START = {("adagrad", "sum"): 0.5, ("rprop", "step_size"): 0.02}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masked_weights_do_not_drift_and_regrown_ones_start_afresh(name):
    run = Run(OPTIMIZERS[name])
    for step in range(6):
        before = masks_of(run.model)
        updates = run.train(1, first=step)
        for module, _ in prunable_parameters(run.model):
            assert bool((module.weight_orig[module.weight_mask == 0] == 0).all())
        if not updates:
            continue
        assert sum(updates[0].exchanged.values()) > 0
        for full_name, mask in masks_of(run.model).items():
            module = run.model.get_submodule(full_name.removesuffix(".weight_mask"))
            regrown = (mask != 0) & (before[full_name] == 0)
            assert bool((module.weight_orig[regrown] == 0).all())
            for state, value in run.optimizer.state[module.weight_orig].items():
                if value.shape == mask.shape:
                    fresh = START.get((name, state), 0.0)
                    assert bool((value[regrown | (mask == 0)] == fresh).all()), state
                    assert bool((value[(mask != 0) & ~regrown] != fresh).any()), state


def test_what_is_fresh_is_what_the_weights_own_group_says():
    one, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    rprop = torch.optim.Rprop([{"params": [one], "lr": 0.25}, {"params": [other], "lr": 0.75}])
    for _ in range(2):
        rprop.zero_grad()
        (one.sum() + other.sum()).backward()
        rprop.step()
    forget(rprop, other, torch.tensor([True, False]))
    assert float(rprop.state[other]["step_size"][0]) == 0.75
    assert float(rprop.state[other]["step_size"][1]) != 0.75


def test_regrown_weights_then_train():
    run = Run(OPTIMIZERS["adam"])
    before = masks_of(run.model)
    run.train(3)
    for name, mask in masks_of(run.model).items():
        module = run.model.get_submodule(name.removesuffix(".weight_mask"))
        regrown = (mask != 0) & (before[name] == 0)
        assert not bool(regrown.any()) or bool((module.weight_orig[regrown] != 0).any())


class Blend(torch.optim.Optimizer):
    """An optimizer from somewhere else, with one state per weight."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 0.5)
                parameter.data.add_(average, alpha=-group["lr"])


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.LBFGS(p),
        lambda p: torch.optim.Adafactor(p),
        lambda p: torch.optim.SparseAdam(list(p)),
        lambda p: Blend(p),
    ],
)
def test_an_unknown_optimizer_is_refused_by_name(make):
    model = TwoHeads()
    optimizer = make(model.parameters())
    with pytest.raises(TypeError, match=f"optimizer: .* found {type(optimizer).__name__}"):
        DiSparseScheduler(model, optimizer, digit_losses, amount=0.9, stop_at=10)
    assert "weight" in model.heads["a"]._parameters


def test_a_registered_optimizer_works():
    class Known(Blend):
        pass

    register_optimizer(Known, average=0.0)
    run = Run(Known)
    assert run.train(4)
    for module, _ in prunable_parameters(run.model):
        assert bool((run.optimizer.state[module.weight_orig]["average"][module.weight_mask == 0] == 0).all())


def test_an_unknown_state_of_a_known_kind_is_refused():
    class Slow(torch.optim.SGD):
        """Keeps one more tensor per parameter."""

    run = Run(lambda p: Slow(p, lr=0.1))
    run.train(1)
    head = run.model.heads["a"].weight_orig
    run.optimizer.state[head]["slow"] = torch.zeros_like(head)
    before = masks_of(run.model)
    with pytest.raises(ValueError, match="found 'slow' of shape"):
        run.train(1, first=1)
    assert all(torch.equal(mask, before[name]) for name, mask in masks_of(run.model).items())


def test_an_optimizer_of_other_parameters_is_refused():
    model = TwoHeads()
    with pytest.raises(ValueError, match=r"optimizer: must train every .* from the same model object$"):
        DiSparseScheduler(model, torch.optim.SGD(TwoHeads().parameters(), lr=0.1), digit_losses, amount=0.9, stop_at=10)
    with pytest.raises(TypeError, match=r"optimizer: must be a torch.optim.Optimizer"):
        DiSparseScheduler(model, nn.Linear(1, 1), digit_losses, amount=0.9, stop_at=10)
