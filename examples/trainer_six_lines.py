"""
Six lines in a multi-task training script
=========================================

A training script in the style of LibMTL or TorchJD, with the lines that prune it.

Such scripts keep an encoder and a dict of decoders, and give a list of losses to something that balances their
gradients. Pruning needs the same losses under names. The lines marked ``# <-`` are what is new; the rest is the script
as it was. ``--balance`` trains with TorchJD's PCGrad (``pip install torchjd``) instead of the sum.

Two tasks on scikit-learn's 8x8 digits: which digit it is, and by how many quarters of a circle it was turned. No
download; less than a minute on two CPU cores:

    python examples/trainer_six_lines.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

from disparse_plugin import sparsity_report  # <-
from disparse_plugin.sparse_training import GradualPruning  # <-

Batch = tuple[Tensor, dict[str, Tensor]]
TASKS = {"digit": 10, "turn": 4}


class Net(nn.Module):
    """An encoder, and a decoder for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Flatten(),
            nn.Linear(1024, 128), nn.ReLU(),
        )  # fmt: skip
        self.decoders = nn.ModuleDict({task: nn.Linear(128, classes) for task, classes in TASKS.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the outputs of every task."""
        features = self.encoder(images)
        return {task: decoder(features) for task, decoder in self.decoders.items()}


def losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """One loss per task."""
    images, labels = batch
    return {task: F.cross_entropy(output, labels[task]) for task, output in model(images).items()}


def summed(_: nn.Module) -> Callable[[list[Tensor]], None]:
    """Fill the gradients with those of the sum."""
    return lambda found: torch.stack(found).sum().backward()


def balanced(model: nn.Module) -> Callable[[list[Tensor]], None]:
    """Fill the gradients with TorchJD's aggregation, which takes out what conflicts."""
    try:
        from torchjd import autojac
        from torchjd.aggregation import PCGrad
    except ImportError as error:
        raise ImportError(f"{error}; --balance needs: pip install torchjd") from error

    aggregator = PCGrad()

    def fill(found: list[Tensor]) -> None:
        autojac.backward(found)
        autojac.jac_to_grad(model.parameters(), aggregator)

    return fill


def digits(seed: int, device: torch.device) -> tuple[Batch, Batch]:
    """Return training and test data: pictures, and the answers of both tasks."""
    data, generator = load_digits(), torch.Generator().manual_seed(seed)
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    turns = torch.randint(4, (len(images),), generator=generator)
    images = torch.stack([image.rot90(int(turn), (1, 2)) for image, turn in zip(images, turns, strict=True)])
    labels, order = torch.tensor(data.target), torch.randperm(len(images), generator=generator)
    train, test = (
        (images[part].to(device), {"digit": labels[part].to(device), "turn": turns[part].to(device)})
        for part in (order[:1400], order[1400:])
    )
    return train, test


@torch.no_grad()
def test_on(model: nn.Module, data: Batch) -> dict[str, float]:
    """Return the share of right answers per task."""
    outputs = model.eval()(data[0])
    model.train()
    return {task: float((outputs[task].argmax(1) == data[1][task]).float().mean()) for task in TASKS}


def draw(path: Path, history: list[tuple[int, float, dict[str, float]]]) -> None:
    """Show accuracy and sparsity over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    steps, sparsity, right = zip(*history, strict=True)
    for task, color in zip(TASKS, ("#0072B2", "#E69F00"), strict=True):
        axes.plot(steps, [100 * each[task] for each in right], color=color, label=f"{task}, right answers")
    axes.step(steps, [100 * each for each in sparsity], color="#999999", where="post", label="weights pruned")
    axes.set(xlabel="step", ylabel="%", ylim=(0, 101))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    """Train, and prune on the way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--amount", type=float, default=0.95, help="share of the weights to prune (default: 0.95)")
    parser.add_argument("--balance", action="store_true", help="balance the gradients with TorchJD's PCGrad")
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu (default), cuda, ...")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and batches (default: 0)")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for trainer_six_lines.png (default: this one)")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to see that it runs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    start, steps = time.perf_counter(), 8 if options.quick else 800
    torch.manual_seed(options.seed)
    data, testing = digits(options.seed, options.device)
    model = Net().to(options.device)
    backward = (balanced if options.balance else summed)(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    plan = {"update_every": max(steps // 16, 1), "start_at": steps // 4, "stop_at": 3 * steps // 4}  # <-
    pruning = GradualPruning(model, optimizer, losses, amount=options.amount, **plan)  # <-
    history = []
    for step in trange(steps, desc="training", leave=False):
        chosen = torch.randint(len(data[0]), (64,))
        batch = data[0][chosen], {task: labels[chosen] for task, labels in data[1].items()}
        optimizer.zero_grad()
        backward([*losses(model, batch).values()])
        optimizer.step()
        schedule.step()
        pruning.step(batch)  # <-
        if step % max(steps // 40, 1) == 0 or step == steps - 1:
            history.append((step, sparsity_report(model).sparsity, test_on(model, testing)))
    print(sparsity_report(model))  # <-
    print(*(f"{task}: {right:.1%} right" for task, right in history[-1][2].items()), sep=", ")
    draw(options.out / "trainer_six_lines.png", history)
    print(f"\n{time.perf_counter() - start:.0f} s in all; picture: {options.out / 'trainer_six_lines.png'}")
    if options.quick:
        print("A quick run only shows that the script works: its figures mean nothing.")


if __name__ == "__main__":
    main()
