"""Importances of torch-pruning as the per-task criterion of DiSparseImportance."""

from __future__ import annotations

import pytest
import torch
import torch_pruning as tp

from disparse_plugin.structured import DiSparseImportance, sync_attention
from disparse_plugin.structured.masked_copy import masked_copy
from oracles.structured import cuts_of, kept_units
from structured_networks import batches, build, deviation, losses, make_pruner

BASES = {
    "taylor": lambda: tp.importance.GroupTaylorImportance(),
    "hessian": lambda: tp.importance.GroupHessianImportance(),
    "magnitude": lambda: tp.importance.GroupMagnitudeImportance(),
    "lamp": lambda: tp.importance.LAMPImportance(),
}

pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("kind", ["batchnorm", "grouped", "transformer"])
def test_any_importance_as_the_criterion(base: str, kind: str) -> None:
    model = build(kind)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    pruner = make_pruner(model, options={"base": BASES[base]()})
    before = kept_units(pruner)
    groups = list(pruner.step(interactive=True))
    assert all(bool((p.grad == 7.0).all()) for p in model.parameters())
    soft = masked_copy(model, cuts_of(pruner, groups))
    for group in groups:
        group.prune()
    sync_attention(pruner.num_heads, model)
    assert deviation(soft, model) < 1e-5
    assert abs(kept_units(pruner) / before - 0.5) * before <= 1


def test_hessian_as_the_criterion_sees_every_batch() -> None:
    """torch-pruning's own accumulation keeps the last batch only."""
    model = build("batchnorm")
    first, second = batches(2)
    found = {}
    for name, data in {"both": [first, second], "swapped": [second, first], "last": [second]}.items():
        importance = DiSparseImportance(
            rescore=(losses, data), base=tp.importance.GroupHessianImportance(normalizer=None)
        )
        graph = tp.DependencyGraph().build_dependency(model, (first,))
        group = next(g for g in graph.get_all_groups() if any(dep.target.module is model.stem for dep, _ in g))
        found[name] = importance.task_scores(group)["label"]
    torch.testing.assert_close(found["both"], found["swapped"])
    assert not torch.allclose(found["both"], found["last"], rtol=1e-2)


def test_obdc_is_refused_with_what_to_use_instead() -> None:
    pruner = make_pruner(build("batchnorm"), options={"base": tp.importance.OBDCImportance()})
    with pytest.raises(ValueError, match="criterion='fisher'"):
        pruner.step()
