"""The scores of every weight for every task, and what can be asked of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from .. import arbiters
from .._support.double import knows_double
from .._support.shards import reshard
from ..agreement import patterns
from ..agreement.budgets import Amount, Budget, warn_of_percentages
from ..agreement.candidates import Candidates, joined_on_one_device
from ..agreement.cut import lift
from ..agreement.patterns import WEIGHTS, Pattern, Place, Weights, spread
from ..agreement.percentiles import agreement
from ..agreement.ranking import distinct, in_single
from ..agreement.renewed_shares import has_lost, renewed
from ..arbiters import Arbiter
from ..parameters import ParameterKey, stored
from .files import read_scores, write_scores
from .score_tables import ScoreTables
from .shards import any_sharded
from .shared_out_scores import SharedOutScores
from .storage import Widened


class TaskScores(ScoreTables):
    """One score per weight and task, as made by :func:`disparse_plugin.score_tasks`.

    Everything asked of it is about the entries alive *now*: entries that a mask of ``torch.nn.utils.prune`` has removed
    meanwhile are out of the ranking, so pruning again with the same scores composes. Shares of a layer, too, are those
    among its entries alive now.

    Attributes:
        tasks: Task names, in the order of the loss mapping.
        parameters: ``(module, name)`` pairs reached by at least one task, as ``torch.nn.utils.prune`` wants them.
        names: Their qualified names, same order (``"encoder.layer1.0.conv1.weight"``).
        unreached: Qualified names of the parameters that no task reaches. They are not in ``parameters`` and never
            pruned.
        skipped: Why other parameters were left out of scoring, by qualified name: those that cannot be masked, such as
            tied and parametrized ones. They are never pruned either.
        criterion: Name of the criterion.
        num_batches: Number of batches scored.
        shares: Whether the scores are shares of their tensor, as those of a layer-adaptive criterion.

    Example:
        >>> import torch
        >>> trunk, left, right = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 1)
        >>> keys = [(trunk, "weight"), (left, "weight"), (right, "weight")]
        >>> a = {keys[0]: torch.arange(16.0).reshape(4, 4), keys[1]: torch.ones(1, 4)}
        >>> b = {keys[0]: torch.arange(16.0).reshape(4, 4).flip(0), keys[2]: torch.ones(1, 4)}
        >>> scores = TaskScores(nn.ModuleList([trunk, left, right]), {"a": a, "b": b})
        >>> scores.tasks_reaching(trunk, "weight"), scores.tasks_reaching(left, "weight")
        (('a', 'b'), ('a',))
        >>> sum(int(mask.sum()) for mask in scores.masks(0.5).values())  # half of 24
        12
    """

    def importance(self, arbiter: str | Arbiter = "unanimous", *, min_keep: float = 0) -> dict[ParameterKey, Tensor]:
        """Return the agreement scores, for ``importance_scores=`` of ``torch.nn.utils.prune``.

        ``q = arbiter over the tasks k that reach the weight of (rank_k + 1) / n_k``, ranks among the ``n_k`` alive
        entries that task k reaches. With ``"sum"`` each task's shares of its scores in a tensor, as of
        :func:`~disparse_plugin.criteria.lamp_scores`, take the place of its percentiles.

        Args:
            arbiter: ``"unanimous"`` (DiSparse), ``"majority"``, ``"mean"``, ``"any"``, ``"sum"``, ``at_least(k)`` or a
                callable over the task axis; see :mod:`disparse_plugin.arbiters`.
            min_keep: As in :meth:`masks`. What it protects is lifted above everything else, with ``(3 + q) / 4`` to
                ``q / 4``, so that it goes last; pruned so far that it has to go, it goes without an error.

        Returns:
            For each pair of ``parameters`` a float64 tensor of the weight's shape, on its device, values in [0, 1];
            entries already pruned are 0. On a device without float64 (``mps``) they are float32, raised where they
            would be equal: in the same order.

        Raises:
            TypeError: If ``min_keep`` is neither int nor float.
            ValueError: If the arbiter is unknown or returns values outside [0, 1], or ``min_keep`` is out of range.
        """
        budget, rule = Budget(min_keep=min_keep), arbiters.resolve(arbiter)
        if self._is_sharded:
            return dict(zip(self.parameters, self._shared_out().importance(rule, budget), strict=True))
        places = self.places()
        candidates = self.candidates(places=places)
        floors = [
            budget.kept_of(place.shape.numel(), size) for place, size in zip(places, candidates.sizes, strict=True)
        ]
        values = lift(agreement(candidates, self.tasks, rule), floors, candidates.magnitudes)
        parted = distinct(joined_on_one_device(values), candidates.joined_magnitudes(range(len(places))))
        if not all(knows_double(stored(*key).device) for key in self.parameters):
            parted = in_single(parted)
        split = parted.split(candidates.sizes)
        return {
            key: spread(part.to(value.device), place).to(stored(*key).device)
            for key, part, value, place in zip(self.parameters, split, values, places, strict=True)
        }

    def masks(
        self,
        amount: Amount | Budget | None = None,
        arbiter: str | Arbiter = "unanimous",
        *,
        min_keep: float = 0,
        pattern: str | Pattern = "weights",
    ) -> dict[ParameterKey, Tensor]:
        """Return the keep masks that leave out exactly ``amount`` of the entries still alive.

        The same masks as ``prune.global_unstructured`` makes with :meth:`importance`, found without a full sort where
        possible. The model is not changed.

        Args:
            amount: A fraction of the alive entries (float in [0, 1]) or a count (int). Or one for each part, e.g.
                ``{"shared": 0.9, "depth": 0.5, "normals": 0.5}``: ``"shared"`` is what two or more tasks reach, a
                task's name what it alone reaches. Each part is then cut on its own, by the same agreement scores.
            arbiter: As in :meth:`importance`.
            min_keep: In every tensor at least so many entries stay: those with the highest agreement scores. A count
                (int), or a fraction of the tensor's weights (float in (0, 1)): ``round(min_keep * weights)``, at least
                1. At most what is alive. 0 protects nothing.
            pattern: ``"weights"``: single weights. ``"n:m"``, e.g. ``"2:4"``: of every m that follow each other along
                the input dimension the n with the highest agreement scores stay; ``amount`` is left out.
                ``"channels"``: whole output channels are masked; ``amount`` and ``min_keep`` count channels. See
                :mod:`disparse_plugin.agreement.patterns`.

        Returns:
            For each pair of ``parameters`` a bool tensor of the weight's shape, on its device (a DTensor of its
            layout if the weight is one); True = keep. Of all alive entries exactly ``round(amount * alive)`` are False
            (of each part, with amounts per part), and so is every entry that was pruned before. Of equal agreement
            scores the entry of the smaller ``abs(w)`` goes first, of equal magnitudes too the one that comes first.

        Raises:
            TypeError: If an argument is of the wrong type.
            ValueError: If ``amount`` or ``min_keep`` is out of range, ``min_keep`` protects more than ``amount`` leaves
                over, a part is unknown or missing, the arbiter or the pattern is unknown, or a parameter does not fit
                the pattern.

        Warns:
            EmptyTensorWarning: If nothing stays of a tensor.
            TiesWarning: If the cut falls among weights that score zero for every task.
            UserWarning: If a count looks like a percentage: 1 to 100 that is below 1 %, or 50 to 100 of more than 500.

        Example:
            >>> import torch
            >>> trunk, head = nn.Linear(4, 2), nn.Linear(2, 1)
            >>> keys = [(trunk, "weight"), (head, "weight")]
            >>> a = {keys[0]: torch.ones(2, 4), keys[1]: torch.tensor([[0.1, 0.2]])}
            >>> scores = TaskScores(nn.Sequential(trunk, head), {"a": a, "b": {keys[0]: torch.ones(2, 4)}})
            >>> scores.masks(0.5)[keys[1]], scores.masks(0.5, min_keep=1)[keys[1]]
            (tensor([[False, False]]), tensor([[False,  True]]))
            >>> masks = scores.masks({"shared": 0.25, "a": 0.5})
            >>> [int(masks[key].sum()) for key in keys]
            [6, 1]
        """
        budget, rule, form = Budget.of(amount, min_keep), arbiters.resolve(arbiter), patterns.resolve(pattern)
        form.check_budget(budget)
        if self._is_sharded:
            found = self._shared_out().masks(amount, rule, budget, form)
            return dict(zip(self.parameters, found, strict=True))
        places = self.places()
        form.check(places)
        candidates = self.candidates(form, places)
        warn_of_percentages(amount, candidates, form.name)
        gone = form.removed(candidates, self.tasks, rule, budget, places)
        return {
            key: form.mask(~mark, place).to(stored(*key).device)
            for key, mark, place in zip(self.parameters, gone, places, strict=True)
        }

    def check_whole(self) -> None:
        """Refuse scores of sharded weights, of which no rank has all.

        Raises:
            ValueError: If these are such.
        """
        if self._is_sharded:
            raise ValueError(
                "scores: must be of whole weights here, found some of sharded ones; masks() and importance() take them"
            )

    @property
    def _is_sharded(self) -> bool:
        reshard(self._root)
        return any_sharded(self.parameters)

    def _shared_out(self) -> SharedOutScores:
        return SharedOutScores(self.parameters, self.names, self.by_parameter(), self.tasks, shares=self.shares)

    def candidates(self, pattern: Pattern = WEIGHTS, places: Sequence[Place] | None = None) -> Candidates:
        """Return what a cut chooses from: the units alive now, their scores by task and their magnitudes.

        Args:
            pattern: What one unit is.
            places: As :meth:`places` returned them; by default those of now.

        Raises:
            ValueError: If the scores are of sharded weights, of which no rank has all.
        """
        self.check_whole()
        places = self.places() if places is None else places
        tables = self.by_parameter()
        lost = has_lost(tables, places) if self.shares else [False] * len(places)
        rows = [_units(row, pattern, place, gone) for row, place, gone in zip(tables, places, lost, strict=True)]
        weights = [
            pattern.magnitudes(stored(*key).detach().to(self.device_of(key)), place)
            for key, place in zip(self.parameters, places, strict=True)
        ]
        return Candidates(rows, weights, shares=self.shares and isinstance(pattern, Weights))

    def save(self, path: str | Path) -> None:
        """Write the scores to a safetensors file, keyed by qualified name; an existing file is replaced atomically.

        Args:
            path: The file.

        Raises:
            ValueError: If the scores are of sharded weights, of which no rank has all.
        """
        if self._is_sharded:
            raise ValueError(
                "scores: must be of whole weights to be written to one file, found some of sharded ones; write the "
                "masks with save_masks, or the scores, which are DTensors, with torch.distributed.checkpoint"
            )
        names = dict(zip(self.parameters, self.names, strict=True))
        tables = {task: {names[key]: score for key, score in table.items()} for task, table in self._tables.items()}
        facts = {
            "names": list(self.names),
            "unreached": list(self.unreached),
            "criterion": self.criterion,
            "num_batches": self.num_batches,
            "shares": self.shares,
            "skipped": self.skipped,
        }
        write_scores(path, tables, facts)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module) -> TaskScores:
        """Read scores written by :meth:`save`, for the same model or a copy of it.

        Args:
            path: The file.
            model: A model with the same parameter names and shapes; its devices decide where the scores go.

        Raises:
            FileNotFoundError: If there is no such file.
            FileFormatError: If it is not a file of scores, is damaged, or was written by a newer version.
            ValueError: If it does not fit the model.
        """
        tables, rest = read_scores(path, model)
        return cls(model, tables, **rest)


def _units(rows: Mapping[str, Tensor], pattern: Pattern, place: Place, lost: bool) -> Mapping[str, Tensor]:
    """Turn one parameter's scores into those of its units; rounded ones as they are looked at, to hold no more."""

    def units(score: Tensor) -> Tensor:
        return pattern.units(renewed(score, place) if lost else score, place)

    if isinstance(rows, Widened) and isinstance(pattern, Weights):
        return rows.then(units)
    return {task: units(score) for task, score in rows.items()}
