"""What there is to know of a type of layer, as a form to fill in; :mod:`.layers` has the filled ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, TypeAlias

from torch import Tensor

Side: TypeAlias = Literal["out", "in", "parameter"]


@dataclasses.dataclass(frozen=True)
class Axis:
    """Where the channels of one side of a layer lie in one of its tensors.

    Attributes:
        name: Of the parameter or buffer, seen from the layer.
        dim: The dimension that the channels index.
        blocks: In how many blocks of dimension 0 the channels are spread out (inputs of grouped convolutions).
        repeats: How often the channels follow each other along ``dim`` (query, key and value in one tensor).
    """

    name: str
    dim: int
    blocks: int = 1
    repeats: int = 1


def nothing(*_: Any) -> None:
    """Do nothing, whatever is given."""


def no_uses(*_: Any) -> dict[str, int]:
    """Return that no weight multiplies anything."""
    return {}


@dataclasses.dataclass(frozen=True)
class LayerRule:
    """What there is to know of a type of layer.

    Attributes:
        axes: From a layer and a side to the tensors that shrink with it.
        count: From a layer and a side to the number of channels; None if it has none of its own.
        resize: Writes the numbers that the layer holds (``out_channels``) after its tensors were cut: how many channels
            are left of each side that lost some, all at once, as one may say what the other means.
        same: Whether the layer has as many outputs as inputs by construction; then all its channels are ``"out"``.
        over: From a layer and its input to the dimension over which it computes statistics of the channels that there
            are (LayerNorm). None: each channel for itself.
        silent_dim: The dimension of channels in the output, where zero weights do not make it zero (running means).
        adjust: Changes a layer with masked channels so that it computes as one with that many channels will, where
            that is more than zeros (the scale of an attention).
        channel_dim: From a layer that makes channels and its input to the dimension of the channels in that.
        uses: From a layer, its inputs and its output to the multiplications per entry of its weights, in the mean.
        folds: In how many equal blocks the channels must be cut alike, beyond what the axes say (attention heads).
        refusal: Why this layer cannot lose channels, or None.
        misread: Why what torch-pruning says of this layer cannot be trusted, or None; our own tracing follows it.
        ours: Whether torch-pruning is to cut it by this rule, because it does not know the type or cuts it wrongly.
    """

    axes: Callable[[Any, Side], Sequence[Axis]]
    count: Callable[[Any, Side], int | None]
    resize: Callable[[Any, Mapping[Side, int]], None]
    same: bool = True
    over: Callable[[Any, Tensor], int] | None = None
    silent_dim: int | None = None
    adjust: Callable[[Any, int], None] = nothing
    uses: Callable[[Any, Sequence[Any], Tensor], Mapping[str, Fraction | int]] = no_uses
    channel_dim: Callable[[Any, Tensor], int] = lambda _, x: x.dim() - 1
    folds: Callable[[Any], int] = lambda _: 1
    refusal: Callable[[Any], str | None] = nothing
    misread: Callable[[Any], str | None] = nothing
    ours: bool = False
