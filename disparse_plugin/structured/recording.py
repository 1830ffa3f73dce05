"""Recording what any pruner of torch-pruning removes, so that it can be replayed without pickle and without a trace."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from .._support.stored import stored_numbers
from ..errors import wrong
from ..parameters import module_names, unwrap
from .adapter.private import parameter_name, tp
from .cuts import Attributes, Cut
from .layer_rule import Side
from .plan import RemovalPlan


def record_removal(pruner: Any) -> RemovalRecording:
    """Record what a pruner removes from now on, in however many steps, interactive or not.

    torch-pruning's own ``pruning_history()`` holds the roots of the groups, and replays them by tracing the new model
    again: with other options or another version the groups may differ. Here every loss of every layer is written down.

    Args:
        pruner: Any pruner of torch-pruning with any importance, before its first step.

    Returns:
        The recording; :meth:`RemovalRecording.save` writes it for
        :func:`~disparse_plugin.structured.replay_removal`. It ends with :meth:`RemovalRecording.stop`, or with a
        ``with record_removal(pruner) as recording:`` block.

    Example:
        >>> import tempfile, torch_pruning
        >>> from disparse_plugin.structured import replay_removal
        >>> build = lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> net, fresh = build(), build()
        >>> pruner = torch_pruning.pruner.BasePruner(
        ...     net, (torch.randn(1, 4),), importance=torch_pruning.importance.MagnitudeImportance(),
        ...     pruning_ratio=0.5, iterative_steps=2, ignored_layers=[net[2]],
        ... )
        >>> recording = record_removal(pruner)
        >>> pruner.step()
        >>> pruner.step()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     recording.save(f"{folder}/removal.safetensors")
        ...     replay_removal(fresh, f"{folder}/removal.safetensors")
        >>> fresh.load_state_dict(net.state_dict())
        <All keys matched successfully>
    """
    return RemovalRecording(pruner)


class RemovalRecording:
    """What was removed from a model since the recording began.

    Groups are noted when they are pruned, also those that the user changes or prunes himself, as long as they come from
    the pruner's dependency graph. What is cut by other means is not seen. :meth:`stop`, or the end of a ``with`` block,
    ends the recording: nothing of the pruner stays changed.
    """

    def __init__(self, pruner: Any) -> None:
        """Begin; see :func:`record_removal`."""
        if not (hasattr(pruner, "DG") and hasattr(pruner, "model")):
            raise TypeError(f"pruner: must be a pruner of torch-pruning, found {wrong(pruner)}")
        self._graph = pruner.DG
        self._root = unwrap(pruner.model)
        self._names = module_names(self._root)
        self._before = {module: stored_numbers(module) for module in self._root.modules()}
        # By layer, side and dimension: how many positions there were, and which of those are left.
        self._left: dict[tuple[str, Side, int], tuple[int, Tensor]] = {}
        self._watched: list[tuple[weakref.ref[Any], Any]] = []
        self._before_us = self._graph.__dict__.get("get_pruning_group")
        original = self._graph.get_pruning_group
        self._ours: Any = None

        @functools.wraps(original)
        def watched(*arguments: Any, **options: Any) -> Any:
            group = original(*arguments, **options)
            self._watched.append((weakref.ref(group), group.__dict__.get("prune")))
            group.prune = self._recorded(group, group.prune)
            return group

        self._graph.get_pruning_group = self._ours = watched

    def __enter__(self) -> Self:
        """Return itself; the recording has begun."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.stop()

    def stop(self) -> None:
        """End the recording; a second call does nothing.

        Raises:
            RuntimeError: If a recording that began later still runs.
        """
        if self._ours is None:
            return
        if self._graph.__dict__.get("get_pruning_group") is not self._ours:
            raise RuntimeError(
                "recording: recordings of one pruner must stop in the reverse order of their beginning, found another "
                "one that began later and still runs; stop that first"
            )
        if self._before_us is None:
            del self._graph.get_pruning_group
        else:
            self._graph.get_pruning_group = self._before_us
        for reference, before in self._watched:
            group = reference()
            if group is not None and before is not None:
                group.prune = before
            elif group is not None:
                del group.prune
        self._ours, self._watched = None, []

    def _recorded(self, group: Any, prune: Callable[..., None]) -> Callable[..., None]:
        def recorded(idxs: Any = None, record_history: bool = True) -> None:
            # With indices, torch-pruning makes a group of them and prunes that, which comes by here again.
            removed = [] if idxs is not None else list(self._removed(group))
            prune(idxs, record_history)
            for key, count, positions in removed:
                self._note(key, count, positions)

        return recorded

    def _removed(self, group: Any) -> Iterable[tuple[tuple[str, Side, int], int, list[int]]]:
        for dep, idxs in group:
            node = dep.target
            if node.type == tp.ops.OPTYPE.OUTPUT or not idxs:
                continue
            if isinstance(self._graph.get_pruner_of_module(node.module), tp.ops.DummyPruner):
                continue
            is_out = self._graph.is_out_channel_pruning_fn(dep.handler)
            count = (self._graph.get_out_channels if is_out else self._graph.get_in_channels)(node)
            if count is None:  # PReLU with one slope for all channels
                continue
            if isinstance(node.module, nn.Parameter):
                yield (parameter_name(self._graph, node.module), "parameter", node.pruning_dim), count, list(idxs)
            else:
                yield (self._names[node.module], "out" if is_out else "in", -1), count, list(idxs)

    def _note(self, key: tuple[str, Side, int], count: int, positions: list[int]) -> None:
        original, left = self._left.get(key, (count, torch.arange(count)))
        keep = torch.ones(len(left), dtype=torch.bool)
        keep[torch.tensor(positions)] = False
        self._left[key] = original, left[keep]

    @property
    def plan(self) -> RemovalPlan:
        """Everything removed so far, in the numbering of the model at the beginning."""
        cuts = []
        for (target, side, dim), (count, left) in self._left.items():
            gone = torch.ones(count, dtype=torch.bool)
            gone[left] = False
            cuts.append(Cut(target, side, dim, count, gone.nonzero().flatten()))
        return RemovalPlan(tuple(cuts), self._attributes())

    def _attributes(self) -> Attributes:
        """Collect numbers that modules around the cut layers have changed, such as ``num_heads`` of an attention."""
        cut = {target for target, _, _ in self._left}
        found: dict[str, dict[str, Any]] = {}
        for module, before in self._before.items():
            inside = [module, *module.children()]
            if next(module.children(), None) is None or not any(self._names[m] in cut for m in inside):
                continue
            after = stored_numbers(module)
            changed = {name: value for name, value in after.items() if name in before and before[name] != value}
            if changed:
                found[self._names[module]] = changed
        return found

    def save(self, path: str | Path) -> None:
        """Write the recording to a file for :func:`~disparse_plugin.structured.replay_removal`.

        Attention layers of timm must have been told their new width before
        (:func:`~disparse_plugin.structured.sync_attention`), as the model does not run without that anyway: numbers
        that a module around a cut layer holds are part of the file.

        Args:
            path: The file; an existing one is replaced atomically.
        """
        self.plan.save(path)
