"""Which ``normalizer`` should channel scores have? Two unlike models, equal MACs, equal fine-tuning, ratios in one run.

    python benchmarks/structured_normalizer.py               # three seeds, about a quarter of an hour on a busy machine
    python benchmarks/structured_normalizer.py --seeds 1

The data are not those of ``benchmarks/structured.py``: scikit-learn's digits, scanned handwriting, several on a canvas.

* *labels*: a narrow ResNet of timm with three heads. Three digits side by side: the first, the greatest, and whether
  the last is greater than the first.
* *dense*: a Unet of SMP with the full width of ResNet-18, up to 256 channels, and two decoders. Digits at random places
  under noise: the class of every pixel (nothing, 0 to 4, 5 to 9), and the picture without noise.

Every network is trained once per seed; each normalizer removes channels from a copy, to the same MACs, on the same
batches; then all copies are fine-tuned alike.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from disparse_plugin.structured import remove_channels
from disparse_plugin.structured.channel_scores import NORMALIZERS

AMOUNTS = (0.5, 0.8)
OPTIONS: dict[str, dict[str, Any]] = {
    **{str(name): {"normalizer": name} for name in (None, *NORMALIZERS)},
    "None, at most 90 % of a layer": {"normalizer": None, "max_pruning_ratio": 0.9},
}
Data = dict[str, Tensor]
Losses = Callable[[nn.Module, Data], dict[str, Tensor]]


class Problem(NamedTuple):
    """A model with its data, losses and metrics (in points, more is better)."""

    build: Callable[[], nn.Module]
    data: Callable[[int, int], Data]
    losses: Losses
    metrics: Callable[[nn.Module, Data], dict[str, float]]
    batch: int
    steps: int


class Labels(nn.Module):
    """A narrow ResNet of timm and three linear heads."""

    def __init__(self) -> None:
        super().__init__()
        widths = (16, 32, 64, 128)
        self.trunk = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=0, in_chans=1, channels=widths, stem_width=16)
        self.heads = nn.ModuleDict(
            {"first": nn.Linear(128, 10), "greatest": nn.Linear(128, 10), "rising": nn.Linear(128, 2)}
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the logits of every task."""
        features = self.trunk(x)
        return {task: head(features) for task, head in self.heads.items()}


class Dense(nn.Module):
    """One encoder of SMP and two decoders."""

    def __init__(self) -> None:
        super().__init__()
        options: dict[str, Any] = {"encoder_weights": None, "encoder_depth": 4, "decoder_channels": (128, 64, 32, 16)}
        first = smp.Unet("resnet18", in_channels=1, classes=3, **options)
        second = smp.Unet("resnet18", in_channels=1, classes=1, **options)
        self.encoder = first.encoder
        self.decoders = nn.ModuleDict({"classes": first.decoder, "clean": second.decoder})
        self.heads = nn.ModuleDict({"classes": first.segmentation_head, "clean": second.segmentation_head})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the map of every task."""
        features = self.encoder(x)
        return {task: self.heads[task](decoder(features)) for task, decoder in self.decoders.items()}


def digits(count: int, each: int, test: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw digits with replacement, for training and for the test from halves that share no picture."""
    raw = load_digits()
    half = torch.arange(test, len(raw.target), 2)
    chosen = half[torch.randint(len(half), (count, each), generator=generator)]
    return torch.tensor(raw.images, dtype=torch.float32)[chosen] / 16, torch.tensor(raw.target)[chosen]


def labelled(seed: int, test: int) -> Data:
    """Put three digits side by side, under noise."""
    generator = torch.Generator().manual_seed(100 * seed + test)
    images, values = digits(2000, 3, test, generator)
    row = F.interpolate(torch.cat(list(images.unbind(1)), 2)[:, None], scale_factor=2, mode="bilinear")
    noise = 0.1 * torch.randn(row.shape, generator=generator)
    return {
        "x": row + noise,
        "first": values[:, 0],
        "greatest": values.amax(1),
        "rising": (values[:, 2] > values[:, 0]).long(),
    }


def scattered(seed: int, test: int) -> Data:
    """Put four digits anywhere on a canvas, later ones over earlier ones, under noise."""
    generator = torch.Generator().manual_seed(100 * seed + test)
    images, values = digits(600, 4, test, generator)
    places = torch.randint(24, (*values.shape, 2), generator=generator).tolist()
    clean, classes = torch.zeros(len(values), 1, 32, 32), torch.zeros(len(values), 32, 32, dtype=torch.int64)
    for number, corners in enumerate(places):
        for image, value, (top, left) in zip(images[number], values[number], corners, strict=True):
            window = (slice(top, top + 8), slice(left, left + 8))
            ink = image > 0.3
            clean[number, 0][window][ink] = image[ink]
            classes[number][window][ink] = 1 + int(value >= 5)
    noise = 0.2 * torch.randn(clean.shape, generator=generator)
    return {"x": clean + noise, "classes": classes, "clean": clean}


