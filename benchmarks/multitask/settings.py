"""The settings of the accuracy benchmark: which network and which budget go with which problem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from .data.cityscapes import cityscapes
from .data.digits import digits
from .data.nyuv2 import nyuv2
from .data.paper_lists import cityscapes_list, nyuv2_list, taskonomy_list
from .data.questions import questions
from .data.rooms import rooms
from .data.taskonomy import taskonomy
from .data.trunk import clothes_and_digits
from .data.yeast import yeast
from .problem.paper_setup import SETUPS, PaperSetup
from .problem.problem import Problem
from .training.bench import Budget, Setting
from .training.networks import dense_resnet, mlp, paper_network, small_resnet, tapped_resnet
from .training.trunk import pretrained_mobilenet

DIGITS = Budget(train=300, tune=100, batch_size=64, scored=20, rates=(0.03, 0.1, 0.3))
# For unequal loss weights: Adam trains the head of a task with a small weight as fast as the others.
DIGITS_ADAM = Budget(train=500, tune=150, batch_size=64, scored=20, rates=(3e-3, 1e-2), optimizer="adamw", decay=1e-4)
YEAST = Budget(train=400, tune=150, batch_size=64, scored=20, rates=(3e-4, 1e-3, 3e-3), optimizer="adamw", decay=1e-2)
ROOMS = Budget(train=300, tune=100, batch_size=16, scored=20, rates=(1e-3, 3e-3, 1e-2), optimizer="adamw", decay=1e-4)
# From weights trained on ImageNet: validation stops improving long before the other networks' does. What a cut leaves
# is far from trained, and wants larger steps than the dense network.
TRUNK = Budget(
    train=900,
    tune=180,
    batch_size=32,
    scored=20,
    rates=(3e-4, 1e-3, 3e-3),
    tune_rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    optimizer="adamw",
    decay=1e-2,
)


def _as_the_paper(setup: PaperSetup) -> Budget:
    """The paper's hyperparameters; nothing is left to choose."""
    return Budget(
        train=setup.iterations,
        tune=setup.tuning_iterations,
        batch_size=setup.batch,
        scored=setup.scoring_batches,
        scored_size=setup.scoring_batch,
        rates=(setup.rate,),
        tune_rates=(setup.tuning_rate,),
        step_decay=(setup.rate_factor, setup.rate_every),
        optimizer="adam",
        decay=setup.l2,
        update_every=setup.dynamic_every,
        evaluated=4,
    )


def _digits(mix: str) -> Callable[[Path], Problem]:
    return partial(digits, mix, size=28, validation=3000)


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("multimnist", _digits("multimnist"), small_resnet, DIGITS),
        Setting("multifashion", _digits("multifashion"), small_resnet, DIGITS),
        Setting("fashion+mnist", _digits("fashion+mnist"), small_resnet, DIGITS),
        Setting("fashion+mnist-adam", _digits("fashion+mnist"), small_resnet, DIGITS_ADAM),
        Setting("questions", questions, tapped_resnet, DIGITS_ADAM),
        Setting("trunk", clothes_and_digits, pretrained_mobilenet, TRUNK, trained=True),
        Setting("yeast", yeast, mlp, YEAST),
        Setting("rooms", rooms, dense_resnet, ROOMS, long_rates=(1e-3, 3e-3, 1e-2, 3e-2)),
        Setting("nyuv2", nyuv2, paper_network, _as_the_paper(SETUPS["nyuv2"])),
        Setting("nyuv2-40", partial(nyuv2, classes=40), paper_network, _as_the_paper(SETUPS["nyuv2"])),
        Setting("cityscapes", cityscapes, paper_network, _as_the_paper(SETUPS["cityscapes"])),
        Setting("taskonomy", taskonomy, paper_network, _as_the_paper(SETUPS["taskonomy"])),
        Setting("nyuv2-archive", nyuv2_list, paper_network, _as_the_paper(SETUPS["nyuv2"])),
        Setting("cityscapes-archive", cityscapes_list, paper_network, _as_the_paper(SETUPS["cityscapes"])),
        Setting("taskonomy-archive", taskonomy_list, paper_network, _as_the_paper(SETUPS["taskonomy"])),
    )
}

LONG_TRAIN, LONG_TUNE = 3000, 600  # steps
LONG_RATES = {"sgd": (0.01, 0.03, 0.1, 0.3, 1.0), "adamw": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)}  # wide: the best is inside


def prolonged(setting: Setting) -> Setting:
    """Train about ten times longer before the cut, and tune for a fifth of that, as networks that people prune are.

    A network that starts from trained weights is one already, and keeps its budget.

    Raises:
        ValueError: If the setting takes as many steps already.
    """
    if setting.trained:
        return setting
    if setting.budget.train >= LONG_TRAIN:
        raise ValueError(
            f"regime: long must lengthen the training, found {setting.name} with {setting.budget.train} steps already; "
            "leave it out"
        )
    rates = setting.long_rates or LONG_RATES.get(setting.budget.optimizer, setting.budget.rates)
    return replace(setting, budget=replace(setting.budget, train=LONG_TRAIN, tune=LONG_TUNE, rates=rates))


def weighted(setting: Setting, weights: Sequence[float]) -> Setting:
    """Train with these relative loss weights, one per task in the problem's order.

    Only their ratios matter: their mean is made 1, so that they shift the balance of the tasks and not the step size.
    """

    def load(root: Path) -> Problem:
        problem = setting.load(root)
        if len(weights) != len(problem.tasks) or min(weights) <= 0:
            names = ", ".join(task.name for task in problem.tasks)
            raise ValueError(f"weights: one positive number for each of {names}; found {[*weights]}")
        mean = sum(weights) / len(weights)
        tasks = tuple(replace(task, weight=weight / mean) for task, weight in zip(problem.tasks, weights, strict=True))
        return replace(problem, tasks=tasks)

    return replace(setting, name="-".join([setting.name, *(f"{weight:g}" for weight in weights)]), load=load)
