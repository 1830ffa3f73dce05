"""
Seven ways to prune a network with two unequal tasks
====================================================

Prune a network with two tasks to 90, 95 and 98 %, by DiSparse and by the usual methods, and compare.

The data are scikit-learn's handwritten digits, each turned by up to 60 degrees to either side. To read the digit is
one task (cross entropy), to say by how many degrees it was turned the other (squared error). Nobody has balanced the
two losses: that of the turn is many times larger, as it happens where tasks are measured in units of their own. The
network is a small convolutional trunk with two heads.

All methods get the same trained network, and fine-tune their copy of it with the same batches and learning rates. The
dense network of the table is fine-tuned as well.

No download; two minutes on a free CPU core:

    python examples/quickstart.py
"""

from __future__ import annotations

import argparse
import copy
import re
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from disparse_plugin import disparse_pretrained, joint, prunable_parameters

try:
    from sklearn.datasets import load_digits
except ImportError as error:
    raise ImportError(f"{error}; this example needs: pip install 'disparse-plugin[examples]'") from error

Batch: TypeAlias = tuple[Tensor, dict[str, Tensor]]  # images, and the answers of each task

TASKS = ("digit", "turn")
AMOUNTS = (0.90, 0.95, 0.98)
LARGEST_TURN = 60.0  # degrees
BATCH_SIZE = 64
LEARNING_RATE = 3e-3


class Budget(NamedTuple):
    """How much of everything, for every method alike."""

    train: int = 1000  # training steps of the dense network
    tune: int = 200  # training steps of a pruned copy
    scored: int = 10  # batches that the weights are scored on
    train_pictures: int = 20_000
    test_pictures: int = 2000


QUICK = Budget(train=3, tune=2, scored=1, train_pictures=64, test_pictures=64)


class Pictures(NamedTuple):
    """Pictures of one turned digit each."""

    images: Tensor  # (N, 1, 16, 16), values in [0, 1]
    answers: dict[str, Tensor]  # (N,) each: which digit it is, and by how many degrees it was turned
    digits: Tensor  # (N,): which entries of load_digits() they are

    def batch(self, which: Tensor | slice) -> Batch:
        """Take some of the pictures."""
        return self.images[which], {task: answer[which] for task, answer in self.answers.items()}

    def first(self, count: int) -> list[Batch]:
        """Take the first batches."""
        return [self.batch(slice(i, i + BATCH_SIZE)) for i in range(0, count * BATCH_SIZE, BATCH_SIZE)]


