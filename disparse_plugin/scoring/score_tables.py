"""The tables that scoring fills: one score per weight and task, by parameter, and what reaches what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .._support.double import comparable
from .._support.text_table import Table, Tabular
from ..agreement.patterns import Place
from ..kinds import check_flag, check_kind, whole_number
from ..maskable import check_parameters, checked_pairs
from ..parameters import ParameterKey, alive_mask, inputs_first, qualified_names, stored, unwrap
from .checks import check_tables, check_tasks
from .storage import KEPT, widened


class ScoreTables(Tabular):
    """Scores of every task, read by task, by parameter, or as rows; :class:`.TaskScores` cuts by them."""

    def __init__(
        self,
        model: nn.Module,
        scores: Mapping[str, Mapping[ParameterKey, Tensor]],
        *,
        parameters: Iterable[ParameterKey] | None = None,
        criterion: str = "custom",
        num_batches: int = 0,
        shares: bool = False,
        skipped: Mapping[str, str] | None = None,
    ) -> None:
        """Take scores made elsewhere.

        Args:
            model: The model that the parameters belong to.
            scores: For each task, a floating point score of the weight's shape for each parameter that the task
                reaches.
            parameters: Order of the parameters; by default that of the model's modules.
            criterion: What reports and saved files call the criterion.
            num_batches: How many batches the scores come from.
            shares: Whether each task's scores in a tensor are shares of it already, as
                :func:`~disparse_plugin.criteria.lamp_scores` makes them (a layer-adaptive criterion does).
            skipped: What was left out of scoring: qualified name to reason.

        Raises:
            TypeError: If a score is not a floating point tensor.
            ValueError: If there is no task, a task reaches no parameter, a shape differs, a score is not finite, or a
                parameter is refused by :func:`disparse_plugin.maskable.check_parameters`.
        """
        if not (skipped is None or isinstance(skipped, Mapping)):
            raise TypeError(f"skipped: must be a mapping from name to reason, found {type(skipped).__name__}")
        check_tasks(scores)
        root = unwrap(model)
        reached = set(checked_pairs([key for table in scores.values() for key in table]))
        if parameters is None:
            order = {module: place for place, module in enumerate(root.modules())}
            parameters = sorted(reached, key=lambda key: (order.get(key[0], -1), key[1]))
        keys = check_parameters(root, parameters)
        names = dict(zip(keys, qualified_names(root, keys), strict=True))
        check_tables(scores, names)
        check_kind("criterion", criterion, str, "the name of a criterion")
        check_flag("shares", shares)
        self._root = root
        self.tasks: tuple[str, ...] = tuple(scores)
        self.parameters: tuple[ParameterKey, ...] = tuple(key for key in keys if key in reached)
        self.names: tuple[str, ...] = tuple(names[key] for key in self.parameters)
        self.unreached: tuple[str, ...] = tuple(names[key] for key in keys if key not in reached)
        self.skipped: dict[str, str] = dict(skipped or {})
        self.criterion = criterion
        self.num_batches = whole_number("num_batches", num_batches, least=0)
        self.shares = shares
        self._tables = {
            task: MappingProxyType({key: _plain(table[key]) for key in self.parameters if key in table})
            for task, table in scores.items()
        }

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy is made of, with its model; read-only tables can be neither pickled nor copied."""
        return {**vars(self), "_tables": {task: dict(table) for task, table in self._tables.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what :meth:`__getstate__` returned."""
        vars(self).update(state)
        self._tables = {task: MappingProxyType(table) for task, table in state["_tables"].items()}

    def __getitem__(self, task: str) -> Mapping[ParameterKey, Tensor]:
        """Return the scores of one task: ``(module, name)`` to a tensor of the weight's shape, where it reaches.

        Raises:
            KeyError: If there is no such task.
        """
        if not isinstance(task, str) or task not in self._tables:
            raise KeyError(f"task: must be one of {', '.join(self.tasks)}, found {task!r}")
        return self._tables[task]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the task names."""
        return iter(self.tasks)

    def __len__(self) -> int:
        """Return the number of tasks."""
        return len(self.tasks)

    def __contains__(self, task: object) -> bool:
        """Tell whether there is a task of that name."""
        return task in self._tables

    def __repr__(self) -> str:
        """Summarise in one line."""
        skipped = f", skipped={len(self.skipped)}" if self.skipped else ""
        return (
            f"TaskScores(tasks={list(self.tasks)}, parameters={len(self.parameters)}, criterion={self.criterion!r}, "
            f"num_batches={self.num_batches}{skipped})"
        )

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat row per task and parameter that it reaches: counts, mean and largest score."""
        return [
            {
                "task": task,
                "parameter": name,
                "weights": table[key].numel(),
                "mean score": float(table[key].mean(dtype=torch.float64)),
                "largest score": float(table[key].max()),
            }
            for task, table in self._tables.items()
            for key, name in zip(self.parameters, self.names, strict=True)
            if key in table
        ]

    def _table(self) -> Table:
        """Return what each task reaches, and how much of it alone; for notebooks."""
        rows = [("task", "parameters", "weights", "of its own")]
        for task, table in self._tables.items():
            own = sum(score.numel() for key, score in table.items() if self.tasks_reaching(*key) == (task,))
            weights = sum(score.numel() for score in table.values())
            rows.append((task, f"{len(table):,}", f"{weights:,}", f"{own:,}"))
        unreached = f"reached by no task: {', '.join(self.unreached)}" if self.unreached else ""
        scored = f"scored by {self.criterion} on {self.num_batches} batches"
        return Table(rows, before=[scored], after=[unreached] if unreached else [])

    def __str__(self) -> str:
        """Summarise in one line."""
        return repr(self)

    def tasks_reaching(self, module: nn.Module, name: str) -> tuple[str, ...]:
        """Return the tasks whose loss reaches a parameter; two or more make it shared.

        Args:
            module: The module.
            name: The parameter's name inside it, e.g. ``"weight"``.

        Returns:
            Task names, in the order of ``tasks``; empty for a parameter that no task reaches.

        Raises:
            TypeError: If ``module`` is no module.
        """
        check_kind("module", module, nn.Module, "a module of the model")
        return tuple(task for task in self.tasks if (module, name) in self._tables[task])

    def by_parameter(self) -> list[Mapping[str, Tensor]]:
        """Return, for each of ``parameters``, the scores of the tasks that reach it, each of the weight's shape.

        Those of fewer than 32 bits are read as float32.
        """
        return [
            widened({task: table[key] for task, table in self._tables.items() if key in table})
            for key in self.parameters
        ]

    def places(self) -> list[Place]:
        """Return, for each of ``parameters``, its name, its shape and what of it is alive now, where the scores lie.

        Raises:
            ValueError: If a parameter has another shape than when it was scored.
        """
        for key, name in zip(self.parameters, self.names, strict=True):
            now, then = stored(*key).shape, self._kept(key).shape
            if now != then:
                raise ValueError(
                    f"scores: must be of the model as it is, found {name} of shape {tuple(now)}, which had the shape "
                    f"{tuple(then)} when it was scored; score the model again"
                )
        return [
            Place(
                name, stored(*key).shape, None if alive is None else alive.to(self.device_of(key)), inputs_first(*key)
            )
            for key, name in zip(self.parameters, self.names, strict=True)
            for alive in [alive_mask(*key)]
        ]

    def device_of(self, key: ParameterKey) -> torch.device:
        """Return where the scores of a parameter lie."""
        return self._kept(key).device

    def _kept(self, key: ParameterKey) -> Tensor:
        """Return the scores of the first task that reaches a parameter, as they are kept."""
        return next(table[key] for table in self._tables.values() if key in table)


def _plain(score: Tensor) -> Tensor:
    """Give a score no history, a type in which scores are kept, and a place where they can be compared."""
    score = comparable(score.detach())
    return score if score.dtype in KEPT else score.float()
