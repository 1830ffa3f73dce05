"""What a layer multiplies with, seen during one forward: its weight, or something else that it computes from it.

A mask puts zeros into the weight. They are zeros of what the layer computes with only if the layer multiplies with the
weight itself, or with the same entries in another shape or type, each scaled at most. A layer that standardises its
weight first (timm's ``StdConv2d``) turns most of the zeros into something else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from .._support.shards import reshard
from .._support.undisturbed import undisturbed
from ..maskable import Obstacle
from ..parameters import ParameterKey, unwrap
from .hidden import hiding_function, refuse_hidden, refusing_wrappers
from .losses import Batch, TaskLosses

# What a kernel is given to: one operand times another, and summed.
_MULTIPLIES = frozenset(
    {"linear", "bilinear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
    | {"convolution", "_convolution", "conv_tbc"}
    | {"matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "dot", "addmm", "addmv", "addbmm", "baddbmm"}
    | {"inner", "outer", "ger", "vdot", "vecdot", "kron", "addr", "chain_matmul", "multi_dot", "sspaddmm", "_sparse_mm"}
    | {"einsum", "tensordot", "embedding", "embedding_bag", "multi_head_attention_forward"}
    | {"scaled_dot_product_attention"}
    | {"lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"}
)
# What keeps the entries, elsewhere: views, copies, types, parts.
_SAME = frozenset(
    {"t", "transpose", "swapaxes", "permute", "movedim", "T", "mT", "H", "mH", "data", "reshape", "view", "view_as"}
    | {"reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "expand_as", "contiguous", "clone"}
    | {"detach", "to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda", "requires_grad"}
    | {"chunk", "split", "narrow", "select", "unbind", "__getitem__", "index_select", "repeat", "repeat_interleave"}
    | {"slice", "alias", "flip", "roll", "pad", "cat", "stack", "__setitem__", "fused_moving_avg_obs_fake_quant"}
    | {"fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine"}
)
# What scales or selects entry by entry, if by something that does not depend on the weight.
_SCALES = frozenset(
    {"mul", "__mul__", "__rmul__", "multiply", "where", "masked_fill"}
    | {"tril", "triu", "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"}
)
# What scales its first operand by its second; one over a weight is another weight.
_DIVIDES = frozenset({"div", "__truediv__", "divide", "true_divide"})


class Uses(TorchFunctionMode):
    """Watches the functions that one module calls, on the way to what multiplies.

    Example:
        >>> import torch
        >>> weight = torch.ones(2, 3, requires_grad=True)
        >>> with Uses([weight]) as uses:
        ...     kernel = weight - weight.mean(1, keepdim=True)
        ...     output = torch.nn.functional.linear(torch.ones(4, 3), kernel)
        >>> uses.functions()
        {0: 'mean'}
        >>> with Uses([weight]) as uses:
        ...     output = torch.ones(4, 3) @ (0.5 * weight).t()
        >>> uses.functions()
        {}
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        """Watch from now on, inside a ``with`` block.

        Args:
            weights: The weights as the module reads them.
        """
        super().__init__()
        self._weights = weights
        # By identity; the tensors themselves are kept, so that no identity is given out twice.
        self._same: dict[int, tuple[Tensor, int]] = {
            id(weight): (weight, index) for index, weight in enumerate(weights)
        }
        self._computed: dict[int, tuple[Tensor, int, str]] = {}
        self._itself: set[int] = set()
        self._instead: dict[int, str] = {}

    def functions(self) -> dict[int, str]:
        """Return, for each weight that only something computed from it was multiplied with, the first step to that."""
        return {index: name for index, name in self._instead.items() if index not in self._itself}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the function, and follow the weights through it."""
        everything = (*args, *(kwargs or {}).values())
        given = list(_tensors(everything))
        result = func(*args, **(kwargs or {}))
        name = _name(func)
        known = [index for tensor in given if (index := self._index(tensor)) is not None]
        # A weight times itself alone (``w @ w.t() @ w``, made orthogonal) is another weight.
        by_itself = len(given) == len(known) > len(set(known))
        if name.removeprefix("linalg_") in _MULTIPLIES and not by_itself:
            for tensor in given:
                self._multiply(tensor)
        elif known:
            scales = name in _SCALES or (name in _DIVIDES and id(everything[0]) in self._same)
            made = everything[0] if name == "__setitem__" else result
            self._follow(name, given, list(_tensors([made])), scales=scales)
        return result

    def _index(self, tensor: Tensor) -> int | None:
        found = self._same.get(id(tensor)) or self._computed.get(id(tensor))
        return None if found is None else found[1]

    def _multiply(self, tensor: Tensor) -> None:
        if id(tensor) in self._same:
            self._itself.add(self._same[id(tensor)][1])
        elif id(tensor) in self._computed:
            _, index, name = self._computed[id(tensor)]
            self._instead.setdefault(index, name)

    def _follow(self, name: str, given: Sequence[Tensor], made: Sequence[Tensor], *, scales: bool) -> None:
        computed = next((self._computed[id(tensor)] for tensor in given if id(tensor) in self._computed), None)
        entries = [self._same[id(tensor)][1] for tensor in given if id(tensor) in self._same]
        if computed is None and (name in _SAME or (scales and len(entries) == 1)):
            self._same.update({id(tensor): (tensor, entries[0]) for tensor in made if id(tensor) not in self._same})
            return
        index, first = (entries[0], name) if computed is None else computed[1:]
        for tensor in made:
            if all(tensor is not weight for weight in self._weights):
                self._same.pop(id(tensor), None)  # a copy that is changed in place is a copy no more
                self._computed[id(tensor)] = (tensor, index, first)


class NotCopied:
    """A hook that is on a model while it is scored, and in no copy of it.

    Example:
        >>> import copy
        >>> copy.deepcopy(NotCopied(print))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        TypeError: losses: must not copy or save the model while it is scored, found a deepcopy ...
    """

    def __init__(self, hook: Callable[..., None]) -> None:
        """Take what is called."""
        self._hook = hook

    def __call__(self, *args: Any) -> None:
        """Call it."""
        self._hook(*args)

    def __reduce_ex__(self, protocol: object) -> Any:
        """Refuse, in place of an error about what the hook holds."""
        raise TypeError(
            "losses: must not copy or save the model while it is scored, found a deepcopy or pickle of it; make the "
            "copy (a teacher, an average) before"
        )


class _Running(threading.local):
    """The modules that run now, with what watches them: modes belong to a thread, and a model may have several."""

    def __init__(self) -> None:
        self.running: list[tuple[nn.Module, Uses]] = []


class FirstUses:
    """Watches each module the first time it runs, and finds the weights that are not what it multiplies with.

    Attributes:
        unfit: What is in the way of masks that the modules have shown so far, by the index of the parameter.
        hidden: Inside which autograd function they ran without gradients, if inside any.

    Example:
        >>> import torch
        >>> class Centred(nn.Linear):
        ...     def forward(self, x):
        ...         return nn.functional.linear(x, self.weight - self.weight.mean())
        >>> layer = Centred(2, 2)
        >>> uses = FirstUses([(layer, "weight")])
        >>> uses.start()
        >>> output = layer(torch.ones(1, 2))
        >>> uses.unfit[0].reason
        'Centred multiplies with something that it computes from it (mean), where the zeros of a mask are not zeros'
    """

    def __init__(self, parameters: Sequence[ParameterKey]) -> None:
        """Take what is watched.

        Args:
            parameters: The ``(module, name)`` pairs.
        """
        self._watched: dict[nn.Module, list[tuple[int, str]]] = {}
        for index, (module, name) in enumerate(parameters):
            self._watched.setdefault(module, []).append((index, name))
        self._handles: dict[nn.Module, list[RemovableHandle]] = {}
        self._here = _Running()
        self.unfit: dict[int, Obstacle] = {}
        self.hidden: dict[int, str | None] = {}

    def start(self) -> None:
        """Put hooks on the modules that have not been watched yet; each module's go when it has run once."""
        for module in self._watched:
            before = module.register_forward_pre_hook(NotCopied(self._before))
            after = module.register_forward_hook(NotCopied(self._after), always_call=True)
            self._handles[module] = [before, after]

    def stop(self) -> None:
        """Take all hooks off."""
        while self._here.running:  # a forward was interrupted
            self._ended()
        for module in list(self._handles):
            self._unhook(module)

    def _before(self, module: nn.Module, _: Any) -> None:
        if module not in self._watched or any(module is other for other, _ in self._here.running):
            return
        if not torch.is_grad_enabled():
            self.hidden.update(dict.fromkeys((index for index, _ in self._watched[module]), hiding_function()))
        uses = Uses([getattr(module, name) for _, name in self._watched[module]])
        self._here.running.append((module, uses))
        uses.__enter__()  # type: ignore[no-untyped-call]

    def _after(self, module: nn.Module, *_: Any) -> None:
        if not self._here.running or self._here.running[-1][0] is not module:
            return
        uses = self._ended()
        places = self._watched.pop(module, None)
        if places is None:  # it ran in two threads at once
            return
        self._unhook(module)
        for place, function in uses.functions().items():
            self.unfit[places[place][0]] = Obstacle(
                "be what its layer multiplies with",
                f"that {type(module).__name__} multiplies with something that it computes from it ({function}), where "
                "the zeros of a mask are not zeros",
            )

    def _ended(self) -> Uses:
        _, uses = self._here.running.pop()
        uses.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        return uses

    def _unhook(self, module: nn.Module) -> None:
        for handle in self._handles.pop(module):
            handle.remove()


