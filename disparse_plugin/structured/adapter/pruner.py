"""Talking to torch-pruning's own pruners (1.6): which groups they rank together, and how many channels they take.

What they do not tell in public is read through :mod:`disparse_plugin.structured.adapter.private`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from ...parameters import module_names
from ..attention import attention_heads
from ..groups import ChannelGroup
from .graph import TRACE_ERRORS, fix_layer_norms
from .private import (
    attention_of,
    attention_root,
    bounded,
    fold_count,
    graph_of,
    initial_counts,
    is_ranked,
    module_name,
    rounded_count,
    tp,
    user_scope,
)
from .reading import UnusableGroupError, block_counts, read_group


@dataclasses.dataclass(frozen=True)
class RankedGroup:
    """A group as a pruner will rank it.

    Attributes:
        channels: The group.
        group: torch-pruning's own object.
        root: The layer and the side that the channels are counted in; identifies the group.
        scope: Groups of one scope compete.
        folds: In how many equal blocks the pruner averages the importance.
        keep: How many units may not go in this step.
        heads: Number of attention heads if whole heads are to go in this step, else 0.
    """

    channels: ChannelGroup
    group: Any
    root: tuple[nn.Module, bool]
    scope: str
    folds: int
    keep: int
    heads: int = 0


def root_of(group: Any) -> tuple[nn.Module, bool]:
    """Identify a group by its root layer and whether outputs of it are counted."""
    return group[0].dep.target.module, graph_of(group).is_out_channel_pruning_fn(group[0].dep.handler)


def prepare(pruner: Any) -> dict[str, str]:
    """Make a pruner safe for an importance: LayerNorms fixed, foreign entries out, hopeless groups ignored.

    Args:
        pruner: Any pruner of torch-pruning.

    Returns:
        Layer name to reason, for the groups that will be left alone.

    Raises:
        ValueError: If its settings cannot work.
    """
    if pruner.isomorphic and not pruner.global_pruning:
        raise ValueError(
            "pruner: isomorphic=True needs global_pruning=True, found False; torch-pruning would prune wrong channels"
        )
    if max(pruner.per_step_pruning_ratio) >= 1 or max(pruner.per_step_head_pruning_ratio) >= 1:
        raise ValueError("pruner: the pruning ratios must be below 1, found 1; a layer cannot lose all its channels")
    if pruner.prune_num_heads and pruner.head_pruning_ratio > 0 and not pruner.pruning_ratio:
        raise ValueError(
            "pruning_ratio: must be above 0 for heads to go, found 0; torch-pruning looks at heads only where it "
            "removes channels, so use a small ratio, and prune_head_dims=False to keep the width of the heads"
        )
    fix_layer_norms(pruner.DG)
    inside = set(pruner.model.modules())
    for attribute in ("in_channel_groups", "out_channel_groups", "num_heads"):
        # The defaults are one dict shared by all pruners: entries of other models leak in.
        table = getattr(pruner, attribute)
        setattr(pruner, attribute, {module: count for module, count in table.items() if module in inside})
    for qkv, heads in attention_heads(pruner.model).items():
        pruner.num_heads.setdefault(qkv, heads)
        pruner.out_channel_groups[qkv] = pruner.num_heads[qkv]
        pruner.init_num_heads.setdefault(qkv, heads)
    for (module, side), count in block_counts(pruner.DG).items():
        if isinstance(module, nn.MultiheadAttention):
            (pruner.out_channel_groups if side == "out" else pruner.in_channel_groups)[module] = count
    _visit_attention_outputs_last(pruner)
    skipped = _ignore_unusable(pruner)
    if pruner.current_step == 0:
        pruner.initial_total_heads = _heads_that_may_go(pruner)
    pruner.update_regularizer()
    return skipped


def _visit_attention_outputs_last(pruner: Any) -> None:
    """Let another layer be the root of the groups that outputs of attentions are in, if there is one.

    torch-pruning counts an attention in the inputs of its output layer. In local pruning it files groups under the name
    of their root, so the group of that layer's outputs would be filed in the same place, and one of the two be lost.
    """
    nodes = pruner.DG.module2node
    with bounded():
        for qkv in [layer for layer in pruner.num_heads if layer in nodes]:
            try:
                group = pruner.DG.get_pruning_group(qkv, tp.prune_linear_out_channels, list(range(qkv.out_features)))
                inner = attention_root(pruner, group)
            except TRACE_ERRORS:
                continue
            if inner is not None:
                module = root_of(inner)[0]
                nodes[module] = nodes.pop(module)


def _ignore_unusable(pruner: Any) -> dict[str, str]:
    skipped: dict[str, str] = {}
    local = not pruner.global_pruning
    filed = set[str]()
    names = module_names(pruner.model)
    with bounded():
        for group in list(pruner.DG.get_all_groups(pruner.ignored_layers, pruner.root_module_types)):
            root = group[0].dep.target.module
            try:
                ranked = _ranked(pruner, group)
                whole_heads = pruner.prune_num_heads and attention_of(pruner, group)
                if ranked is None or (ranked.keep >= ranked.channels.num_units and not whole_heads):
                    raise UnusableGroupError("has no unit to spare")
                if local and ranked.scope in filed and user_scope(pruner, group) is None:
                    raise UnusableGroupError("torch-pruning would confuse it with its attention; prune globally")
                filed.add(ranked.scope)
            except UnusableGroupError as error:
                skipped[names[root]] = str(error)
            except TRACE_ERRORS as error:
                skipped[names[root]] = f"torch-pruning cannot map it: {error}"
            if names[root] in skipped:
                pruner.ignored_layers.append(root)
    return skipped


def _heads_that_may_go(pruner: Any) -> int:
    """Count the heads of the attentions that are left, as torch-pruning does of those that it was told of."""
    total, default = 0, pruner.per_step_head_pruning_ratio
    with bounded():
        for group in pruner.DG.get_all_groups(pruner.ignored_layers, pruner.root_module_types):
            layers = attention_of(pruner, group)
            if layers and pruner.head_pruning_ratio_dict.get(layers[0], default)[-1] > 0:
                total += pruner.num_heads[layers[0]]
    return total


def ranked_groups(pruner: Any) -> list[RankedGroup]:
    """List the groups that a pruner will rank in its present step, as ``BasePruner._prune`` does."""
    groups = [
        _ranked(pruner, group)
        for group in pruner.DG.get_all_groups(pruner.ignored_layers, pruner.root_module_types)
        if is_ranked(pruner, group)
    ]
    return [group for group in groups if group is not None]


def _ranked(pruner: Any, group: Any) -> RankedGroup | None:
    graph, heads = pruner.DG, 0
    layers = attention_of(pruner, group)
    if layers:
        group = attention_root(pruner, group)
        if group is None:
            return None
        counts = {pruner.num_heads[layer] for layer in layers}
        if pruner.prune_num_heads and pruner.get_target_head_pruning_ratio(layers[0]) > 0:
            if len(counts) > 1:
                raise UnusableGroupError("query and key have different numbers of heads")
            heads = counts.pop()
    folds = fold_count(pruner, group)
    size = len(group[0].idxs)
    channels = read_group(graph, group, size, module_names(pruner.model), {}, folds=folds)
    keep = _keep(pruner, group, channels.num_units, folds)
    if layers and not pruner.prune_head_dims:
        keep = channels.num_units
    return RankedGroup(channels, group, root_of(group), _scope(pruner, group), folds, keep, heads)


def _keep(pruner: Any, group: Any, units: int, folds: int) -> int:
    """Return how many units must stay so that torch-pruning neither exceeds its limits nor gives the layer up."""
    module, out = root_of(group)
    initial = (pruner.layer_init_out_ch if out else pruner.layer_init_in_ch)[module] // folds
    limit = max(1, math.ceil(initial * (1 - pruner.max_pruning_ratio) - 1e-9))
    if not pruner.round_to:
        return int(min(limit, units))
    # torch-pruning rounds the layer's channels with the count of units; the result must leave `limit` of them.
    channels = pruner.DG.get_out_channels(module) if out else pruner.DG.get_in_channels(module)
    free = [n for n in range(1, units) if rounded_count(pruner, n, channels) <= units - limit]
    return int(units - max(free, default=0))


def _scope(pruner: Any, group: Any) -> str:
    graph, chosen = pruner.DG, user_scope(pruner, group)
    if chosen is not None:
        return chosen[1]
    if pruner.isomorphic:
        return "Isomorphic_" + "".join(_pattern(graph, dep) for dep, _ in group)
    if pruner.global_pruning:
        return "DEFAULT_SCOPE"
    return module_name(graph, group[0][0].source.module)


def _pattern(graph: Any, dep: Any) -> str:
    side = "out" if graph.is_out_channel_pruning_fn(dep.handler) else "in"
    return f"{type(dep.source.module)}_{side}_{type(dep.target.module)}_{side}"


def target_ratio(pruner: Any, members: Sequence[RankedGroup]) -> float:
    """Return the ratio that a pruner applies to a scope in its present step."""
    chosen = user_scope(pruner, members[0].group)
    if chosen is not None:
        return float(pruner.get_target_pruning_ratio(chosen[0], step=pruner.current_step))
    return float(pruner.per_step_pruning_ratio[pruner.current_step])


def limit_counts(pruner: Any, scope: str, members: Sequence[RankedGroup], initial: dict[str, int]) -> None:
    """Keep a pruner from taking more units of a scope than may go.

    torch-pruning counts ``present - int(initial * (1 - ratio))`` and, if that empties a layer, leaves the whole layer
    as it is. Where the count is too high, the initial size that it remembers is raised until the count fits.

    Args:
        pruner: The pruner, in a step.
        scope: Name of the scope.
        members: Its groups.
        initial: Remembers the true initial sizes over the steps.
    """
    present = sum(member.channels.num_units for member in members)
    free = sum(max(0, member.channels.num_units - member.keep) for member in members)
    if any(member.heads for member in members):
        free = max(free, 1)  # with nothing to take, torch-pruning would not look at the heads either
    counts = initial_counts(pruner)
    first = initial.setdefault(scope, int(counts.get(scope, present)))
    kept = 1 - target_ratio(pruner, members)
    if present - int(first * kept) > free:
        counts[scope] = (present - free + 0.5) / kept
    else:
        counts[scope] = first


def heads_to_remove(pruner: Any, members: Sequence[RankedGroup]) -> int:
    """Return how many attention heads a pruner takes from groups that compete in its present step.

    Raises:
        ValueError: If a layer would lose all its heads.
    """
    if not pruner.global_pruning:
        layers = attention_of(pruner, members[0].group)
        count = math.ceil(pruner.get_target_head_pruning_ratio(layers[0]) * members[0].heads)
        if count >= members[0].heads:
            raise ValueError(
                f"head_pruning_ratio: must leave one head, found {count} of {members[0].heads} to remove in "
                f"{members[0].channels.name}; use a lower ratio"
            )
        return int(count)
    total = sum(member.heads for member in members)
    ratio = pruner.per_step_head_pruning_ratio[pruner.current_step]
    count = total - int(pruner.initial_total_heads * (1 - ratio))
    free = total - len(members)
    if count <= 0:  # torch-pruning would fail for want of a threshold
        for ratios in (pruner.per_step_head_pruning_ratio, *pruner.head_pruning_ratio_dict.values()):
            ratios[pruner.current_step] = 0
        return 0
    if count > free:
        pruner.initial_total_heads = (total - free + 0.5) / (1 - ratio)
    return int(min(count, free))


def regularizes(pruner: Any) -> bool:
    """Tell whether a pruner asks for importances outside its steps too."""
    return type(pruner).regularize is not tp.pruner.BasePruner.regularize
