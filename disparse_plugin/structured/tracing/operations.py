"""What each operation of torch does with the labels of its inputs, in one table.

An operation that is not in the table lets all its inputs stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import shapes
from .labels import Rows
from .noted import Noted, Rule, elementwise, tensors_in


def product(noted: Noted, args: Sequence[Any], _: dict[str, Any], __: Tensor) -> list[Rows]:
    """Multiply matrices: what is summed over is united."""
    *rest, a, b = (t for t in args if isinstance(t, Tensor))
    one, other = noted.rows(a), noted.rows(b)
    summed = [(a, one[-1]), (b, other[-2] if len(other) > 1 else other[0])]
    noted.labels.merged([row for t, row in summed if not noted.is_made(t)])
    batch = tuple(noted.labels.merged([x, y]) for x, y in zip(one[:-2], other[:-2], strict=True))
    rows: Rows = (*batch, *one[-2:-1], *other[-1:]) if len(other) > 1 else one[:-1]
    for bias in rest:
        for back in range(1, bias.dim() + 1):
            if bias.shape[-back] > 1:
                noted.labels.merged([noted.rows(bias)[-back], rows[-back]])
    return [rows]


def convolution(noted: Noted, args: Sequence[Any], _: dict[str, Any], out: Tensor) -> list[Rows]:
    """Unite the inputs with the weight's, and hand on the weight's outputs."""
    x, weight, bias, backwards, groups = args[0], args[1], args[2], args[6], args[8]
    labels, row, rows = noted.labels, noted.rows(x)[1], noted.rows(weight)
    outer, inner = (rows[1], rows[0]) if backwards else (rows[0], rows[1])
    depthwise, many = groups == x.shape[1] == out.shape[1], groups == x.shape[1] < out.shape[1]
    if groups == 1:
        labels.merged([row, inner] if x.shape[1] > 1 else [inner])
    elif depthwise:
        outer = labels.merged([row, rows[0]])
    elif row is None:
        labels.freeze(inner, outer)
    elif many and not backwards and outer is not None:  # an input goes with all that it makes
        labels.unite(row[:, None], outer.reshape(groups, -1))
    elif backwards and inner is not None and outer is not None:  # the weight is (inputs, outputs of a group)
        labels.unite(row, inner)
        labels.unite(inner.reshape(groups, -1)[:1], inner.reshape(groups, -1))
        outer = np.tile(outer, groups)
    elif backwards or inner is None or outer is None:
        noted.unknown.add("a convolution in which each group has one input or one output")
        labels.freeze(row, inner, outer)
    else:
        labels.unite(row.reshape(groups, -1), inner)
        labels.unite(outer.reshape(groups, -1)[:1], outer.reshape(groups, -1))
    if bias is not None and out.shape[1] > 1:
        labels.merged([outer, noted.rows(bias)[0]])
    return [(noted.rows(x)[0], outer, *(None,) * (out.dim() - 2))]


def normalized(dim: int) -> Rule:
    """Make the rule of a norm, whose parameters go with one dimension of the input."""

    def rule(noted: Noted, args: Sequence[Any], _: dict[str, Any], out: Any) -> list[Rows]:
        rows = list(noted.rows(args[0]))
        own = [t for t in args[1:] if isinstance(t, Tensor) and t.dim() == 1]
        if own:
            rows[dim] = noted.labels.merged([rows[dim], *(noted.rows(t)[0] for t in own)])
        return [tuple(rows), *((None,) * t.dim() for t in list(tensors_in(out))[1:])]

    return rule


def group_norm(noted: Noted, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> list[Rows]:
    """Let all groups of channels lose the same."""
    rows, groups = noted.rows(args[0]), args[6]
    if rows[1] is not None and groups > 1:
        blocks = rows[1].reshape(groups, -1)
        noted.labels.unite(blocks[:1], blocks)
    return normalized(1)(noted, args[:3], kwargs, out)


def recurrent(noted: Noted, args: Sequence[Any], _: dict[str, Any], out: Any) -> list[Rows]:
    """Run one layer of an LSTM: its weights are united already, so the first rows name the hidden channels."""
    x, weight, states = args[0], args[1], args[5:7]
    labels, (rows, columns), size = noted.labels, noted.rows(weight), args[10]
    labels.merged([noted.rows(x)[-1], columns])
    hidden = None if rows is None else rows[:size]
    labels.merged([hidden, *(noted.rows(state)[-1] for state in states if not noted.is_made(state))])
    return [
        (*(None,) * (t.dim() - 1), hidden if t.shape[-1:] == (size,) else None)[-t.dim() :] for t in tensors_in(out)
    ]


def _table(**entries: tuple[Rule, str]) -> dict[str, Rule]:
    return {name: rule for rule, names in entries.values() for name in names.split()}


RULES: dict[str, Rule] = _table(
    same=(
        shapes.same,
        "clone _to_copy contiguous detach alias lift_fresh native_dropout dropout bernoulli cumsum zero_ fill_ "
        "max_pool2d_with_indices max_pool3d_with_indices max_pool2d avg_pool1d avg_pool2d avg_pool3d "
        "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d upsample_nearest1d upsample_nearest2d "
        "upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa upsample_linear1d "
        "constant_pad_nd reflection_pad2d replication_pad2d reflection_pad1d "
        "ones_like zeros_like empty_like full_like rand_like randn_like",
    ),
    across=(shapes.across, "_softmax _log_softmax _safe_softmax sort flip"),
    reduced=(
        shapes.reduced,
        "mean sum amax amin max min var std var_mean std_mean argmax argmin prod logsumexp any all",
    ),
    norm=(shapes.norm, "linalg_vector_norm norm"),
    reshaped=(shapes.reshaped, "view _unsafe_view reshape _reshape_alias squeeze unsqueeze flatten squeeze_"),
    restrided=(shapes.restrided, "as_strided_"),
    permuted=(shapes.permuted, "permute"),
    transposed=(shapes.transposed, "transpose t"),
    expanded=(shapes.expanded, "expand"),
    repeated=(shapes.repeated, "repeat"),
    sliced=(shapes.sliced, "slice"),
    selected=(shapes.selected, "select"),
    unbound=(shapes.unbound, "unbind"),
    split=(shapes.split, "split split_with_sizes unsafe_split chunk"),
    gated=(shapes.gated, "glu"),
    concatenated=(shapes.concatenated, "cat"),
    stacked=(shapes.stacked, "stack"),
    product=(product, "mm bmm addmm baddbmm mv dot"),
    convolution=(convolution, "convolution"),
    batch_norm=(
        normalized(1),
        "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training _batch_norm_with_update "
        "_batch_norm_no_update cudnn_batch_norm",
    ),
    layer_norm=(normalized(-1), "native_layer_norm _fused_rms_norm"),
    group_norm=(group_norm, "native_group_norm"),
    prelu=(normalized(1), "_prelu_kernel"),
    recurrent=(recurrent, "mkldnn_rnn_layer"),
    embedded=(shapes.embedded, "embedding"),
    indexed=(shapes.indexed, "index"),
    along=(shapes.along, "gather index_select"),
    rolled=(shapes.rolled, "roll"),
    shuffled=(shapes.shuffled, "pixel_shuffle"),
    unshuffled=(shapes.unshuffled, "pixel_unshuffle"),
    elementwise=(
        elementwise,
        "where copy_ masked_fill masked_fill_ hardswish hardtanh hardsigmoid leaky_relu threshold addcmul addcdiv lerp",
    ),
)


# What takes from its input no more than a type and a device.
_MAKES = frozenset({"new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided"})


def makes(operation: Any) -> bool:
    """Tell whether an operation makes a tensor from nothing, whatever it is given."""
    return operation.overloadpacket.__name__ in _MAKES


def rule_for(operation: Any) -> Rule | None:
    """Return the rule of an operation; None if there is none."""
    name = operation.overloadpacket.__name__
    if name in RULES:
        return RULES[name]
    return elementwise if torch.Tag.pointwise in operation.tags else RULES.get(name.rstrip("_"))
