"""
Nine ways to prune two digits in one picture
============================================

Prune a network with two tasks to 90, 95 and 98 %, by DiSparse and by the usual methods, and compare.

The data are scikit-learn's handwritten digits, two to a picture as in MultiMNIST: one at the top left, one at the
bottom right, overlapping. To read the first is one task, to read the second the other. The network is a narrow ResNet
from timm with two heads.

All methods get the same batch size, learning rate schedule and number of training steps. Those that prune the trained
network start from one dense network and fine-tune their copy of it. Those that prune at initialisation start from the
weights that the dense network started from, and train what is left for as many steps as both stages together. The
dense network of the table is fine-tuned as well.

No download; less than three minutes on two CPU cores:

    python examples/quickstart.py
"""

from __future__ import annotations

import argparse
import copy
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from disparse_plugin import DiSparsePretrained, DiSparseStatic, layer_adaptive, prunable_parameters, score_tasks

try:
    import timm
    from sklearn.datasets import load_digits
except ImportError as error:
    raise ImportError(f"{error}; this example needs: pip install 'disparse-plugin[examples]'") from error

Batch: TypeAlias = tuple[Tensor, dict[str, Tensor]]  # images, and the labels of each task

TASKS = ("top-left", "bottom-right")
AMOUNTS = (0.90, 0.95, 0.98)
SHIFT = 3  # the second digit lies 3 pixels down and right of the first: of their 8 x 8 pixels, 5 x 5 overlap
BATCH_SIZE = 32
LEARNING_RATE = 0.1


class Budget(NamedTuple):
    """How much of everything, for every method alike."""

    train: int = 250  # training steps of the dense network
    tune: int = 75  # training steps of a pruned copy
    scored: int = 20  # batches that the weights are scored on
    train_pictures: int = 8000
    test_pictures: int = 2000


QUICK = Budget(train=3, tune=2, scored=1, train_pictures=64, test_pictures=64)


class Pictures(NamedTuple):
    """Pictures of two digits each."""

    images: Tensor  # (N, 1, 33, 33), values in [0, 1]
    labels: Tensor  # (N, 2): what the digits are
    digits: Tensor  # (N, 2): which entries of load_digits() they are

    def batch(self, which: Tensor | slice) -> Batch:
        """Take some of the pictures."""
        return self.images[which], dict(zip(TASKS, self.labels[which].unbind(1), strict=True))


def load_pictures(budget: Budget, seed: int, device: torch.device) -> tuple[Pictures, Pictures]:
    """Compose pictures to train on from three quarters of the digits, and pictures to test on from the others."""
    generator = torch.Generator().manual_seed(seed)
    digits = torch.randperm(len(load_digits().target), generator=generator)
    test, train = digits.tensor_split([len(digits) // 4])
    training = compose(train, budget.train_pictures, generator, device)
    return training, compose(test, budget.test_pictures, generator, device)


def compose(digits: Tensor, count: int, generator: torch.Generator, device: torch.device) -> Pictures:
    """Put random pairs of the given digits into one picture each; where they overlap the brighter pixel wins."""
    bundled = load_digits()
    pairs = digits[torch.randint(len(digits), (count, 2), generator=generator)]
    first, second = torch.tensor(bundled.images[pairs] / 16, dtype=torch.float32).unbind(1)
    drawn = torch.maximum(F.pad(first, (0, SHIFT, 0, SHIFT)), F.pad(second, (SHIFT, 0, SHIFT, 0)))
    images = F.interpolate(drawn.unsqueeze(1), scale_factor=3, mode="bilinear")
    return Pictures(images.to(device), torch.tensor(bundled.target[pairs], device=device), pairs)


class TwoHeads(nn.Module):
    """A trunk from timm, a quarter as wide as usual, and one small head per task."""

    def __init__(self) -> None:
        super().__init__()
        # With timm's zero_init_last the residual branches would start multiplied by zero, and all of their weights
        # would score zero at initialisation.
        narrow = {"channels": (16, 32, 64, 128), "stem_width": 8, "zero_init_last": False}
        self.trunk = timm.create_model("resnet10t", pretrained=False, num_classes=0, in_chans=1, **narrow)
        self.heads = nn.ModuleDict(
            {task: nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)) for task in TASKS}
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the logits of each task."""
        features = self.trunk(images)
        return {task: head(features) for task, head in self.heads.items()}


def task_losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Run the model once and return one loss per task: all that DiSparse has to know about a model."""
    images, labels = batch
    return {task: F.cross_entropy(logits, labels[task]) for task, logits in model(images).items()}


def summed_loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return the sum of the losses as the only one: what a method for a single task sees."""
    return {"joint": torch.stack([*task_losses(model, batch).values()]).sum()}


def train(model: nn.Module, pictures: Pictures, steps: int, seed: int) -> None:
    """Train or fine-tune: one cycle of the learning rate over the given number of steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=steps)
    order = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        batch = pictures.batch(torch.randint(len(pictures.images), (BATCH_SIZE,), generator=order))
        optimizer.zero_grad()
        summed_loss(model, batch)["joint"].backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracies(model: nn.Module, pictures: Pictures) -> list[float]:
    """Return the share of right answers for each task."""
    images, labels = pictures.batch(slice(None))
    logits = model.eval()(images)
    return [(logits[task].argmax(1) == labels[task]).double().mean().item() for task in TASKS]


def disparse(model: nn.Module, data: list[Batch], amount: float, *, losses: Any, criterion: Any, method: Any) -> None:
    """Prune what all tasks find unimportant. With the summed loss as the only task: SNIP, Taylor pruning, LAMP."""
    scores = score_tasks(model, losses, data, criterion=criterion)
    importance = scores.importance()
    prune.global_unstructured(scores.parameters, method, importance_scores=importance, amount=amount)


