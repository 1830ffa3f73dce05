"""What is checked of a removal before anything is done: its options, its steps, and that weights are plain."""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

from torch import nn
from torch.nn.utils import parametrize

from .._support.shards import is_sharded
from ..agreement.amounts import check_amount
from ..kinds import check_flag, check_fraction, whole_number
from ..parameters import is_masked
from .budget import QUANTITIES
from .channel_scores import NORMALIZERS, REDUCTIONS

MOST_STEPS = 10_000


def checked_steps(steps: int, between: object, schedule: Callable[[int], float] | None, data: object) -> list[float]:
    """Check how a removal is divided, and return the share of the amount that is gone after each step.

    Raises:
        TypeError: If ``steps`` is no int, or ``between`` or ``schedule`` cannot be called.
        ValueError: If ``steps`` is out of range, or something does not go with it.
    """
    if whole_number("steps", steps, least=1) > MOST_STEPS:
        raise ValueError(f"steps: must be at most {MOST_STEPS}, found {steps}; each of them scores the model anew")
    for name, value in (("between", between), ("schedule", schedule)):
        if value is not None and not callable(value):
            raise TypeError(f"{name}: must be callable, found {type(value).__name__}")
    if steps == 1 and between is not None:
        raise ValueError("between: is called between steps, found steps=1; pass steps=2 or more")
    if steps > 1 and isinstance(data, Iterator):
        raise ValueError("data: must be readable in every step, found an iterator, which ends; pass a list or a loader")
    shares = [step / steps if schedule is None else float(schedule(step)) for step in range(1, steps + 1)]
    if not all(0 <= a <= b <= 1 for a, b in itertools.pairwise([0.0, *shares])) or shares[-1] != 1:
        raise ValueError(f"schedule: must rise from 0 to 1 at the last step, found {shares}")
    return shares


def check_options(
    amount: float | Mapping[str, float],
    of: str,
    reduction: str,
    normalizer: str | None,
    max_pruning_ratio: float,
    round_to: int | Literal["auto"] | None,
    isomorphic: bool,
) -> None:
    """Check the options of a removal as far as that is possible without the model.

    Raises:
        TypeError: If ``amount`` is no number, or ``isomorphic`` no bool.
        ValueError: If an option is unknown or out of range.
    """
    for part, one in amount.items() if isinstance(amount, Mapping) else [(None, amount)]:
        check_amount(one, "amount" if part is None else f"amount[{part!r}]")
    if isinstance(amount, Mapping) and not amount:
        raise ValueError("amount: must name at least one part, found none; write e.g. {'shared': 0.5}")
    if of == "latency" and isinstance(amount, Mapping | numbers.Integral):
        raise ValueError(f"amount: must be a fraction (float) of the time with of='latency', found {amount!r}")
    if of not in QUANTITIES:
        raise ValueError(f"of: must be one of {', '.join(QUANTITIES)}, found {of!r}")
    check_joining(reduction, normalizer)
    check_fraction("max_pruning_ratio", max_pruning_ratio)
    check_flag("isomorphic", isomorphic)
    if round_to not in (None, "auto") and (
        isinstance(round_to, bool) or not isinstance(round_to, numbers.Integral) or round_to < 1
    ):
        raise ValueError(f"round_to: must be a positive int, 'auto' or None, found {round_to!r}")


def check_joining(reduction: str, normalizer: str | None) -> None:
    """Check how the scores of a group's layers are joined.

    Raises:
        ValueError: If a name is unknown.
    """
    if reduction not in list(REDUCTIONS):
        raise ValueError(f"reduction: must be one of {', '.join(REDUCTIONS)}, found {reduction!r}")
    if normalizer is not None and normalizer not in list(NORMALIZERS):
        raise ValueError(f"normalizer: must be None or one of {', '.join(NORMALIZERS)}, found {normalizer!r}")


def check_unmasked(modules: Iterable[nn.Module]) -> None:
    """Check that no mask makes a weight that is to be cut.

    Raises:
        ValueError: If one does.
    """
    for module in modules:
        for name in list(module._parameters):
            if is_masked(module, name.removesuffix("_orig")) and name.endswith("_orig"):
                raise ValueError(
                    f"model: must carry no masks, found one on {type(module).__name__}.{name.removesuffix('_orig')}; "
                    "make them permanent first with torch.nn.utils.prune.remove(module, name), or remove channels "
                    "before pruning weights"
                )


def check_plain(root: nn.Module) -> None:
    """Check that a model's weights are plain trainable parameters.

    Raises:
        ValueError: If weights are sharded or made in inference mode, there is a mask, a parametrization, or nothing
            that wants gradients.
    """
    if any(is_sharded(parameter) for parameter in root.parameters()):
        raise ValueError(
            "model: must hold whole weights where channels are removed, found sharded ones; remove channels before "
            "fully_shard"
        )
    if any(parameter.is_inference() for parameter in root.parameters()):
        raise ValueError(
            "model: must be built outside of torch.inference_mode(), found Parameters made inside; build it again, or "
            "copy.deepcopy it outside"
        )
    check_unmasked(root.modules())
    for module in root.modules():
        if parametrize.is_parametrized(module) or any(
            type(hook).__name__ in ("WeightNorm", "SpectralNorm") for hook in module._forward_pre_hooks.values()
        ):
            raise ValueError(
                f"model: weights must be plain parameters, found a parametrization on {type(module).__name__}; call "
                "torch.nn.utils.parametrize.remove_parametrizations first"
            )
    if not any(parameter.requires_grad for parameter in root.parameters()):
        raise ValueError(
            "model: at least one parameter must require gradients, found all frozen; unfreeze what is used"
        )
