"""Scores in a safetensors file: float tensors keyed by the number of the task and the qualified name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._support.files import read_tensors, understood, write_tensors
from ..agreement.tallies import extremes
from ..parameters import ParameterKey, keys_by_name, stored

_KIND = "disparse_plugin.scores"


def write_scores(path: str | Path, tables: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> None:
    """Write scores, by task and qualified name.

    Args:
        path: The file; an existing one is replaced atomically.
        tables: For each task the scores of what it reaches.
        facts: ``names``, ``unreached``, ``criterion``, ``num_batches`` and ``skipped``, as
            :class:`~disparse_plugin.TaskScores` has them.
    """
    tensors = {
        f"{number}/{name}": score for number, table in enumerate(tables.values()) for name, score in table.items()
    }
    write_tensors(path, tensors, kind=_KIND, facts={"tasks": list(tables), **facts})


def read_scores(path: str | Path, model: nn.Module) -> tuple[dict[str, dict[ParameterKey, Tensor]], dict[str, Any]]:
    """Read scores written by :func:`write_scores`.

    Args:
        path: The file.
        model: The model they belong to, or a copy; its devices decide where they go.

    Returns:
        The scores by task and parameter, and ``parameters``, ``criterion``, ``num_batches`` and ``skipped``.

    Raises:
        FileNotFoundError: If there is no such file.
        FileFormatError: If it is not a file of scores, is damaged, or was written by a newer version.
        ValueError: If a parameter is missing in the model, or has another shape.
    """
    tensors, facts = read_tensors(path, kind=_KIND)
    with understood(path, "scores"):
        tasks, names, unreached = (_names(facts, field) for field in ("tasks", "names", "unreached"))
        rest = {"criterion": str(facts["criterion"]), "num_batches": int(facts["num_batches"])}
        # Files of 0.1.0 do not say it; what they name does.
        named = rest["criterion"] == "lamp" or str(rest["criterion"]).startswith("layer_adaptive(")
        rest["shares"] = bool(facts.get("shares", named))
        rest["skipped"] = _reasons(facts)
        _check(tensors, len(tasks), names, unreached)
    keys = keys_by_name(model)
    missing = [name for name in (*names, *unreached) if name not in keys]
    if missing:
        raise ValueError(
            f"path: the scores of {path} must belong to the model, found {len(missing)} of "
            f"{len(names) + len(unreached)} parameters missing in it (first: {missing[0]}); load them with the model "
            "they were made for"
        )
    tables = {
        task: {
            keys[name]: tensors[entry].to(stored(*keys[name]).device)
            for name in names
            if (entry := f"{number}/{name}") in tensors
        }
        for number, task in enumerate(tasks)
    }
    return tables, {"parameters": [keys[name] for name in (*names, *unreached)], **rest}


def _names(facts: Mapping[str, Any], field: str) -> list[str]:
    names = facts[field]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{field} that are not a list of names")
    if len(set(names)) < len(names):
        raise ValueError(f"one of the {field} twice")
    return names


def _reasons(facts: Mapping[str, Any]) -> dict[str, str]:
    reasons = facts.get("skipped", {})  # files of version 0.1.0 have none
    if not isinstance(reasons, dict) or not all(isinstance(reason, str) for reason in reasons.values()):
        raise TypeError("skipped that is no mapping from name to reason")
    return reasons


def _check(tensors: Mapping[str, Tensor], tasks: int, names: Sequence[str], unreached: Sequence[str]) -> None:
    """Check counts and ranges: every task and listed name has a score, every score is listed, floating and finite.

    Raises:
        ValueError: If not.
    """
    listed = {f"{number}/{name}": (number, name) for number in range(tasks) for name in names}
    if extra := set(tensors) - set(listed):
        raise ValueError(f"scores that are not listed ({min(extra)})")
    found = [listed[entry] for entry in tensors]
    if {number for number, _ in found} != set(range(tasks)) or {name for _, name in found} != set(names) or not tasks:
        raise ValueError("a task or parameter without scores")
    if set(names) & set(unreached):
        raise ValueError("a parameter that is both reached and unreached")
    for entry, score in tensors.items():
        if not score.is_floating_point() or (score.numel() and not bool(extremes(score).isfinite().all())):
            raise ValueError(f"scores that are not finite numbers ({entry})")
