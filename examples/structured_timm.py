"""
Channels of a timm trunk
========================

A timm trunk with two heads, trained, made smaller, and fine-tuned: milliseconds against the worst task.

Two tasks on scikit-learn's 8x8 digits, scaled up: which digit it is, and by how many quarters of a circle the picture
was turned. Channels are removed by the scores of each task, by those of the summed loss, and by their magnitude. Only
the lines marked ``# <-`` are about that.

No download; two or three minutes on a free CPU core:

    python examples/structured_timm.py
    python examples/structured_timm.py --model mobilenetv3_small_050 --amounts 0.5
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from disparse_plugin import joint
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


def digits(seed: int, device: torch.device) -> tuple[Batch, Batch]:
    """Return training and test data: picture, digit, quarter turns."""
    data = load_digits()
    generator = torch.Generator().manual_seed(seed)
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    turns = torch.randint(4, (len(images),), generator=generator)
    turned = torch.stack([image.rot90(int(turn), (1, 2)) for image, turn in zip(images, turns, strict=True)])
    x, y = F.interpolate(turned, size=32, mode="bilinear"), torch.tensor(data.target)
    order = torch.randperm(len(x), generator=generator)
    x, y, turns = (part.to(device) for part in (x, y, turns))
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
    """Return the median time of one forward; on a CPU that of one core, whatever else the machine is doing."""
    clock = time.process_time if x.device.type == "cpu" else time.perf_counter
    threads, times = torch.get_num_threads(), []
    torch.set_num_threads(1)
    for _ in range(repeats + 3):
        start = clock()
        model(x)[0].tolist()  # waits for the device
        times.append(clock() - start)
    torch.set_num_threads(threads)
    return 1000 * sorted(times[3:])[repeats // 2]


WAYS: dict[str, tuple[Any, dict[str, str]]] = {
    "per task": (losses, {}),
    "summed loss": (joint(losses), {}),
    "magnitude": (joint(losses), {"criterion": "magnitude"}),
}


class Row(NamedTuple):
    """One network of the comparison."""

    name: str
    amount: float  # of the multiply-adds, removed
    untuned: tuple[float, float]  # accuracy of both tasks
    tuned: tuple[float, float]
    time: float  # milliseconds of a forward of 16 pictures

    def __str__(self) -> str:
        """Format the line."""
        shares = "".join(f"{100 * share:8.1f}" for share in (*self.untuned, *self.tuned))
        return f"{self.name:12}{100 * self.amount:7g}%{shares}{self.time:10.2f}"


HEADER = f"{'':12}{'removed':>8}{'digit':>8}{'turn':>8}{'digit':>8}{'turn':>8}{'ms':>10}"


def compare(options: argparse.Namespace, data: Batch, test: Batch) -> Iterator[Row]:
    """Train, then remove channels from a copy and fine-tune it, for every amount and way."""
    dense = TwoHeads(options.model).to(options.device)
    train(dense, data, options.epochs)
    dense.eval()
    tuned = copy.deepcopy(dense)
    train(tuned, data, options.epochs)
    x = test[0][:16]
    yield Row("dense", 0.0, accuracy(dense, test), accuracy(tuned, test), milliseconds(dense, x))
    for amount, (name, (seen, criterion)) in product(options.amounts, WAYS.items()):
        model = copy.deepcopy(dense)
        scored = list(batches(data, seed=99))[:8]  # <-
        remove_channels(model, seen, scored, data[0][:2], amount, of="macs", round_to="auto", **criterion)  # <-
        untuned = accuracy(model, test)
        train(model, data, options.epochs)  # makes a new optimizer: an old one would hold parameters that are gone
        yield Row(name, amount, untuned, accuracy(model, test), milliseconds(model, x))


def draw(path: Path, rows: list[Row]) -> None:
    """Plot the accuracy of the worst task against the time of a forward."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 3.6), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    dense = rows[0]
    axes.plot(dense.time, 100 * min(dense.tuned), "k*", markersize=11, label="dense")
    for name, style, color in zip(WAYS, ("o-", "s:", "v--"), ("#0072B2", "#56B4E9", "#D55E00"), strict=True):
        found = [row for row in rows if row.name == name]
        worst = [100 * min(row.tuned) for row in found]
        axes.plot([row.time for row in found], worst, style, color=color, label=name)
    for row in rows[1:]:
        place = (row.time, 100 * min(row.tuned))
        axes.annotate(f"-{100 * row.amount:g}%", place, (5, 5), textcoords="offset points", fontsize=7)
    lowest = min(100 * min(row.tuned) for row in rows)
    axes.set(xlim=(0, None), ylim=(min(80, lowest - 2), 100))
    axes.set(xlabel="milliseconds of one core for 16 pictures", ylabel="right answers of the worst task, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet10t", help="a trunk of timm for 32 x 32 pixels (default: resnet10t)")
    parser.add_argument(
        "--amounts",
        type=float,
        nargs="+",
        default=(0.3, 0.5, 0.7),
        help="of the multiply-adds (default: 0.3 0.5 0.7)",
    )
    parser.add_argument("--epochs", type=int, default=3, help="of training, and of fine-tuning (default: 3)")
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu (default), cuda, ...")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and batches (default: 0)")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for structured_timm.png (default: this one)")
    parser.add_argument("--quick", action="store_true", help="a few pictures and one amount, to see that it runs")
    options = parser.parse_args()
    if options.epochs < 1:
        parser.error(f"--epochs: must be at least 1, found {options.epochs}")
    if options.quick:
        options.epochs, options.amounts = 1, options.amounts[:1]
    return options


def main() -> None:
    """Compare, print a table, draw milliseconds against the worst task."""
    options, start, rows = read_options(), time.perf_counter(), []
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    data, test = digits(options.seed, options.device)
    if options.quick:
        data, test = ([part[:64] for part in parts] for parts in (data, test))
    print(f"{'':20}{'% right, untuned':>16}{'fine-tuned':>16}", HEADER, sep="\n")
    for row in compare(options, data, test):
        rows.append(row)
        print(row, flush=True)
    draw(options.out / "structured_timm.png", rows)
    print(f"\n{time.perf_counter() - start:.0f} s in all; picture: {options.out / 'structured_timm.png'}")
    if options.quick:
        print("A quick run only shows that the script works: its figures mean nothing.")


if __name__ == "__main__":
    main()
