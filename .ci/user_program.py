"""What a user writes, fully annotated: .ci/types checks it against the wheel. Nothing of it is run."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from disparse_plugin import DiSparsePretrained, TaskScores, disparse_static, layer_adaptive, score_tasks
from disparse_plugin.analysis import task_overlap
from disparse_plugin.arbiters import at_least
from disparse_plugin.masks import attach_masks, clone_pruned, fold, load_masks, save_masks, sparsity_report
from disparse_plugin.sparse_training import DiSparseScheduler, GradualPruning, joint

Batch = tuple[Tensor, Tensor, Tensor]


class TwoHeads(nn.Module):
    """A trunk and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(8, 8)
        self.a, self.b = nn.Linear(8, 2), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs of both tasks."""
        features = self.trunk(x).relu()
        return self.a(features), self.b(features)


def losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """One scalar loss per task."""
    x, label, value = batch
    a, b = model(x)
    return {"a": F.cross_entropy(a, label), "b": F.mse_loss(b, value)}


def signed(weight: Tensor, grad: Tensor) -> Tensor:
    """Score by a criterion of one's own."""
    return (weight * grad).clamp_min(0)


def prune_once(model: nn.Module, data: Iterable[Batch]) -> TaskScores:
    """Score, look, prune."""
    scores = score_tasks(model, losses, data, criterion=layer_adaptive("taylor"), num_batches=4)
    prune.global_unstructured(scores.parameters, DiSparsePretrained, importance_scores=scores.importance(), amount=0.5)
    kept: dict[tuple[nn.Module, str], Tensor] = scores.masks(0.5, at_least(2))
    print(sparsity_report(model, scores), task_overlap(scores, 0.5), sum(int(mask.sum()) for mask in kept.values()))
    return scores


def keep(model: nn.Module, scores: TaskScores) -> nn.Module:
    """Copy, write, read, make permanent."""
    save_masks(model, "masks.safetensors", facts={"amount": 0.5})
    fresh = TwoHeads()
    facts = load_masks(fresh, "masks.safetensors")
    attach_masks(fresh, scores.masks(0.5))
    print(facts["amount"])
    return fold(clone_pruned(model))


def train_sparse(model: nn.Module, data: list[Batch]) -> None:
    """Train with masks that move, then with masks that grow."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    disparse_static(model, losses, data, 0.5, criterion=signed)
    scheduler = DiSparseScheduler(model, optimizer, joint(losses), distribution="existing", stop_at=8)
    pruning = GradualPruning(model, optimizer, losses, amount=0.9, stop_at=8)
    for batch in data:
        torch.stack([*losses(model, batch).values()]).sum().backward()  # type: ignore[no-untyped-call]  # of torch
        optimizer.step()
        scheduler.step(batch)
        pruning.step(batch)
