"""The reference: one page per function and class, listed by public module as its ``__all__`` says."""

import importlib
import inspect
import tomllib
import types
from pathlib import Path

from sphinx.ext.autodoc.mock import mock

# In the order in which a reader meets them; the first names of the first module come before the alphabet.
MODULES = {
    "disparse_plugin": "Score and prune",
    "disparse_plugin.criteria": "Criteria: how a task scores a weight",
    "disparse_plugin.arbiters": "Arbiters: whose opinion counts",
    "disparse_plugin.damped_shares": "Damped shares: the default for trained networks",
    "disparse_plugin.masks": "Masks: copies, files, reports",
    "disparse_plugin.structured": "Channels",
    "disparse_plugin.sparse_training": "Sparse training",
    "disparse_plugin.analysis": "Analysis",
    "disparse_plugin.lightning": "Lightning",
    "disparse_plugin.hf_trainer": "Hugging Face Trainer",
}
FIRST = ("score_tasks", "TaskScores", "disparse_pretrained", "disparse_static", "remove_channels", "DiSparseScheduler")
ABSENT = ["accelerate", "transformers"]  # need not be installed to build the site
# What reports and plans hold; these have no name in a public module, but users read their fields.
RECORDS = {
    "disparse_plugin.masks": ["sparsity.LayerSparsity"],
    "disparse_plugin.structured": ["report.Change", "report.PartChange", "report.GroupChange"],
    "disparse_plugin.analysis": ["gradient_conflict.LayerConflict"],
}


def repository() -> str:
    """Return the address of the repository, which is written in one place."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["project"]["urls"]["Repository"]


def public_names(module: types.ModuleType) -> list[str]:
    """Return what a module offers, functions before classes, the first things first.

    That is what its ``__all__`` lists; where it has none, what it defines and does not hide.
    """
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    names = [name for name in getattr(module, "__all__", own) if name[0] != "_" and callable(getattr(module, name))]
    names.sort(key=lambda name: (inspect.isclass(getattr(module, name)), name.lower()))
    return sorted(names, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))


def page(name: str, title: str, seen: set[int]) -> str:
    """Write the page of a module: what it is for, then a table of its names, each with a page of its own."""
    with mock(ABSENT):
        module = importlib.import_module(name)
    own = [each for each in public_names(module) if id(getattr(module, each)) not in seen]
    seen.update(id(getattr(module, each)) for each in own)
    entries = [*own, *RECORDS.get(name, ())]
    table = "\n   ".join(entries)
    return (
        f"{title}\n{'=' * len(title)}\n\n.. automodule:: {name}\n   :no-members:\n\n"
        f".. autosummary::\n   :toctree:\n   :nosignatures:\n\n   {table}\n"
    )


def write(folder: Path) -> None:
    """Write the page of every public module."""
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[int] = set()
    for name, title in MODULES.items():
        path, text = folder / f"{name.replace('.', '-')}.rst", page(name, title, seen)
        if not path.exists() or path.read_text(encoding="utf-8") != text:  # a new file would be read anew
            path.write_text(text, encoding="utf-8")
