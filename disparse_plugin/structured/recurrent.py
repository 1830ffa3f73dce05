"""Recurrent layers: a hidden channel is a row of every gate, a column of the next step, and of the layer after.

Where its weights are zero it stays zero, whatever the kind (``tanh(0) = 0``, and gates only scale it), so that masking
is what a removal must equal. The layers of one module have one width, and lose the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .layer_rule import Axis, LayerRule, Side

_GATES = {"LSTM": 4, "GRU": 3}
_ROWS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _axes(layer: nn.RNNBase, side: Side) -> list[Axis]:
    ways = ["", "_reverse"] if layer.bidirectional else [""]
    if side == "in":
        return [Axis(f"weight_ih_l0{way}", 1) for way in ways]
    gates, found = _GATES.get(layer.mode, 1), list[Axis]()
    for number in range(layer.num_layers):
        for way in ways:
            end = f"l{number}{way}"
            found += [Axis(f"{name}_{end}", 0, repeats=gates) for name in _ROWS]
            found.append(Axis(f"weight_hh_{end}", 1))
            if number:
                found.append(Axis(f"weight_ih_{end}", 1, repeats=len(ways)))
    return found


def _resize(layer: nn.RNNBase, left: Mapping[Side, int]) -> None:
    for side, count in left.items():
        setattr(layer, "input_size" if side == "in" else "hidden_size", count)
    layer._flat_weights = [getattr(layer, name, None) for name in layer._flat_weights_names]
    layer.flatten_parameters()


def _uses(layer: nn.RNNBase, inputs: Sequence[Any], _: Any) -> dict[str, int]:
    x = inputs[0]
    if not isinstance(x, Tensor):  # a PackedSequence
        return {}
    steps = x.numel() // layer.input_size
    return {name: steps for name in layer._parameters if name.startswith("weight_")}


RECURRENT = LayerRule(
    axes=_axes,
    count=lambda layer, side: int(layer.input_size if side == "in" else layer.hidden_size),
    resize=_resize,
    same=False,
    uses=_uses,
    refusal=lambda layer: "projects what it hands on (proj_size)" if layer.proj_size else None,
    misread=lambda layer: f"is a {type(layer).__name__}, which torch-pruning cuts wrongly",
)