def load_pictures(budget: Budget, seed: int, device: torch.device) -> tuple[Pictures, Pictures]:
    """Turn three quarters of the digits to train on, and the others to test on."""
    generator = torch.Generator().manual_seed(seed)
    digits = torch.randperm(len(load_digits().target), generator=generator)
    test, train = digits.tensor_split([len(digits) // 4])
    training = turned(train, budget.train_pictures, generator, device)
    return training, turned(test, budget.test_pictures, generator, device)


def turned(digits: Tensor, count: int, generator: torch.Generator, device: torch.device) -> Pictures:
    """Draw random ones of the given digits, twice as large, each turned at random, clockwise where positive."""
    bundled = load_digits()
    chosen = digits[torch.randint(len(digits), (count,), generator=generator)]
    images = torch.tensor(bundled.images[chosen] / 16, dtype=torch.float32).unsqueeze(1)
    degrees = (2 * torch.rand(count, generator=generator) - 1) * LARGEST_TURN
    sine, cosine = degrees.deg2rad().sin(), degrees.deg2rad().cos()
    zero = torch.zeros_like(sine)
    rotation = torch.stack([cosine, sine, zero, -sine, cosine, zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(rotation, [count, 1, 16, 16], align_corners=False)
    images = F.grid_sample(F.interpolate(images, scale_factor=2, mode="bilinear"), grid, align_corners=False)
    answers = {"digit": torch.tensor(bundled.target[chosen], device=device), "turn": degrees.to(device)}
    return Pictures(images.to(device), answers, chosen)


class TwoHeads(nn.Module):
    """A small convolutional trunk, and one head per task."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 256), nn.ReLU(),
        )  # fmt: skip
        self.heads = nn.ModuleDict({"digit": nn.Linear(256, 10), "turn": nn.Linear(256, 1)})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the logits of the digit, and the degrees."""
        features = self.trunk(images)
        return {"digit": self.heads["digit"](features), "turn": self.heads["turn"](features).squeeze(1)}


def task_losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Run the model once and return one loss per task: all that DiSparse has to know about a model."""
    images, answers = batch
    outputs = model(images)
    return {
        "digit": F.cross_entropy(outputs["digit"], answers["digit"]),
        "turn": F.mse_loss(outputs["turn"], answers["turn"]),
    }


def train(model: nn.Module, pictures: Pictures, steps: int, seed: int) -> None:
    """Train or fine-tune on the sum of the losses: one cycle of the learning rate over the given number of steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=steps)
    order = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        batch = pictures.batch(torch.randint(len(pictures.images), (BATCH_SIZE,), generator=order))
        optimizer.zero_grad()
        torch.stack([*task_losses(model, batch).values()]).sum().backward()
        optimizer.step()
        schedule.step()


class Quality(NamedTuple):
    """How a network does on both tasks."""

    digit: float  # right answers, in %
    turn: float  # degrees off, on average


@torch.no_grad()
def quality(model: nn.Module, pictures: Pictures) -> Quality:
    """Test a network on pictures of digits that it was not trained on."""
    outputs = model.eval()(pictures.images)
    right = outputs["digit"].argmax(1) == pictures.answers["digit"]
    off = (outputs["turn"] - pictures.answers["turn"]).abs()
    return Quality(100 * right.double().mean().item(), off.double().mean().item())


Prune: TypeAlias = Callable[[nn.Module, list[Batch], float], object]


def by_score(losses: Any, **criterion: str) -> Prune:
    """Prune what all tasks find unimportant; of the summed loss alone: Taylor pruning, LAMP."""
    return lambda model, data, amount: disparse_pretrained(model, losses, data, amount, **criterion)


def by_torch(method: type[prune.BasePruningMethod]) -> Prune:
    """Prune by a method that comes with torch."""
    return lambda model, _, amount: prune.global_unstructured(prunable_parameters(model), method, amount=amount)


class Method(NamedTuple):
    """A way of pruning, and how the plot shows it."""

    name: str
    prune: Prune
    color: str  # from the palette of Okabe and Ito, which the colour-blind can tell apart
    style: str


summed = joint(task_losses)  # the sum of the losses as the only task: what a method for a single task sees

DENSE = Method("dense", lambda *_: None, "black", "-")
METHODS = (
    Method("per task, the default", by_score(task_losses), "#0072B2", "o-"),
    Method("summed loss, the same", by_score(summed), "#0072B2", "o:"),
    Method("per task, Taylor", by_score(task_losses, criterion="taylor"), "#009E73", "s-"),
    Method("summed loss, Taylor", by_score(summed, criterion="taylor"), "#009E73", "s:"),
    Method("LAMP", by_score(summed, criterion="lamp"), "#E69F00", "D--"),
    Method("global magnitude", by_torch(prune.L1Unstructured), "#D55E00", "v--"),
    Method("random", by_torch(prune.RandomUnstructured), "#999999", "x--"),
)


class Row(NamedTuple):
    """What came out for one method and amount, as a line of a Markdown table."""

    method: str
    amount: float
    pruned: int  # weights in all
    sparsities: list[float]  # of the trunk and of each head
    quality: Quality
    seconds: float  # of scoring, pruning and training

    def __str__(self) -> str:
        """Format the line."""
        shares = [f"{100 * share:.1f}" for share in self.sparsities]
        found = (f"{self.quality.digit:.1f}", f"{self.quality.turn:.2f}")
        cells = (f"{self.amount:.0%}", *found, *shares, str(self.pruned), f"{self.seconds:.1f}")
        padded = [f"{cell:>{len(name)}}" for cell, name in zip(cells, COLUMNS, strict=True)]
        return f"| {self.method:<21} | {' | '.join(padded)} |"


# Right answers in %, degrees off; then what was pruned of the trunk and the heads in %, and how many weights in all.
COLUMNS = ("asked", "digit, %", "turn, °", "trunk", "head 1", "head 2", "pruned", "seconds")
HEADER = f"| {'method':<21} | {' | '.join(COLUMNS)} |"


def compare(budget: Budget, seed: int, device: torch.device) -> Iterator[Row]:
    """Train a dense network, then prune and fine-tune a copy of it for every amount and method."""
    pictures, test = load_pictures(budget, seed, device)
    torch.manual_seed(seed)
    dense = TwoHeads().to(device)
    train(dense, pictures, budget.train, seed)
    for amount, method in [(0.0, DENSE), *product(AMOUNTS, METHODS)]:
        start = time.perf_counter()
        model = copy.deepcopy(dense).eval()  # copied before pruning: torch cannot copy a pruned network that has run
        method.prune(model, pictures.first(budget.scored), amount)
        train(model, pictures, budget.tune, seed + 1)
        yield measure(method.name, amount, model, test, time.perf_counter() - start)


def measure(method: str, amount: float, model: TwoHeads, test: Pictures, seconds: float) -> Row:
    """Test a network, and count what was pruned and where."""
    counts = [count_pruned(part) for part in (model.trunk, *model.heads.values())]
    sparsities = [pruned / size for pruned, size in counts]
    return Row(method, amount, sum(pruned for pruned, _ in counts), sparsities, quality(model, test), seconds)


def count_pruned(part: nn.Module) -> tuple[int, int]:
    """Return how many weights the masks of torch remove, and out of how many."""
    weights = [getattr(module, name) for module, name in prunable_parameters(part)]
    masks = [getattr(module, f"{name}_mask", None) for module, name in prunable_parameters(part)]
    return sum(int((mask == 0).sum()) for mask in masks if mask is not None), sum(w.numel() for w in weights)


def new_figure() -> Any:
    """Import matplotlib, which nothing but the plot needs, before the work begins."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{error}; the plot needs: pip install 'disparse-plugin[plots]'") from error
    return Figure(figsize=(9, 4), dpi=150, layout="constrained")


def plot(figure: Any, rows: list[Row]) -> None:
    """Plot both tasks against the sparsity, better is up."""
    dense, left, right = rows[0].quality, *figure.subplots(1, 2)
    for axes, task in ((left, "digit"), (right, "turn")):
        axes.axhline(getattr(dense, task), color=DENSE.color, linewidth=0.8, label=DENSE.name)
        for i, method in enumerate(METHODS):
            found = [getattr(row.quality, task) for row in rows if row.method == method.name]
            places = [place + 0.04 * (i - len(METHODS) // 2) for place in range(len(AMOUNTS))]  # side by side
            axes.plot(places, found, method.style, color=method.color, linewidth=1, markersize=5, label=method.name)
        axes.set_xticks(range(len(AMOUNTS)), [f"{amount:.0%}" for amount in AMOUNTS])
        axes.set_xlabel("weights pruned")
        axes.spines[["top", "right"]].set_visible(False)
    left.set(title="digit: right answers, %", ylim=(0, 100))
    right.set(title="turn: degrees off (less is higher)", yscale="log")
    right.invert_yaxis()
    right.set_yticks([2, 5, 10, 20, 30], ["2", "5", "10", "20", "30"])
    right.minorticks_off()
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False)


def main() -> None:
    """Read the command line, compare, print the table and save the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu (default), cuda, ...")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and batches (default: 0)")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for quickstart.png (default: this one)")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to see that it runs")
    options = parser.parse_args()
    torch.backends.cudnn.deterministic = True
    torch.set_num_threads(1)  # the network is too small for more: threads would wait for each other
    started, figure, rows = time.perf_counter(), new_figure(), []
    options.out.mkdir(parents=True, exist_ok=True)
    print(HEADER, re.sub("[^|]", "-", HEADER), sep="\n")
    for row in compare(QUICK if options.quick else Budget(), options.seed, options.device):
        rows.append(row)
        print(row, flush=True)
    plot(figure, rows)
    figure.savefig(options.out / "quickstart.png")
    print(f"\n{time.perf_counter() - started:.0f} s in all; plot: {options.out / 'quickstart.png'}")
    if options.quick:
        print("A quick run only shows that the script works: its figures mean nothing.")


if __name__ == "__main__":
    main()
