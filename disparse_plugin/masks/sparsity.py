"""How sparse a model is, counted from its masks: per layer, per part, of prunable and of all parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import FlopCounterMode

from .._support.distributed import this_rank, total_counts
from .._support.example_inputs import as_inputs, run
from .._support.shards import is_sharded, local, owns, reshard
from .._support.text_table import Table, Tabular
from .._support.undisturbed import undisturbed
from ..agreement.tallies import count_true
from ..parameters import ParameterKey, alive_mask, keys_by_name, prunable_parameters, qualified_names, stored, unwrap
from ..scoring.given import check_scores
from ..scoring.task_scores import TaskScores

_LONGEST_PART = 24  # letters of the joined names of tasks


@dataclasses.dataclass(frozen=True)
class LayerSparsity:
    """One pruned or prunable parameter.

    Attributes:
        name: Qualified name.
        shape: Shape of the weight.
        total: Number of entries.
        alive: Number of entries that no mask removes. A weight that happens to be zero is alive.
        tasks: Names of the tasks that reach it, or None without scores.
        flops: Theoretical floating point operations of its module's forward, dense; None if not counted. Weights of one
            module (a recurrent layer) have parts of them by their sizes, and what multiplies nothing (a bias) has none.
    """

    name: str
    shape: tuple[int, ...]
    total: int
    alive: int
    tasks: tuple[str, ...] | None = None
    flops: int | None = None

    @property
    def sparsity(self) -> float:
        """Fraction of the entries that a mask removes, in [0, 1]."""
        return 1 - self.alive / self.total

    @property
    def part(self) -> str:
        """What it serves: the tasks that reach it, joined by ``+``; ``"model"`` without scores."""
        if self.tasks is None:
            return "model"
        return " + ".join(self.tasks) or "no task"


@dataclasses.dataclass(frozen=True)
class SparsityReport(Tabular):
    """The report made by :func:`sparsity_report`; ``str()`` is a table.

    Attributes:
        layers: The pruned and prunable parameters, in module order.
        all_parameters: Number of entries of all parameters of the model, biases and normalisation included.
        skipped: What was left out of scoring because it cannot be masked: qualified name to reason. Empty without
            scores.
    """

    layers: tuple[LayerSparsity, ...]
    all_parameters: int
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def total(self) -> int:
        """Number of prunable entries."""
        return sum(layer.total for layer in self.layers)

    @property
    def alive(self) -> int:
        """Number of prunable entries alive."""
        return sum(layer.alive for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable entries that masks remove."""
        return 1 - self.alive / self.total

    @property
    def sparsity_of_all(self) -> float:
        """Fraction of all parameters that masks remove."""
        return (self.total - self.alive) / self.all_parameters

    @property
    def parts(self) -> dict[str, tuple[int, int]]:
        """``(alive, total)`` of each part: what all tasks share first, then what fewer use."""
        sums: dict[str, tuple[int, int]] = {}
        for layer in sorted(self.layers, key=lambda layer: -len(layer.tasks or ())):
            alive, total = sums.get(layer.part, (0, 0))
            sums[layer.part] = (alive + layer.alive, total + layer.total)
        return sums

    @property
    def theoretical_flops(self) -> tuple[float, int] | None:
        """``(sparse, dense)`` operations of one forward of the prunable layers; sparse = dense times density.

        Theoretical: dense kernels multiply by the zeros all the same. None if not counted.
        """
        if any(layer.flops is None for layer in self.layers):
            return None
        dense = sum(layer.flops or 0 for layer in self.layers)
        return sum((layer.flops or 0) * layer.alive / layer.total for layer in self.layers), dense

    def rows(self) -> list[dict[str, Any]]:
        """Return one dict per layer, as :meth:`to_dataframe` takes them."""
        return [{**dataclasses.asdict(layer), "sparsity": layer.sparsity, "part": layer.part} for layer in self.layers]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            "layers": [{**row, "shape": list(row["shape"])} for row in self.rows()],
            "parts": {part: {"alive": alive, "total": total} for part, (alive, total) in self.parts.items()},
            "prunable": {"alive": self.alive, "total": self.total, "sparsity": self.sparsity},
            "all": {"total": self.all_parameters, "sparsity": self.sparsity_of_all},
            "theoretical_flops": self.theoretical_flops,
            "skipped": dict(self.skipped),
        }

    def _table(self) -> Table:
        """Return layers, parts, totals."""
        short = self._short_parts()
        table = [("", "shape", "used by", "alive", "of", "sparsity")]
        for layer in self.layers:
            shape = " x ".join(map(str, layer.shape))
            table.append((layer.name, shape, short[layer.part], *_counts(layer.alive, layer.total)))
        if len(self.parts) > 1:
            table += [(short[part], "", "", *_counts(alive, total)) for part, (alive, total) in self.parts.items()]
        alive_of_all = self.all_parameters - self.total + self.alive
        table.append(("all prunable", "", "", *_counts(self.alive, self.total)))
        table.append(("all parameters", "", "", *_counts(alive_of_all, self.all_parameters)))
        after = [f"left out: {name} ({reason})" for name, reason in self.skipped.items()]
        if (flops := self.theoretical_flops) is not None:
            share = f"{100 * flops[0] / flops[1]:.2f} %" if flops[1] else "no prunable layer ran"
            after.append(f"theoretical FLOPs of a forward: {flops[0]:,.0f} of {flops[1]:,} ({share})")
        return Table(table, left=3, rule_before=len(self.layers) + 1, after=after)

    def _short_parts(self) -> dict[str, str]:
        """Return what a table calls each part: the tasks by name, or ``"3 of 14"`` where that would be long."""
        tasks = {layer.part: layer.tasks or () for layer in self.layers}
        count = len({task for names in tasks.values() for task in names})
        short: dict[str, str] = {}
        for part in self.parts:
            used = len(tasks[part])
            label = f"all {count}" if used == count else f"{used} of {count}"
            if used < 2 or len(part) <= _LONGEST_PART:
                label = part
            elif label in short.values():  # another three of fourteen
                label += f" ({sum(name.startswith(label) for name in short.values()) + 1})"
            short[part] = label
        return short


