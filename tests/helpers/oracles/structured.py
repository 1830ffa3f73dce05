"""The removal of channels, computed a second way: from torch-pruning's groups, with masks and plain loops."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from disparse_plugin.structured.cuts import Cut, merge_cuts


def cuts_of(pruner: Any, groups: Iterable[Any]) -> tuple[Cut, ...]:
    """Translate groups that a pruner yielded (and did not prune yet) to cuts."""
    names = {module: name for name, module in pruner.model.named_modules()}
    cuts = []
    for group in groups:
        for dep, idxs in group:
            module, positions = dep.target.module, torch.tensor(sorted(idxs), dtype=torch.int64)
            if isinstance(module, nn.Parameter):
                name = {id(p): n for n, p in pruner.model.named_parameters()}[id(module)]
                cuts.append(Cut(name, "parameter", dep.target.pruning_dim, 0, positions))
            elif (
                module in names
                and isinstance(module, nn.Module)
                and tp.ops.module2type(module) != tp.ops.OPTYPE.ELEMENTWISE
            ):
                out = pruner.DG.is_out_channel_pruning_fn(dep.handler)
                count = (pruner.DG.get_out_channels if out else pruner.DG.get_in_channels)(module)
                cuts.append(Cut(names[module], "out" if out else "in", -1, count, positions))
    return merge_cuts(cuts)


def kept_units(pruner: Any) -> int:
    """Count what a pruner counts: the channels of all its groups, those that go together once."""
    total = 0
    for group in pruner.DG.get_all_groups(pruner.ignored_layers, pruner.root_module_types):
        attention = pruner._downstream_node_as_root_if_attention(group)
        total += len((attention or group)[0].idxs) // pruner._get_channel_groups(group)
    return total