def plain(model: nn.Module, _: list[Batch], amount: float, *, method: Any) -> None:
    """Prune by a method that comes with torch."""
    prune.global_unstructured(prunable_parameters(model), method, amount=amount)


class Method(NamedTuple):
    """A way of pruning, and how the plot shows it."""

    name: str
    prune: Callable[[nn.Module, list[Batch], float], None]
    color: str  # from the palette of Okabe and Ito, which the colour-blind can tell apart
    style: str
    at_init: bool = False  # prune the network at initialisation instead of the trained one


agreeing = partial(disparse, losses=task_losses, method=DiSparsePretrained)
joint = partial(disparse, losses=summed_loss, method=DiSparsePretrained)
at_init = partial(disparse, criterion="snip", method=DiSparseStatic)
adaptive = layer_adaptive("taylor")

DENSE = Method("dense", lambda *_: None, "black", "-")
METHODS = (
    Method("DiSparse, layer-adaptive Taylor", partial(agreeing, criterion=adaptive), "#0072B2", "o-"),
    Method("DiSparse, Taylor", partial(agreeing, criterion="taylor"), "#56B4E9", "s-"),
    Method("DiSparse static (at init)", partial(at_init, losses=task_losses), "#009E73", "^-", at_init=True),
    Method("joint layer-adaptive Taylor", partial(joint, criterion=adaptive), "#0072B2", "o:"),
    Method("joint Taylor", partial(joint, criterion="taylor"), "#56B4E9", "s:"),
    Method("SNIP (at init)", partial(at_init, losses=summed_loss), "#009E73", "^:", at_init=True),
    Method("LAMP", partial(joint, criterion="lamp"), "#E69F00", "D--"),
    Method("global magnitude", partial(plain, method=prune.L1Unstructured), "#D55E00", "v--"),
    Method("random", partial(plain, method=prune.RandomUnstructured), "#999999", "x--"),
)


class Row(NamedTuple):
    """What came out for one method and amount, as a line of a Markdown table."""

    method: str
    amount: float
    pruned: int  # weights in all
    sparsities: list[float]  # of the trunk and of each head
    accuracies: list[float]
    seconds: float  # of scoring, pruning and training

    def __str__(self) -> str:
        """Format the line."""
        percent = [f"{100 * share:.1f}" for share in (*self.sparsities, *self.accuracies)]
        cells = (f"{self.amount:.0%}", str(self.pruned), *percent, f"{self.seconds:.1f}")
        padded = [f"{cell:>{len(name)}}" for cell, name in zip(cells, COLUMNS, strict=True)]
        return f"| {self.method:<31} | {' | '.join(padded)} |"


COLUMNS = ("asked", "pruned", "trunk", "head 1", "head 2", *TASKS, "seconds")
HEADER = f"| {'method':<31} | {' | '.join(COLUMNS)} |"


def compare(budget: Budget, seed: int, device: torch.device) -> Iterator[Row]:
    """Train a dense network, then prune and fine-tune a copy of it for every amount and method."""
    pictures, test = load_pictures(budget, seed, device)
    data = [pictures.batch(slice(i, i + BATCH_SIZE)) for i in range(0, budget.scored * BATCH_SIZE, BATCH_SIZE)]
    torch.manual_seed(seed)
    initial = TwoHeads().to(device)
    dense = copy.deepcopy(initial)
    train(dense, pictures, budget.train, seed)
    for amount, method in [(0.0, DENSE), *product(AMOUNTS, METHODS)]:
        start = time.perf_counter()
        # Copied before pruning: torch cannot deepcopy a pruned network once it has run. While the weights are scored,
        # BatchNorm uses the statistics of the batch at initialisation, and those it has learned after training.
        model = copy.deepcopy(initial).train() if method.at_init else copy.deepcopy(dense).eval()
        method.prune(model, data, amount)
        train(model, pictures, budget.tune + (budget.train if method.at_init else 0), seed + 1)
        yield measure(method.name, amount, model, test, time.perf_counter() - start)


def measure(method: str, amount: float, model: TwoHeads, test: Pictures, seconds: float) -> Row:
    """Test a network, and count what was pruned and where."""
    counts = [count_pruned(part) for part in (model.trunk, *model.heads.values())]
    sparsities = [pruned / size for pruned, size in counts]
    return Row(method, amount, sum(pruned for pruned, _ in counts), sparsities, accuracies(model, test), seconds)


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
    return Figure(figsize=(8, 4.5), dpi=150, layout="constrained")


def plot(figure: Any, rows: list[Row]) -> None:
    """Plot the accuracy of the worst task against the sparsity, its error on a log scale."""
    axes = figure.add_subplot()
    axes.axhline(100 - 100 * min(rows[0].accuracies), color=DENSE.color, linewidth=0.8, label=DENSE.name)
    for i, method in enumerate(METHODS):
        errors = [100 - 100 * min(row.accuracies) for row in rows if row.method == method.name]
        places = [place + 0.04 * (i - len(METHODS) // 2) for place in range(len(AMOUNTS))]  # side by side
        axes.plot(places, errors, method.style, color=method.color, linewidth=1, label=method.name)
    axes.set(yscale="log", ylim=(100, 1), xlabel="weights pruned", ylabel="accuracy of the worst task")
    ticks = [98, 97, 95, 90, 80, 50, 10]
    axes.set_yticks([100 - tick for tick in ticks], [f"{tick} %" for tick in ticks])
    axes.set_xticks(range(len(AMOUNTS)), [f"{amount:.0%}" for amount in AMOUNTS])
    axes.minorticks_off()
    figure.legend(loc="outside right center", frameon=False)


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


if __name__ == "__main__":
    main()
