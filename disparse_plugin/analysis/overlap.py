"""What the tasks' own masks have in common, layer by layer and for all that they share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .._support.text_table import Table, Tabular, readable
from ..agreement.amounts import warn_of_percentage
from ..kinds import check_flag
from ..scoring.task_scores import TaskScores
from .measures import Overlap, count_stratum, together
from .task_masks import AliveMasks, AmountOf, alive_masks, counted
from .watershed import Branch, Watershed, branch, judge_watershed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .controls import Controls


@dataclasses.dataclass(frozen=True)
class TaskOverlap(Tabular):
    """What the tasks' own masks have in common, as made by :func:`task_overlap`.

    Attributes:
        tasks: Task names.
        amount: What each task's own mask removes; see ``cut``.
        cut: How ``amount`` is meant; see :mod:`disparse_plugin.analysis.task_masks`.
        layers: One :class:`~disparse_plugin.analysis.measures.Overlap` per parameter reached by two or more tasks, in
            the order of ``TaskScores.parameters``, which is that of the model's modules.
        private: The same for parameters reached by a single task; only their sizes and densities mean something.
        controls: The null models and the ceiling, where :func:`~disparse_plugin.analysis.overlap_with_controls` made
            them.
        criterion: Name of the criterion of the scores.
        num_batches: Number of batches that the scores come from.
    """

    tasks: tuple[str, ...]
    amount: float
    cut: AmountOf
    layers: tuple[Overlap, ...]
    private: tuple[Overlap, ...] = ()
    controls: Controls | None = None
    criterion: str = "custom"
    num_batches: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Qualified names of the shared parameters."""
        return tuple(layer.name for layer in self.layers)

    @property
    def trunk(self) -> Overlap:
        """All shared layers together; chance is still chance within each layer."""
        return together("trunk", self.layers)

    def __getitem__(self, name: str) -> Overlap:
        """Return one layer.

        Raises:
            KeyError: If no shared layer has that name.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"name: must be one of the shared parameters {', '.join(self.names)}, found {name!r}")

    def __iter__(self) -> Iterator[Overlap]:
        """Iterate over the shared layers."""
        return iter(self.layers)

    def __len__(self) -> int:
        """Return the number of shared layers."""
        return len(self.layers)

    def select(self, keep: Callable[[str], bool]) -> TaskOverlap:
        """Return the same analysis of some of the shared layers, e.g. without the shortcuts as in the paper's figure.

        Args:
            keep: ``keep(name)`` tells whether a layer stays.

        Raises:
            ValueError: If no layer is left.
        """
        places = [place for place, name in enumerate(self.names) if keep(name)]
        if not places:
            raise ValueError(f"keep: must leave at least one layer, found none left of {', '.join(self.names)}")
        controls = None if self.controls is None else self.controls.select(places)
        return dataclasses.replace(self, layers=tuple(self.layers[place] for place in places), controls=controls)

    def watershed(self, *, min_drop: float = 0.1, significance: float = 0.05) -> Watershed | None:
        """Find the layer after which the tasks agree clearly less, or None when the data do not support one.

        The rule is stated in :mod:`disparse_plugin.analysis.watershed`. With controls it is applied to the agreement
        relative to the ceiling; without, to kappa.

        Args:
            min_drop: The least drop of the mean agreement that counts.
            significance: Largest p-value of the permutation test.
        """
        return judge_watershed(self.layers, self.controls, min_drop=min_drop, significance=significance)[0]

    def explain_watershed(self, *, min_drop: float = 0.1, significance: float = 0.05) -> str:
        """Say what :meth:`watershed` found and what it means for an architecture, or why it found none.

        Args:
            min_drop: As in :meth:`watershed`.
            significance: As in :meth:`watershed`.
        """
        return judge_watershed(self.layers, self.controls, min_drop=min_drop, significance=significance)[1]

    def suggest_branch(self, after: str | None = None) -> Branch | None:
        """Say what it would cost to give every task its own copy of the layers after one layer.

        Args:
            after: Name of the last layer to share; by default the :meth:`watershed`.

        Returns:
            The layers and the cost, or None when ``after`` is not given and there is no watershed.

        Raises:
            KeyError: If no shared layer has that name.
        """
        if after is None:
            watershed = self.watershed()
            if watershed is None:
                return None
            after = watershed.layer
        return branch(self.layers, self.private, self[after].name)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON; what is undefined is None."""
        found: dict[str, Any] = {
            "tasks": list(self.tasks),
            "amount": self.amount,
            "cut": self.cut,
            "criterion": self.criterion,
            "num_batches": self.num_batches,
            "layers": [layer.to_dict() for layer in self.layers],
            "trunk": self.trunk.to_dict(),
            "private": [{"name": p.name, "task": p.tasks[0], "size": p.size, **_only(p)} for p in self.private],
        }
        if self.controls is not None:
            found["controls"] = self.controls.to_dict()
        return found

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat row per layer and for the trunk, and with three or more tasks per pair too.

        :meth:`to_dataframe` makes a table of them.
        """
        rows = [row for layer in (*self.layers, self.trunk) for row in layer.rows()]
        return rows if self.controls is None else self.controls.add_to(rows)

    def _table(self) -> Table:
        """Return a table of all shared layers and the trunk."""
        columns = {"size": "size", "iou": "IoU", "chance_iou": "chance", "kappa": "kappa", "rank_correlation": "rank r"}
        header = ["shared layer", *columns.values(), *(f"kept by {k}" for k in range(len(self.tasks) + 1))]
        header += [] if self.controls is None else ["permuted", "across", "ceiling"]
        rows = [header]
        for place, layer in enumerate((*self.layers, self.trunk)):
            kept = [f"{count:,}" for count in layer.kept_by]
            cells = [layer.name, *(_cell(getattr(layer, column)) for column in columns)]
            rows.append(cells + kept + [""] * (len(self.tasks) + 1 - len(kept)))
            if self.controls is not None:
                rows[-1] += [_cell(profile[place].kappa) for profile in self.controls.profiles()]
        return Table(rows, before=[self._headline()])

    def _headline(self) -> str:
        meaning = "each task's own mask removes" if self.cut == "per_task" else "the union of the tasks' masks removes"
        amount = f"{100 * self.amount:g} %" if isinstance(self.amount, float) else f"{self.amount:,} weights"
        note = "" if self.controls is None else "; permuted, across halves and ceiling are kappas"
        names = ", ".join(map(readable, self.tasks))
        return f"{names if len(names) <= 80 else f'{len(self.tasks)} tasks'}: {meaning} {amount}{note}"

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the IoU per layer with what chance gives, and the controls where there are any.

        Args:
            ax: Where to draw; by default a new figure.

        Returns:
            The figure and the axes.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        from .plots import plot_iou

        return plot_iou(self, ax)


def task_overlap(
    scores: TaskScores,
    amount: float,
    *,
    cut: AmountOf = "per_task",
    rank_correlation: bool = True,
    as_scored: bool | None = None,
) -> TaskOverlap:
    """Compare the tasks' own masks, layer by layer, with what chance would give at the same densities.

    Each task's own mask is what the task would keep if the network served it alone: by default the top ``1 - amount``
    of all weights that *it* uses, private ones included, as in the paper (whose keep ratio is ``rho = 1 - amount``).

    The plain IoU follows the layers' densities: it falls from layer to layer even between two identical tasks with
    different heads, or for random labels. Read it next to ``chance_iou``, and draw conclusions from ``kappa``, best
    with :func:`~disparse_plugin.analysis.overlap_with_controls`.

    Args:
        scores: The scores of two or more tasks.
        amount: How much is removed: a fraction (float in [0, 1]) or a count (int).
        cut: ``"per_task"``: every task removes ``amount`` of what it uses. ``"union"``: one keep ratio for all, at
            which the union of the masks is ``scores.masks(amount)``.
        rank_correlation: Whether to compare the scores themselves too, which takes a sort per layer and task.
        as_scored: True: all entries count, whatever masks the model carries now. False: those alive now. By default
            those alive now, with a warning if the model carries masks: who pruned with these scores may mean True.

    Returns:
        The analysis; ``str()`` of it is a table.

    Raises:
        TypeError: If ``amount`` is neither int nor float.
        ValueError: If ``amount`` is out of range, ``cut`` is unknown, or no parameter is reached by two tasks.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 1)
        >>> a, b = torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.tensor([[4.0, 1.0, 2.0, 3.0]])
        >>> overlap = task_overlap(TaskScores(layer, {"a": {(layer, "weight"): a}, "b": {(layer, "weight"): b}}), 0.5)
        >>> overlap.trunk.kept_by, round(overlap.trunk.iou, 3), overlap.trunk.kappa
        ((1, 2, 1), 0.333, 0.0)
    """
    check_flag("rank_correlation", rank_correlation)
    places = counted(scores, as_scored)
    alive = scores.candidates(places=places)
    warn_of_percentage(amount, sum(alive.sizes))
    masks = alive_masks(alive, scores.tasks, amount, cut)
    ranked = alive.scores if rank_correlation else None
    overlap = overlap_of_masks(scores.names, scores.tasks, amount, cut, masks, ranked)
    return dataclasses.replace(overlap, criterion=scores.criterion, num_batches=scores.num_batches)


def overlap_of_masks(
    names: Sequence[str],
    tasks: Sequence[str],
    amount: float,
    cut: AmountOf,
    masks: AliveMasks,
    scores: Sequence[Mapping[str, Tensor]] | None,
) -> TaskOverlap:
    """Count masks that are there already.

    Raises:
        ValueError: If no parameter is reached by two tasks.
    """
    shared: list[Overlap] = []
    private: list[Overlap] = []
    for place, (name, row) in enumerate(zip(names, masks, strict=True)):
        if next(iter(row.values())).numel():
            overlap = Overlap(name, (count_stratum(row, None if scores is None else scores[place]),))
            (shared if len(row) > 1 else private).append(overlap)
    if not shared:
        raise ValueError(
            f"scores: at least two tasks must reach the same parameter, found {', '.join(tasks)} with nothing shared; "
            "the overlap of masks is a question about a shared trunk"
        )
    return TaskOverlap(tuple(tasks), amount, cut, tuple(shared), tuple(private))


def _cell(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return "-" if math.isnan(value) else f"{value:.3f}"


def _only(layer: Overlap) -> dict[str, Any]:
    return {"density": layer.density[layer.tasks[0]]}
