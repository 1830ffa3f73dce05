"""
Channels of a timm trunk
========================

A timm trunk with two heads, trained, made smaller, and fine-tuned.

    python examples/structured_timm.py
    python examples/structured_timm.py --model mobilenetv3_small_050 --amount 0.5 --of macs

Two tasks on scikit-learn's 8x8 digits, scaled up: which digit it is, and whether the picture was turned. Everything
but the lines marked ``# <-`` is the training code that was there before.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from disparse_plugin.structured import remove_channels  # <-

Batch = tuple[Tensor, Tensor, Tensor]


class TwoHeads(nn.Module):
    """A trunk of timm with a head for the digit and one for the turn."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.trunk = timm.create_model(name, pretrained=False, num_classes=0, in_chans=1)
        with torch.no_grad():
            width = self.trunk.eval()(torch.zeros(1, 1, 32, 32)).shape[1]
        self.digit, self.turn = nn.Linear(width, 10), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of both tasks."""
        features = self.trunk(x)
        return self.digit(features), self.turn(features)


def digits(seed: int) -> tuple[Batch, Batch]:
    """Return training and test data: picture, digit, quarter turns."""
    data = load_digits()
    generator = torch.Generator().manual_seed(seed)
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    turns = torch.randint(4, (len(images),), generator=generator)
    turned = torch.stack([image.rot90(int(turn), (1, 2)) for image, turn in zip(images, turns, strict=True)])
    x, y = F.interpolate(turned, size=32, mode="bilinear"), torch.tensor(data.target)
    order = torch.randperm(len(x), generator=generator)
    train, test = order[:1400], order[1400:]
    return (x[train], y[train], turns[train]), (x[test], y[test], turns[test])


def batches(data: Batch, seed: int, size: int = 64) -> Iterator[Batch]:
    """Yield shuffled batches of one epoch."""
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(seed))
    for part in order.split(size):
        yield data[0][part], data[1][part], data[2][part]


def losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """One loss per task."""
    x, digit, turn = batch
    a, b = model(x)
    return {"digit": F.cross_entropy(a, digit), "turn": F.cross_entropy(b, turn)}


def train(model: nn.Module, data: Batch, epochs: int) -> None:
    """Train on the sum of the losses."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    for epoch in range(epochs):
        for batch in batches(data, epoch):
            optimizer.zero_grad()
            sum(losses(model, batch).values()).backward()
            optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Batch) -> tuple[float, float]:
    """Return the accuracy of both tasks."""
    a, b = model.eval()(data[0])
    return float((a.argmax(1) == data[1]).float().mean()), float((b.argmax(1) == data[2]).float().mean())


@torch.no_grad()
def milliseconds(model: nn.Module, x: Tensor, repeats: int = 20) -> float:
    """Return the median time of one forward."""
    times = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        model(x)
        times.append(time.perf_counter() - start)
    return 1000 * sorted(times[3:])[repeats // 2]


def main() -> None:
    """Train, remove, fine-tune, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet10t")
    parser.add_argument("--amount", type=float, default=0.6)
    parser.add_argument("--of", choices=["channels", "parameters", "macs"], default="macs")
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    data, test = digits(seed=0)
    model = TwoHeads(options.model)
    train(model, data, options.epochs)
    dense = copy.deepcopy(model)

    scored = list(batches(data, seed=99))[:8]  # <-
    report = remove_channels(model, losses, scored, data[0][:2], options.amount, of=options.of)  # <-
    after_removal = accuracy(model, test)
    train(model, data, options.epochs)  # makes a new optimizer: the old one holds parameters that are gone

    print(report)
    print()
    print(f"{'':24}{'digit':>8}{'turn':>8}{'ms, batch 16':>14}")
    for name, net, found in [
        ("dense", dense, accuracy(dense, test)),
        ("channels removed", model, after_removal),
        ("fine-tuned", model, accuracy(model, test)),
    ]:
        print(f"{name:24}{found[0]:8.3f}{found[1]:8.3f}{milliseconds(net, test[0][:16]):14.2f}")


if __name__ == "__main__":
    main()