def label_losses(model: nn.Module, batch: Data) -> dict[str, Tensor]:
    """Cross entropies."""
    return {task: F.cross_entropy(out, batch[task]) for task, out in model(batch["x"]).items()}


def dense_losses(model: nn.Module, batch: Data) -> dict[str, Tensor]:
    """Cross entropy of the pixels, and the squared error."""
    out = model(batch["x"])
    weight = torch.tensor([0.2, 1.0, 1.0])  # most pixels are empty
    classes = F.cross_entropy(out["classes"], batch["classes"], weight=weight)
    return {"classes": classes, "clean": 10 * F.mse_loss(out["clean"], batch["clean"])}


@torch.no_grad()
def accuracies(model: nn.Module, data: Data) -> dict[str, float]:
    """Percent right."""
    return {t: 100 * float((o.argmax(1) == data[t]).float().mean()) for t, o in model.eval()(data["x"]).items()}


@torch.no_grad()
def dense_metrics(model: nn.Module, data: Data) -> dict[str, float]:
    """Mean intersection over union of the classes, and explained variance of the clean picture, in percent."""
    out = model.eval()(data["x"])
    found, wanted = out["classes"].argmax(1), data["classes"]
    shares = [float(((found == c) & (wanted == c)).sum() / ((found == c) | (wanted == c)).sum()) for c in range(3)]
    explained = 1 - float((out["clean"] - data["clean"]).square().mean() / data["clean"].var())
    return {"classes": 100 * statistics.mean(shares), "clean": 100 * explained}


PROBLEMS = {
    "labels": Problem(Labels, labelled, label_losses, accuracies, batch=64, steps=240),
    "dense": Problem(Dense, scattered, dense_losses, dense_metrics, batch=12, steps=140),
}


def batches(data: Data, size: int, count: int, seed: int) -> list[Data]:
    """Draw batches."""
    generator = torch.Generator().manual_seed(seed)
    picks = [torch.randint(len(data["x"]), (size,), generator=generator) for _ in range(count)]
    return [{key: value[pick] for key, value in data.items()} for pick in picks]


def train(model: nn.Module, problem: Problem, data: Data, steps: int, seed: int) -> None:
    """Train on the sum of the losses."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    model.train()
    for batch in batches(data, problem.batch, steps, seed):
        optimizer.zero_grad()
        sum(problem.losses(model, batch).values()).backward()
        optimizer.step()
        schedule.step()
    model.eval()


Run = dict[str, float]


def run_seed(problem: Problem, seed: int) -> tuple[Run, dict[tuple[float, str], Run]]:
    """Return the metrics of the dense network, and of each amount and normalizer with the share of MACs left."""
    torch.manual_seed(seed)
    data, test = problem.data(seed, 0), problem.data(seed, 1)
    dense = problem.build()
    train(dense, problem, data, problem.steps, seed)
    scored, results = batches(data, problem.batch, 8, seed + 50), {}
    for amount in AMOUNTS:
        for name, options in OPTIONS.items():
            model = copy.deepcopy(dense)
            report = remove_channels(model, problem.losses, scored, test["x"][:2], amount, of="macs", **options)
            train(model, problem, data, problem.steps // 2, seed + 1)
            groups = [change.channels.after / change.channels.before for change in report.groups.values()]
            found = problem.metrics(model, test)
            found |= {"MACs left": 100 * (1 - report.macs.removed), "narrowest": 100 * min(groups)}
            results[amount, name] = found
    return problem.metrics(dense, test), results


def table(name: str, runs: list[tuple[Run, dict[tuple[float, str], Run]]]) -> str:
    """Tabulate the mean and deviation over the seeds."""
    tasks = list(runs[0][0])
    head = ["asked", "normalizer", "MACs left", "narrowest layer", *tasks, "worst drop"]
    lines = [f"**{name}**", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    dense = [_cell([run[0][task] for run in runs]) for task in tasks]
    lines.append(f"| 0 % | dense | 100.0 | 100.0 | {' | '.join(dense)} | |")
    for amount, normalizer in runs[0][1]:
        found = [results[amount, normalizer] for _, results in runs]
        cells = [f"{statistics.mean(run[key] for run in found):.1f}" for key in ("MACs left", "narrowest")]
        cells += [_cell([run[task] for run in found]) for task in tasks]
        drops = [max(full[t] - run[t] for t in tasks) for (full, _), run in zip(runs, found, strict=True)]
        lines.append(f"| {amount:.0%} | {normalizer} | {' | '.join(cells)} | {_cell(drops)} |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.pstdev(values):.1f}"


def main() -> None:
    """Run both problems."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=list(PROBLEMS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"Points (accuracy, IoU, explained variance, in percent) after fine-tuning; {options.seeds} seeds.\n")
    for name, problem in PROBLEMS.items():
        if options.only in (None, name):
            start = time.perf_counter()
            print(table(name, [run_seed(problem, seed) for seed in range(options.seeds)]))
            print(f"\n{time.perf_counter() - start:.0f} s\n", flush=True)


if __name__ == "__main__":
    main()
