"""
Channels of an SMP model
========================

An SMP model with a mask and a label head, made smaller, saved without pickle, and rebuilt.

    python examples/structured_smp.py
    python examples/structured_smp.py --arch FPN --encoder mobilenet_v2 --amount 0.5

Synthetic pictures of a striped disc under noise: where is it (mask), and in which of four directions do the stripes run
(label). The lines marked ``# <-`` are what is new in the training code.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disparse_plugin.structured import remove_channels, replay_removal  # <-

SIZE = 64
Batch = tuple[Tensor, Tensor, Tensor]


def pictures(count: int, seed: int) -> Batch:
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
    return x + 0.3 * torch.randn(x.shape, generator=generator), masks[:, None], labels


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


def train(model: nn.Module, data: Batch, steps: int) -> None:
    """Train on the sum of the losses."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    for step in range(steps):
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


def main() -> None:
    """Train, remove, fine-tune, save, rebuild."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="Unet")
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--amount", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args()
    torch.manual_seed(0)
    data, test = pictures(1024, seed=1), pictures(128, seed=2)
    model = build(options.arch, options.encoder)
    train(model, data, options.steps)
    rows = [("dense", *metrics(model, test))]

    scored = [tuple(part[i : i + 16] for part in data) for i in range(0, 64, 16)]  # <-
    report = remove_channels(model, losses, scored, data[0][:2], options.amount, of="macs")  # <-
    rows.append(("channels removed", *metrics(model, test)))
    train(model, data, options.steps)
    rows.append(("fine-tuned", *metrics(model, test)))

    with tempfile.TemporaryDirectory() as folder:  # no pickle: the recipe, and the weights
        report.save(Path(folder) / "removal.safetensors")  # <-
        torch.save(model.state_dict(), Path(folder) / "weights.pt")
        again = build(options.arch, options.encoder)
        replay_removal(again, Path(folder) / "removal.safetensors")  # <-
        again.load_state_dict(torch.load(Path(folder) / "weights.pt", weights_only=True))
    rows.append(("rebuilt from file", *metrics(again, test)))

    print(report)
    print()
    print(f"{'':24}{'mask IoU':>10}{'label acc.':>12}")
    for name, iou, correct in rows:
        print(f"{name:24}{iou:10.3f}{correct:12.3f}")


if __name__ == "__main__":
    main()