def computed_instead(
    model: nn.Module, losses: TaskLosses, batch: Batch, keys: Sequence[ParameterKey], names: Sequence[str]
) -> dict[str, Obstacle]:
    """Run the losses once, and return the weights that are not what their layers multiply with.

    Args:
        model: The model, as the caller has it; left as it was found.
        losses: ``losses(model, batch)``.
        batch: The batch.
        keys: The ``(module, name)`` pairs to look at.
        names: Their qualified names.

    Returns:
        What is in the way of a mask, by qualified name.

    Raises:
        Exception: What the losses raise.
        ValueError: If they run a wrapper of the model instead of the model that they are given, or an autograd function
            hides gradients.
    """
    root, uses = unwrap(model), FirstUses(keys)
    with undisturbed(model, keys), refusing_wrappers(root):
        uses.start()
        try:
            losses(root, batch)
        finally:
            uses.stop()
            reshard(root)
    refuse_hidden({names[index]: function for index, function in sorted(uses.hidden.items())})
    return {names[index]: obstacle for index, obstacle in sorted(uses.unfit.items())}


def _name(func: Callable[..., Any]) -> str:
    """Return what a function does: ``mul`` for ``mul_`` and ``mul.Tensor``, and of ``Tensor.T`` the attribute."""
    name: str = getattr(func, "__name__", "").partition(".")[0]
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return name if name.endswith("__") else name.removesuffix("_")


def _tensors(values: Any, depth: int = 3) -> Iterator[Tensor]:
    """Yield the tensors among arguments, and in lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif depth and isinstance(value, list | tuple):
            yield from _tensors(value, depth - 1)