def sparsity_report(
    model: nn.Module, scores: TaskScores | None = None, *, example_inputs: Any = None
) -> SparsityReport:
    """Count, from the masks, how sparse a model is; where its weights are sharded, on all ranks together.

    Args:
        model: The model, pruned or not.
        scores: Its scores; then each layer and each part tells which tasks use it, and what was left out is listed.
        example_inputs: Arguments of one forward: a tensor, a tuple or a dict. Then theoretical FLOPs are counted too,
            by ``torch.utils.flop_counter``. The model is left as it was.

    Returns:
        The report; print it.

    Raises:
        TypeError: If ``scores`` are none.
        ValueError: If the model has no prunable parameter, or a lazy one, or the scores are of another model.

    Example:
        >>> from torch.nn.utils import prune
        >>> net = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 1))
        >>> hook = prune.l1_unstructured(net[0], "weight", 6)
        >>> print(sparsity_report(net))
                        shape  used by  alive  of  sparsity
        0.weight        2 x 4  model        2   8   75.00 %
        1.weight        1 x 2  model        2   2    0.00 %
        ---------------------------------------------------
        all prunable                        4  10   60.00 %
        all parameters                      7  13   46.15 %
    """
    if scores is not None:
        check_scores(scores)
    root = unwrap(model)
    reshard(root)
    _check_sizes(root)
    prunable = set(prunable_parameters(root))
    every, counted = keys_by_name(root).values(), dict[int, ParameterKey]()
    for key in every:
        if stored(*key).numel() and (key in prunable or alive_mask(*key) is not None):
            counted.setdefault(id(stored(*key)), key)  # one that two layers share is one
    keys = list(counted.values())
    if not keys:
        raise ValueError("model: must have a prunable parameter, found no Conv*/Linear weight and no mask")
    if scores is not None and not set(every) & set(scores.parameters):
        raise ValueError(
            f"scores: must be of this model object, found those of another (of {len(scores.parameters)} parameters); "
            "report on the model that was scored, or score this one"
        )
    flops = {} if example_inputs is None else _flops(root, example_inputs)
    layers = []
    for key, name, alive in zip(keys, qualified_names(root, keys), _alive(keys), strict=True):
        weight = stored(*key)
        tasks = None if scores is None else scores.tasks_reaching(*key)
        count = None if example_inputs is None else round(flops.get(key[0], 0) * _share(key))
        layers.append(LayerSparsity(name, tuple(weight.shape), weight.numel(), alive, tasks, count))
    skipped = {} if scores is None else dict(scores.skipped)
    return SparsityReport(tuple(layers), sum(parameter.numel() for parameter in root.parameters()), skipped)


def _alive(keys: Sequence[ParameterKey]) -> list[int]:
    """Count what no mask removes, on all ranks together where weights are sharded."""
    weights = [stored(*key) for key in keys]
    masks = [alive_mask(*key) for key in keys]
    if not any(is_sharded(weight) for weight in weights):
        return [w.numel() if mask is None else count_true(mask) for w, mask in zip(weights, masks, strict=True)]
    own = [
        owns(weight, this_rank()) * (local(weight).numel() if mask is None else count_true(local(mask)))
        for weight, mask in zip(weights, masks, strict=True)
    ]
    return total_counts(own)


def _check_sizes(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"model: every parameter must have a shape, found {name} lazy; run one batch through the model first"
            )


def _share(key: ParameterKey) -> float:
    """Return what share of its module's operations is one parameter's, so that all together are counted once."""
    module, name = key
    sizes = {
        id(parameter): parameter.numel()
        for own, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() > 1 and "bias" not in own
    }
    return sizes.get(id(stored(module, name)), 0) / max(1, sum(sizes.values()))


def _flops(model: nn.Module, example_inputs: Any) -> Mapping[nn.Module, int]:
    """Count the operations of each module itself, without those of the modules inside it."""
    with undisturbed(model, ()), torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(model, as_inputs(example_inputs))
    counts = counter.get_flop_counts()
    totals: dict[nn.Module, int] = {}
    for path, module in model.named_modules(remove_duplicate=False):  # the counter knows each by one of its names
        of_path = counts.get(f"{type(model).__name__}.{path}" if path else type(model).__name__, {})
        totals[module] = totals.get(module, 0) + sum(of_path.values())
    inside = {module: sum(totals[child] for child in module.children()) for module in totals}
    return {module: max(0, total - inside[module]) for module, total in totals.items()}


def _counts(alive: int, total: int) -> tuple[str, str, str]:
    return f"{alive:,}", f"{total:,}", f"{100 * (1 - alive / total):.2f} %"
