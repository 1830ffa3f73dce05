"""The methods that are compared: a way to prune, in a protocol of training, under a name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch.nn.utils import prune
from torch_pruning.pruner.importance import GroupMagnitudeImportance, GroupTaylorImportance, RandomImportance

from disparse_plugin import at_least, disparse_pretrained, disparse_static, layer_adaptive
from disparse_plugin.criteria import damped

from ..training.bench import Bench
from .channel_cuts import by_torch_pruning, channels, channels_with_floor
from .cuts import Cut, by_part, plain, scored, with_floor
from .mean_added import mean_added
from .procedures import (
    Procedure,
    at_start,
    both_stages,
    gradual_pruning,
    iterative,
    lottery,
    lottery_steps,
    on_the_way,
    one_shot,
    sparse_training,
    untouched,
)

TUNED_AT = 0.98
CHANNEL_AMOUNTS = (0.5, 0.75, 0.9, 0.95)  # beyond them, networks this narrow keep a channel or two in a layer
CHANNELS_TUNED_AT = 0.9
FEW = 4  # batches that are scored at each of many cuts
EXPONENTS = (0.25, 0.5)  # of the damped saliency
MEAN_ADDED = ", mean added"  # ends the name of a rule that adds a tensor's mean to the gradients
# After which shares of the training it is cut: once, or in stages of equal distance by the cubic schedule.
WINDOWS = {
    "cut at 1/4": (0.25,),
    "gradual to 1/2": (0.1, 0.2, 0.3, 0.4, 0.5),
    "gradual to 3/4": (0.15, 0.3, 0.45, 0.6, 0.75),
}


@dataclass(frozen=True)
class Method:
    """A method: how it is called, what it does, and how much training it takes."""

    name: str
    family: Literal["dense", "one-shot", "iterative", "at the start", "on the way", "sparse training", "channels"]
    procedure: Procedure
    steps: Callable[[Bench], int]  # optimizer steps, the dense training included
    ours: bool = False  # looks at the tasks one by one
    twin: str = ""  # the method that differs in seeing the weighted sum of the losses, and in nothing else
    without: str = ""  # the method that differs in having no floor, budget per part or rule across layers
    amounts: tuple[float, ...] = ()  # where it is measured; where the benchmark is asked to, if there are none
    tuned_at: float = TUNED_AT  # the amount that its learning rate is chosen at
    least_tasks: int = 2  # with fewer, another method is the same


adaptive = layer_adaptive("taylor")
trained = partial(scored, disparse_pretrained)
initial = partial(scored, disparse_static)


def _methods() -> Iterator[Method]:
    yield Method("dense", "dense", untouched, both_stages)
    yield from _one_shot_methods()
    yield from _iterative_methods()
    yield from _methods_at_the_start()
    yield from _methods_on_the_way()
    yield from _sparse_training_methods()
    yield from _channel_methods()


def _one_shot_methods() -> Iterator[Method]:
    def make(name: str, cut: Cut, **facts: Any) -> Method:
        return Method(name, "one-shot", one_shot(cut), both_stages, **facts)

    yield make("random", plain(prune.RandomUnstructured))
    yield make("magnitude", plain(prune.L1Unstructured))
    yield make("LAMP", trained("sum", criterion="lamp"))
    yield make("LAMP with reach", trained("tasks", criterion="lamp", arbiter="sum"))
    yield make("Taylor, joint", trained("sum", criterion="taylor"))
    yield make("adaptive Taylor, joint", trained("sum", criterion=adaptive))
    yield make("DiSparse Taylor", trained("tasks", criterion="taylor"), ours=True, twin="Taylor, joint")
    yield make("DiSparse adaptive", trained("tasks", criterion=adaptive), ours=True, twin="adaptive Taylor, joint")
    for exponent in EXPONENTS:
        yield from _damped_methods(exponent, make)
    yield make("Taylor, mean arbiter", trained("tasks", criterion="taylor", arbiter="mean"), ours=True)
    yield make("adaptive, mean arbiter", trained("tasks", criterion=adaptive, arbiter="mean"), ours=True)
    yield make("adaptive, any arbiter", trained("tasks", criterion=adaptive, arbiter="any"), ours=True)
    several: dict[str, Any] = {"ours": True, "least_tasks": 3}
    yield make("adaptive, at least two", trained("tasks", criterion=adaptive, arbiter=at_least(2)), **several)
    yield make("adaptive, majority", trained("tasks", criterion=adaptive, arbiter="majority"), **several)
    yield make(
        "DiSparse Taylor, floor",
        with_floor(disparse_pretrained, criterion="taylor"),
        ours=True,
        without="DiSparse Taylor",
    )
    yield make(
        "DiSparse Taylor, by part",
        by_part(disparse_pretrained, criterion="taylor"),
        ours=True,
        without="DiSparse Taylor",
    )
    yield make(
        "DiSparse adaptive, by part",
        by_part(disparse_pretrained, criterion=adaptive),
        ours=True,
        without="DiSparse adaptive",
    )


def _damped_methods(exponent: float, make: Callable[..., Method]) -> Iterator[Method]:
    """The damped saliency on the summed loss, by the largest percentile (the paper's rule), and by the sum of shares.

    Both rules have one twin: with a single task they are the same.
    """
    criterion = layer_adaptive(damped("taylor", exponent))
    joint = f"damped {exponent}, joint"
    yield make(joint, trained("sum", criterion=criterion))
    yield make(f"DiSparse damped {exponent}", trained("tasks", criterion=criterion), ours=True, twin=joint)
    shares = trained("tasks", criterion=criterion, arbiter="sum")
    yield make(f"shares, damped {exponent}", shares, ours=True, twin=joint)
    raised = trained("tasks", criterion=mean_added(exponent), arbiter="sum")
    yield make(f"shares, damped {exponent}{MEAN_ADDED}", raised, ours=True)


def _iterative_methods() -> Iterator[Method]:
    def make(name: str, cut: Cut, **facts: Any) -> Method:
        return Method(name, "iterative", iterative(cut), both_stages, **facts)

    twin = "adaptive joint, iterative"
    yield make("IMP", plain(prune.L1Unstructured))
    yield make(twin, trained("sum", criterion=adaptive))
    yield make("DiSparse adaptive, iterative", trained("tasks", criterion=adaptive), ours=True, twin=twin)
    yield Method("LTH", "iterative", lottery(plain(prune.L1Unstructured)), lottery_steps)


def _methods_at_the_start() -> Iterator[Method]:
    def make(name: str, cut: Cut, **facts: Any) -> Method:
        return Method(name, "at the start", at_start(cut), both_stages, **facts)

    yield make("SNIP", initial("sum", criterion="snip"))
    yield make("adaptive SNIP, joint", initial("sum", criterion=adaptive))
    yield make("DiSparse static", initial("tasks", criterion="snip"), ours=True, twin="SNIP")
    yield make(
        "DiSparse static, floor", with_floor(disparse_static, criterion="snip"), ours=True, without="DiSparse static"
    )
    yield make(
        "DiSparse static, by part", by_part(disparse_static, criterion="snip"), ours=True, without="DiSparse static"
    )
    yield make("DiSparse static adaptive", initial("tasks", criterion=adaptive), ours=True, twin="adaptive SNIP, joint")


def _methods_on_the_way() -> Iterator[Method]:
    """Magnitude, LAMP with reach and the damped rules, cut once after a quarter of the training or little by little."""
    few: dict[str, Any] = {"seen": "tasks", "batches": FEW}
    cuts: dict[str, Cut] = {
        "magnitude": plain(prune.L1Unstructured),
        "LAMP with reach": trained(criterion="lamp", arbiter="sum", **few),
    }
    for exponent in EXPONENTS:
        criterion = layer_adaptive(damped("taylor", exponent))
        cuts[f"DiSparse damped {exponent}"] = trained(criterion=criterion, **few)
        cuts[f"shares, damped {exponent}"] = trained(criterion=criterion, arbiter="sum", **few)
    for name, cut in cuts.items():
        ours = "damped" in name
        for window, when in WINDOWS.items():
            yield Method(f"{name}, {window}", "on the way", on_the_way(cut, when), both_stages, ours=ours)
    yield Method("default of GradualPruning", "on the way", gradual_pruning, both_stages, ours=True)


def _sparse_training_methods() -> Iterator[Method]:
    def make(name: str, procedure: Procedure, **facts: Any) -> Method:
        return Method(name, "sparse training", procedure, both_stages, **facts)

    yield make("random ERK", sparse_training(drop_fraction=0.0))
    yield make("SET", sparse_training(criterion="random"))
    yield make("RigL", sparse_training("sum"))
    yield make("DiSparse dynamic", sparse_training(), ours=True, twin="RigL")


def _channel_methods() -> Iterator[Method]:
    def make(name: str, cut: Cut, **facts: Any) -> Method:
        return Method(
            name, "channels", one_shot(cut), both_stages, amounts=CHANNEL_AMOUNTS, tuned_at=CHANNELS_TUNED_AT, **facts
        )

    joint = "channels, Taylor, joint"
    yield make("channels, random", by_torch_pruning(RandomImportance))
    yield make("channels, magnitude", by_torch_pruning(GroupMagnitudeImportance))
    yield make("channels, Taylor of torch-pruning", by_torch_pruning(GroupTaylorImportance, gradients=True))
    yield make(joint, channels("sum"))
    yield make("DiSparse channels", channels("tasks"), ours=True, twin=joint)
    yield make("DiSparse channels, mean arbiter", channels("tasks", arbiter="mean"), ours=True)
    yield make(
        "DiSparse channels, mean across",
        channels("tasks", across="mean"),
        ours=True,
        twin=joint,
        without="DiSparse channels",
    )
    yield make("DiSparse channels, floor", channels_with_floor(), ours=True, without="DiSparse channels")


METHODS = {method.name: method for method in _methods()}
DENSE = METHODS["dense"]
