"""
Channels of an SMP model
========================

An SMP model with a mask and a label head, made smaller, saved without pickle, and rebuilt.

Synthetic pictures of a striped disc under noise: where is it (mask), and in which of four directions do the stripes run
(label). The lines marked ``# <-`` are what is new in the training code.

No download; two minutes on a free CPU core:

    python examples/structured_smp.py
    python examples/structured_smp.py --arch FPN --encoder mobilenet_v2 --amount 0.5
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from disparse_plugin import load_pruned, save_pruned  # <-
from disparse_plugin.structured import remove_channels  # <-

SIZE = 64
Batch = tuple[Tensor, Tensor, Tensor]


def pictures(count: int, seed: int, device: torch.device) -> Batch:
    """Return noisy pictures, their masks, and which multiple of 45 degrees the stripes are turned by."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    centres = torch.randint(16, SIZE - 16, (count, 2, 1, 1), generator=generator)
    radii = torch.randint(8, 15, (count, 1, 1), generator=generator)
    grid = torch.stack(torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij"))
    rows, columns = (grid[None] - centres).float().unbind(1)
    masks = ((rows**2 + columns**2).sqrt() < radii).float()
    angles = labels.view(-1, 1, 1) * torch.pi / 4
    stripes = torch.sin(1.2 * (rows * angles.cos() + columns * angles.sin())).sign()
    x = (masks * (0.5 + 0.5 * stripes))[:, None].repeat(1, 3, 1, 1)
    x = x + 0.3 * torch.randn(x.shape, generator=generator)
    return x.to(device), masks[:, None].to(device), labels.to(device)


def build(arch: str, encoder: str) -> nn.Module:
    """Build the model at its full size."""
    return getattr(smp, arch)(encoder, encoder_weights=None, classes=1, aux_params={"classes": 4})


def losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """One loss per task."""
    x, mask, label = batch
    mask_logits, label_logits = model(x)
    return {
        "mask": F.binary_cross_entropy_with_logits(mask_logits, mask),
        "label": F.cross_entropy(label_logits, label),
    }


def train(model: nn.Module, data: Batch, steps: int, name: str) -> None:
    """Train on the sum of the losses."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    for step in trange(steps, desc=name, leave=False):
        part = torch.randint(len(data[0]), (16,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        sum(losses(model, (data[0][part], data[1][part], data[2][part])).values()).backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def metrics(model: nn.Module, data: Batch) -> tuple[float, float]:
    """Return the intersection over union of the masks, and the accuracy of the labels."""
    mask, label = model.eval()(data[0])
    found, wanted = mask > 0, data[1] > 0
    iou = (found & wanted).sum() / (found | wanted).sum().clamp_min(1)
    return float(iou), float((label.argmax(1) == data[2]).float().mean())


def draw(path: Path, data: Batch, models: dict[str, nn.Module], columns: int = 7) -> None:
    """Show pictures, their masks, and what the models make of them."""
    from matplotlib.figure import Figure

    rows = {"picture": data[0][:columns, 0], "wanted": data[1][:columns, 0]}
    with torch.no_grad():
        rows |= {name: model.eval()(data[0][:columns])[0][:, 0].sigmoid() for name, model in models.items()}
    figure = Figure(figsize=(1.25 * columns, 1.3 * len(rows)), dpi=120, layout="constrained")
    for line, (name, pictures) in zip(figure.subplots(len(rows), columns), rows.items(), strict=True):
        for axes, picture in zip(line, pictures, strict=True):
            axes.imshow(picture.cpu().numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=8)
    figure.savefig(path)


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="Unet", help="any SMP architecture that takes aux_params (default: Unet)")
    parser.add_argument("--encoder", default="resnet18", help="any SMP encoder (default: resnet18)")
    parser.add_argument("--amount", type=float, default=0.7, help="of the multiply-adds to remove (default: 0.7)")
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu (default), cuda, ...")
    parser.add_argument("--seed", type=int, default=0, help="of pictures, weights and batches (default: 0)")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for structured_smp.png (default: this one)")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to see that it runs")
    return parser.parse_args()


def main() -> None:
    """Train, remove, fine-tune, save, rebuild."""
    options, start = read_options(), time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    steps, count = (2, 64) if options.quick else (120, 1024)
    torch.manual_seed(options.seed)
    data, test = (pictures(n, 2 * options.seed + i, options.device) for i, n in ((1, count), (2, 128)))
    model = build(options.arch, options.encoder).to(options.device)
    train(model, data, steps, "dense")
    dense = copy.deepcopy(model)
    rows = [("dense", *metrics(model, test))]

    scored = [tuple(part[i : i + 16] for part in data) for i in range(0, 64, 16)]  # <-
    report = remove_channels(model, losses, scored, data[0][:2], options.amount, of="macs", round_to="auto")  # <-
    rows.append(("channels removed", *metrics(model, test)))
    train(model, data, steps, "fine-tuning")
    rows.append(("fine-tuned", *metrics(model, test)))

    with tempfile.TemporaryDirectory() as folder:
        save_pruned(model, Path(folder) / "small.safetensors")  # <- no pickle: the weights, and what was removed
        again = build(options.arch, options.encoder).to(options.device)
        load_pruned(again, Path(folder) / "small.safetensors")  # <-
    rows.append(("rebuilt from file", *metrics(again, test)))

    print(report)
    print(f"\n{'':24}{'mask IoU':>10}{'label, % right':>16}")
    for name, iou, correct in rows:
        print(f"{name:24}{iou:10.3f}{100 * correct:16.1f}")
    draw(options.out / "structured_smp.png", test, {"dense": dense, f"{options.amount:.0%} less": again})
    print(f"\n{time.perf_counter() - start:.0f} s in all; picture: {options.out / 'structured_smp.png'}")
    if options.quick:
        print("A quick run only shows that the script works: its figures mean nothing.")


if __name__ == "__main__":
    main()
