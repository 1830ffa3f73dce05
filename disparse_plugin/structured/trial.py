"""What a removal is tried on before it is done: all that runs on the model as it is."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._support.double import knows_double
from .._support.example_inputs import Inputs, run
from .._support.stored import stored_numbers
from ..parameters import module_names
from ..scoring.losses import Batch, TaskLosses
from .adapter.graph import TRACE_ERRORS
from .adapter.observation import named_tensors
from .applying import Pruners
from .comparison import difference
from .copies import copied, doubled, in_double
from .hooks import before_forward
from .reads import noting_reads

# Tensors by name. Names of what enters a layer begin with this.
Found = list[tuple[str, Tensor]]
ENTERS = "what enters "


@dataclasses.dataclass(frozen=True)
class Run:
    """One thing that must run, before and after.

    Attributes:
        what: In words.
        training: In which mode.
        call: Runs it on a model, and returns tensors by name; also what enters the layers of the given names.
        compared: Whether the values can be compared: not where every run gives others, as with random numbers in
            training mode, and with losses that draw those of numpy or count their calls.
    """

    what: str
    training: bool
    call: Callable[[nn.Module, Collection[str]], Found]
    compared: bool = True


@dataclasses.dataclass(frozen=True)
class Trial:
    """What a removal is tried on. Needs memory for two copies of the model, one after the other.

    Attributes:
        model: The model, never run.
        runs: What must run.
        last: Names of the layers that make the outputs.
        customized_pruners: As in torch-pruning.
        double: Whether the copies run in double precision, in which rounding cannot hide or feign a difference.
        tolerance: How far a removal may be from masking; None: any distance.
    """

    model: nn.Module
    runs: tuple[Run, ...]
    last: tuple[str, ...]
    customized_pruners: Pruners | None
    double: bool
    tolerance: float | None

    def copy(self) -> nn.Module:
        """Return a copy of the model, in the precision in which it is tried."""
        return in_double(copied(self.model)) if self.double else copied(self.model)

    @functools.cached_property
    def read(self) -> Mapping[str, Collection[str]]:
        """The names of the numbers that modules hold and that the runs read, by module; of one that is unknown, all."""
        model = self.copy()
        every = {name: frozenset(stored_numbers(module)) for module, name in module_names(model).items()}
        with noting_reads(model) as read:
            if any(isinstance(outcome(entry, model), str) for entry in self.runs):
                return every
        return {**every, **read}


def prepare(
    model: nn.Module,
    inputs: Inputs,
    losses: TaskLosses,
    batches: Sequence[Batch],
    last: Sequence[str],
    *,
    compare: Callable[[Any], Any] | None,
    customized_pruners: Pruners | None,
    exact: bool,
) -> Trial:
    """Find out what runs on the model as it is, and in which precision.

    Args:
        model: The model; only copies of it run.
        inputs: Of one forward.
        losses: The user's losses.
        batches: What to run them on.
        last: Names of the layers that make the outputs.
        compare: From the outputs to what of them is compared; None: all tensors.
        customized_pruners: As in torch-pruning.
        exact: Whether a removal must equal masking.

    Returns:
        The trial. What does not run on the model before is not asked of it after.

    Raises:
        ValueError: If ``compare`` fails on what the model returns, or finds no tensor in it.
    """
    for double in (True, False) if all(knows_double(p.device) for p in model.parameters()) else (False,):
        give = doubled if double else copy.deepcopy
        runs = _runs(inputs, losses, batches, compare, give)
        dense = in_double(copied(model)) if double else copied(model)
        results = [outcome(entry, dense) for entry in runs]
        if double and any(isinstance(result, str) for result in results):
            native = _runs(inputs, losses, batches, compare, copy.deepcopy)
            failing = [entry for entry, result in zip(native, results, strict=True) if isinstance(result, str)]
            if not all(isinstance(outcome(entry, copied(model)), str) for entry in failing):
                continue  # something runs in the model's own precision only
        if compare is not None:
            _check_compare(results[0], partial(outcome, _runs(inputs, losses, (), None, give)[0], dense))
        working = [entry for entry, result in zip(runs, results, strict=True) if not isinstance(result, str)]
        steady = tuple(
            dataclasses.replace(entry, compared=entry is runs[0] or _repeats(entry, dense)) for entry in working
        )
        tolerance = _tolerance(model, double) if exact else None
        return Trial(model, steady, tuple(last), customized_pruners, double, tolerance)
    raise AssertionError("unreachable: the second round always returns")


def _check_compare(found: Found | str, without: Callable[[], Found | str]) -> None:
    """Refuse a ``compare`` that fails on the model as it is, or finds nothing: then nothing would be compared."""
    if isinstance(found, str):
        if not isinstance(without(), str):
            raise ValueError(f"compare: must take the outputs of the model as it is, found {found}; mend the function")
    elif not found:
        raise ValueError(
            "compare: must return at least one tensor of the outputs, found none; return what must be equal"
        )


def _tolerance(model: nn.Module, double: bool) -> float:
    """How far a removal may be from masking; in double precision 1e-11 is usual, more where a layer rounds to float."""
    if double:
        return 1e-5
    floating = [p for p in model.parameters() if p.is_floating_point()]
    coarse = sum(p.numel() for p in floating if torch.finfo(p.dtype).eps > 1e-5)
    return 1e-3 if coarse * 2 < sum(p.numel() for p in floating) else 0.1


def _runs(
    inputs: Inputs,
    losses: TaskLosses,
    batches: Sequence[Batch],
    compare: Callable[[Any], Any] | None,
    give: Callable[[Any], Any],
) -> list[Run]:
    def forward(model: nn.Module, watched: Collection[str]) -> Found:
        with torch.no_grad(), _entering(model, watched) as entered:
            outputs = run(model, give(inputs))
        return [*named_tensors(compare(outputs) if compare else outputs), *entered]

    def losses_on(batch: Batch) -> Callable[[nn.Module, Collection[str]], Found]:
        def call(model: nn.Module, _: Collection[str]) -> Found:
            with torch.enable_grad():
                return [(f"the loss of task {task!r}", v.detach()) for task, v in losses(model, give(batch)).items()]

        return call

    found = []
    for training, mode in ((False, "evaluation"), (True, "training")):
        found.append(Run(f"the forward in {mode} mode", training, forward))
        found += [Run(f"the losses in {mode} mode", training, losses_on(batch)) for batch in batches]
    return found


@contextlib.contextmanager
def _entering(model: nn.Module, watched: Collection[str]) -> Iterator[Found]:
    """Note what enters some layers in evaluation mode."""
    found: Found = []
    modules = {name: module for module, name in module_names(model).items()}
    with contextlib.ExitStack() as stack:
        for name in watched if not model.training else ():

            def note(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                found.extend((f"{ENTERS}{name}", x.detach()) for x in inputs[:1] if isinstance(x, Tensor))

            stack.callback(before_forward(modules[name], note).remove)
        yield found


def outcome(entry: Run, model: nn.Module, seed: int = 0, watched: Collection[str] = ()) -> Found | str:
    """Run something on a model, with the same random numbers each time.

    Args:
        entry: What to run.
        model: The model.
        seed: Of the random numbers.
        watched: Names of the layers of which it is noted what enters them.

    Returns:
        Tensors by name, or what went wrong.
    """
    model.train(entry.training)
    try:
        # Seeding reaches every card, also those that the model is not on.
        cards = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices=cards):
            torch.manual_seed(seed)
            return entry.call(model, watched)
    except TRACE_ERRORS as error:
        return f"an error in {entry.what}: {' '.join(str(error).split())[:120]}"


def _repeats(entry: Run, model: nn.Module) -> bool:
    """Tell whether two runs agree, in training mode with other random numbers."""
    first, second = outcome(entry, model, 1), outcome(entry, model, 2 if entry.training else 1)
    if isinstance(first, str) or isinstance(second, str) or len(first) != len(second):
        return False
    return all(difference(a, b, floor=0.05).size < 1e-6 for (_, a), (_, b) in zip(first, second, strict=True))
