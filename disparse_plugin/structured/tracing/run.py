"""Running a model while the labels of its channels are carried along."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from ..._support.stored import stored_numbers
from ...parameters import module_names
from ..hooks import before_forward
from ..layer_rule import Axis, Side
from ..layers import has_own_inputs, rule_of
from ..shrinking import tensors_of
from .labels import Labels, Row, Rows
from .noted import tensors_in
from .operations import makes, rule_for

# Where a dimension is cut into heads, their width shrinks, or their number. Tied: a dimension that is joined again goes
# with an input of the module of the same size, and dimensions that it cuts by one number stay equal.
How: TypeAlias = Literal["width", "tied", "whole heads", "tied heads"]


@dataclasses.dataclass(frozen=True, eq=False)
class Size:
    """A size that a module meets and holds as a number: where, the set of each position, whether it was made there."""

    module: str
    classes: Row
    cut: bool


class Run(TorchDispatchMode):
    """Carries labels along; every tensor that it met is kept alive, so that no other is taken for it.

    Attributes:
        labels: Which labels are one.
        unknown: What labels met that cannot be followed, in words.
        whole: As in :meth:`Labels.reshaped`.
        tied: Whether a dimension that a module gives a shape goes with an input of it, and those cut alike stay alike.
    """

    def __init__(self, model: nn.Module, how: How) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.labels, self.whole, self.tied = Labels(), how.endswith("heads"), how.startswith("tied")
        self._known: dict[int, tuple[Tensor, Rows]] = {}
        self._made: dict[int, Tensor] = {}
        self.unknown: set[str] = set()
        self._inside: list[tuple[str, frozenset[int], list[Row]]] = []
        self._sizes: dict[tuple[str, bytes], Size] = {}
        self._cut: dict[tuple[str, int], Row] = {}
        for module in model.modules():
            self._label(module)

    def _label(self, module: nn.Module) -> None:
        for tensor in module._parameters.values():
            if tensor is not None:
                self._enter(tensor)
        rule = rule_of(module)
        if rule is None:
            for buffer in module._buffers.values():
                if buffer is not None and buffer.is_floating_point():
                    self._enter(buffer)
            return
        covered = {
            (id(tensor), axis.dim % tensor.dim())
            for side in sides(module)
            for _, _, axis, tensor in self._united(module, side)
        }
        shrinking, refused = {number for number, _ in covered}, rule.refusal(module)
        if refused:
            self.unknown.add(f"a layer that {refused}")
        for tensor in module._parameters.values():
            for dim, row in enumerate(self.rows(tensor) if tensor is not None else ()):
                if refused or (id(tensor) in shrinking and (id(tensor), dim) not in covered):
                    self.labels.freeze(row)

    def _united(self, module: nn.Module, side: Side) -> list[tuple[nn.Module, str, Axis, Tensor]]:
        """Unite the labels of the tensors of a layer that shrink together."""
        found, first = list(tensors_of(module, side)), None
        for _, _, axis, tensor in found:
            row = self._enter(tensor)[axis.dim]
            for part in row.reshape(axis.repeats, -1) if row is not None and axis.blocks == 1 else ():
                first = part if first is None else first
                self.labels.unite(first, part)
        return found

    def _enter(self, tensor: Tensor) -> Rows:
        if id(tensor) not in self._known:
            rows = tuple(self.labels.fresh(size) if size > 1 else None for size in tensor.shape)
            self._known[id(tensor)] = (tensor, rows)
        return self.rows(tensor)

    def rows(self, tensor: Tensor) -> Rows:
        """Return the labels of each dimension of a tensor."""
        known = self._known.get(id(tensor))
        return (None,) * tensor.dim() if known is None else known[1]

    def is_made(self, tensor: Tensor) -> bool:
        """Tell whether a tensor was made from nothing."""
        return id(tensor) in self._made

    def freeze(self, tensor: Tensor) -> None:
        """Let a tensor keep its shape."""
        self.labels.freeze(*self.rows(tensor))

    def classes(self, row: Row | None, count: int) -> Row:
        """Return the set of every position; 0 for those that must stay."""
        return np.zeros(count, dtype=np.int64) if row is None else self.labels.classes(row)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and carry the labels of what goes in to what comes out."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        entering = [] if makes(func) else list(tensors_in([*args, *kwargs.values()]))
        leaving = list(tensors_in(out))
        if not any(any(row is not None for row in self.rows(t)) for t in entering):
            if all(self.is_made(t) for t in entering):
                self._made |= {id(t): t for t in leaving}
            return out
        rule = rule_for(func)
        if rule is None:
            self.unknown.add(str(func))
            for tensor in entering:
                self.freeze(tensor)
            return out
        for tensor, rows in zip(leaving, rule(self, args, kwargs, out), strict=True):
            if [len(row) if row is not None else size for row, size in zip(rows, tensor.shape, strict=True)] != [
                *tensor.shape
            ]:
                raise AssertionError(f"{func} gives {tuple(tensor.shape)}, found labels of another shape")
            self._known[id(tensor)] = (tensor, rows)
            if self.tied:
                self._tie(func, rows)
        self._note_sizes(entering, leaving)
        return out

    def _tie(self, operation: Any, rows: Rows) -> None:
        """Let a dimension that a module gives a shape go with an input of that size (``n, t, C = x.shape``)."""
        if self._inside and operation.overloadpacket.__name__ in ("view", "_unsafe_view", "reshape"):
            for row in rows:
                for other in self._inside[-1][2]:
                    if row is not None and len(other) == len(row):
                        self.labels.unite(row, other)

    def _note_sizes(self, entering: Sequence[Tensor], leaving: Sequence[Tensor]) -> None:
        """Note the sizes of what a module itself, not one inside it, works on, where it holds such numbers."""
        name, numbers = self._inside[-1][:2] if self._inside else ("", frozenset())
        known = {size for tensor in entering for size in tensor.shape}
        longest = max((len(row) for tensor in entering for row in self.rows(tensor) if row is not None), default=0)
        for tensor in (*entering, *leaving) if numbers else ():
            for row in self.rows(tensor):
                if row is not None and len(row) in numbers:
                    size = Size(name, row, longest > len(row) not in known)
                    self._sizes.setdefault((name, row.tobytes()), size)
                    if self.tied and size.cut:  # by one number, so that all of them must stay equal
                        self.labels.unite(self._cut.setdefault((name, len(row)), row), row)

    def sizes(self) -> list[Size]:
        """Return the sizes that modules hold as numbers too, in the order in which they were met."""
        return [dataclasses.replace(size, classes=self.labels.classes(size.classes)) for size in self._sizes.values()]

    @contextlib.contextmanager
    def among(self, model: nn.Module) -> Iterator[None]:
        """Notice in which module an operation runs, and which numbers that holds."""
        with contextlib.ExitStack() as stack:
            for module, name in module_names(model).items():
                numbers = frozenset(_whole_numbers(list(stored_numbers(module).values())))
                entry = (name, frozenset[int]() if _is_resized(module) else numbers)

                def enter_it(_: nn.Module, inputs: Any, entry: tuple[str, frozenset[int]] = entry) -> None:
                    rows = [row for tensor in tensors_in(inputs) for row in self.rows(tensor) if row is not None]
                    self._inside.append((*entry, rows))

                enter = before_forward(module, enter_it)
                leave = module.register_forward_hook(lambda _, __, ___: _drop(self._inside))
                stack.callback(enter.remove)
                stack.callback(leave.remove)
            yield


def _is_resized(module: nn.Module) -> bool:
    """Tell whether a layer's numbers are written by its rule when its tensors are cut; some norms have no tensors."""
    return rule_of(module) is not None and any(
        t is not None for t in (*module._parameters.values(), *module._buffers.values())
    )


def _drop(stack: list[Any]) -> None:
    del stack[-1:]


def _whole_numbers(values: Any) -> Iterator[int]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _whole_numbers(value)
        elif type(value) is int and value > 1:
            yield value


def sides(layer: nn.Module) -> tuple[Side, ...]:
    """Return the sides on which a layer loses channels of its own."""
    return ("out", "in") if has_own_inputs(layer) else ("out",)


def watched(model: nn.Module, calls: Sequence[Callable[[nn.Module], Sequence[Tensor]]], how: How) -> Run:
    """Run a model in evaluation mode, with labels; what comes out keeps its shape.

    Args:
        model: A copy, which may be disturbed.
        calls: What to run: each returns the tensors that come out.
        how: What happens where dimensions are cut and joined.
    """
    run = Run(model.eval(), how)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())  # without gradients some layers of torch take a way of their own
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(run.among(model))
        outputs = []
        for call in calls:
            with run:
                outputs += list(call(model))
    for output in outputs:
        run.freeze(output)
    return run
