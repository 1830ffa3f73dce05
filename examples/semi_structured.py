"""
Two of every four weights
=========================

2:4 masks that both tasks agree on, and on a GPU the sparse matrix multiplication that they allow.

    python examples/semi_structured.py

On CUDA (compute capability 8.0 and up) every masked Linear is converted with ``torch.sparse.to_sparse_semi_structured``
in half precision and gives the same output as the masked dense layer. Elsewhere the conversion is left out.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

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


def draw(path: Path, model: nn.Module) -> None:
    """Show a corner of each layer: what is left is dark."""
    from matplotlib.figure import Figure

    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    figure = Figure(figsize=(9, 2.7), dpi=120, layout="constrained")
    for axes, (name, module) in zip(figure.subplots(1, len(layers)), layers.items(), strict=True):
        corner = module.weight.detach()[:24, :24].abs().cpu()
        axes.pcolormesh(corner, cmap="Blues", edgecolors="#e0e0e0", linewidth=0.4)
        axes.invert_yaxis()
        axes.set(title=f"{name}, first 24 x 24", xticks=range(0, 25, 4), yticks=[], aspect="equal")
        axes.title.set_fontsize(9)
    figure.savefig(path)


def main() -> None:
    """Score, mask, check the pattern, convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=None, help="cpu, cuda, ... (default: cuda, if there is one)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for semi_structured.png (default: this one)")
    parser.add_argument("--quick", action="store_true", help="one batch only; it takes a second anyway")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = TwoHeads().to(device)
    data = [tuple(torch.randn(128, n, device=device) for n in (128, 64, 64)) for _ in range(1 if options.quick else 4)]

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
    draw(options.out / "semi_structured.png", model)
    reason = reason_not_to_convert()
    if reason is not None:
        print(f"conversion to a semi-structured sparse tensor left out: {reason}")
        return
    for dtype in (torch.float16, torch.bfloat16):
        print(f"{dtype}: sparse and dense outputs differ by {compare(model, data[0][0], dtype):.1e}")


if __name__ == "__main__":
    main()
