"""
Two of every four weights
=========================

2:4 masks that both tasks agree on, and on a GPU the sparse matrix multiplication that they allow.

    python examples/semi_structured.py

On CUDA (compute capability 8.0 and up) every masked Linear is converted with ``torch.sparse.to_sparse_semi_structured``
in half precision and gives the same output as the masked dense layer. Elsewhere the conversion is left out.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from disparse_plugin import DiSparseSemiStructured, score_tasks


class TwoHeads(nn.Module):
    """Three linear layers wide enough for sparse kernels, and two heads."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(128, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.a, self.b = nn.Linear(width, 64), nn.Linear(width, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs of both tasks."""
        features = self.trunk(x)
        return self.a(features), self.b(features)


def losses(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """One loss per task."""
    x, a, b = batch
    out_a, out_b = model(x)
    return {"a": (out_a - a).square().mean(), "b": (out_b - b).abs().mean()}


def reason_not_to_convert() -> str | None:
    """Say why the sparse kernels cannot be used here; None if they can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"compute capability {torch.cuda.get_device_capability()} is below (8, 0)"
    return None


@torch.no_grad()
def compare(model: nn.Module, x: Tensor, dtype: torch.dtype) -> float:
    """Convert all 2:4 layers, and return the largest difference of the outputs, relative to their size."""
    dense = copy.deepcopy(model).to(dtype)
    converted = copy.deepcopy(dense)
    for module in converted.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(module.weight), requires_grad=False)
    pairs = zip(dense(x.to(dtype)), converted(x.to(dtype)), strict=True)
    return max(float((first - second).abs().max() / first.abs().max()) for first, second in pairs)


def main() -> None:
    """Score, mask, check the pattern, convert."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = TwoHeads().to(device)
    data = [tuple(torch.randn(128, n, device=device) for n in (128, 64, 64)) for _ in range(4)]

    scores = score_tasks(model, losses, data, criterion="taylor")
    importance = scores.importance()
    for module, name in scores.parameters:
        DiSparseSemiStructured.apply(module, name, importance_scores=importance[module, name])
        prune.remove(module, name)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            in_blocks = (module.weight.unflatten(1, (-1, 4)) != 0).sum(-1)
            print(
                f"{name:10}{tuple(module.weight.shape)!s:14} non-zero in each block of 4: {in_blocks.unique().tolist()}"
            )
    reason = reason_not_to_convert()
    if reason is not None:
        print(f"conversion to a semi-structured sparse tensor left out: {reason}")
        return
    for dtype in (torch.float16, torch.bfloat16):
        print(f"{dtype}: sparse and dense outputs differ by {compare(model, data[0][0], dtype):.1e}")


if __name__ == "__main__":
    main()
