"""Per-task accuracy at equal MACs and at equal measured time.

    python benchmarks/structured.py                       # two and five tasks, three seeds
    python benchmarks/structured.py --seeds 1 --epochs 2  # a quick look

Tasks are read off scikit-learn's digits after random changes: the digit, the quarter turns, whether it is inverted, the
corner that it is in, and how noisy it is. All methods prune the same trained network to the same MACs, and are
fine-tuned equally. *Taylor* and *magnitude* are torch-pruning's own criteria in its own pruner (global, heads ignored);
Taylor sees the gradient of the summed loss. Of 45 ratios, the one that comes
closest to the MACs is taken: they are not monotone, since it leaves layers whole that it would have to empty.

For equal time each method makes a network for each of many amounts, and the one is taken whose forward on 16 pictures
comes closest to the share of the dense one's time that was asked; dense and pruned networks are timed in turns, one
thread, medians. ``structured_latency.py`` has times alone, of a larger network, also compiled and with channels last.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from sklearn.datasets import load_digits
from torch import Tensor, nn

from disparse_plugin.structured import remove_channels
from disparse_plugin.structured.adapter.observation import observe
from interleaved import shares

CLASSES = {"digit": 10, "turn": 4, "inverted": 2, "corner": 4, "noise": 3}
# Losses of very different size are the rule in multi-task learning.
WEIGHTS = {"digit": 1.0, "turn": 0.1, "inverted": 0.02, "corner": 0.1, "noise": 0.02}
Data = dict[str, Tensor]


class Net(nn.Module):
    """A small residual trunk with one hidden layer per head."""

    def __init__(self, tasks: tuple[str, ...], width: int = 24) -> None:
        super().__init__()
        self.stem = _conv(1, width)
        self.blocks = nn.ModuleList([_conv(width, width), _conv(width, width)])
        self.down = nn.Sequential(_conv(width, 2 * width, stride=2), _conv(2 * width, 4 * width, stride=2))
        heads = {t: nn.Sequential(nn.Linear(4 * width, 32), nn.ReLU(), nn.Linear(32, CLASSES[t])) for t in tasks}
        self.heads = nn.ModuleDict(heads)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the logits of every task."""
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        features = self.down(x).mean((2, 3))
        return {task: head(features) for task, head in self.heads.items()}


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


def make_data(seed: int) -> tuple[Data, Data]:
    """Change every digit at random, and remember how."""
    raw = load_digits()
    generator = torch.Generator().manual_seed(seed)
    images, count = torch.tensor(raw.images, dtype=torch.float32) / 16, len(raw.images)
    data = {task: torch.randint(n, (count,), generator=generator) for task, n in CLASSES.items()}
    data["digit"] = torch.tensor(raw.target)
    canvas = torch.zeros(count, 1, 12, 12)
    for number in range(count):
        image = images[number].rot90(int(data["turn"][number]))
        row, column = divmod(int(data["corner"][number]), 2)
        canvas[number, 0, 4 * row : 4 * row + 8, 4 * column : 4 * column + 8] = image
    canvas = torch.where(data["inverted"].view(-1, 1, 1, 1) == 1, 1 - canvas, canvas)
    noise = torch.randn(canvas.shape, generator=generator) * (0.05 + 0.15 * data["noise"].view(-1, 1, 1, 1))
    data["x"] = canvas + noise
    order = torch.randperm(count, generator=generator)
    split = int(0.75 * count)
    return ({k: v[order[:split]] for k, v in data.items()}, {k: v[order[split:]] for k, v in data.items()})


def losses(model: nn.Module, batch: Data) -> dict[str, Tensor]:
    """One weighted loss per task."""
    return {task: WEIGHTS[task] * F.cross_entropy(out, batch[task]) for task, out in model(batch["x"]).items()}


def batches(data: Data, seed: int, size: int = 64) -> list[Data]:
    """Cut shuffled data into batches."""
    order = torch.randperm(len(data["x"]), generator=torch.Generator().manual_seed(seed))
    return [{key: value[part] for key, value in data.items()} for part in order.split(size)]


def train(model: nn.Module, data: Data, epochs: int) -> None:
    """Train every task with weight one, so that a small loss is not a small task."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    model.train()
    for epoch in range(epochs):
        for batch in batches(data, epoch):
            optimizer.zero_grad()
            sum(loss / WEIGHTS[task] for task, loss in losses(model, batch).items()).backward()
            optimizer.step()
    model.eval()


@torch.no_grad()
def accuracies(model: nn.Module, data: Data) -> dict[str, float]:
    """Return the accuracy of every task."""
    return {task: float((out.argmax(1) == data[task]).float().mean()) for task, out in model.eval()(data["x"]).items()}


def macs(model: nn.Module) -> int:
    """Count the MACs of convolutions and linear layers for one picture."""
    seen = observe(copy.deepcopy(model), (torch.zeros(1, 1, 12, 12),))
    return int(sum(model.get_parameter(name).numel() * uses for name, uses in seen.uses.items()))


# From a trained network, batches and a number to a pruned copy; more of the number, more is gone.
Pruner = Callable[[nn.Module, list[Data], float], nn.Module]


def by_torch_pruning(importance: Callable[[], Any], gradients: bool) -> Pruner:
    """Make a method that prunes with torch-pruning alone, by a ratio."""

    def pruned(model: nn.Module, data: list[Data], ratio: float) -> nn.Module:
        model = copy.deepcopy(model)
        if gradients:
            for batch in data:
                sum(losses(model, batch).values()).backward()
        pruner = tp.pruner.BasePruner(
            model,
            (data[0]["x"][:1],),
            importance=importance(),
            global_pruning=True,
            pruning_ratio=ratio,
            max_pruning_ratio=1.0,
            ignored_layers=[head[-1] for head in model.heads.values()],
        )
        pruner.step()
        model.zero_grad()
        return model

    return pruned


def disparse(**options: Any) -> Pruner:
    """Make a method that removes what all tasks rank low, by a share of the MACs."""

    def pruned(model: nn.Module, data: list[Data], amount: float) -> nn.Module:
        model = copy.deepcopy(model)
        remove_channels(model, losses, data, data[0]["x"][:1], amount, of="macs", **options)
        return model

    return pruned


def at_macs(name: str, model: nn.Module, data: list[Data], left: float) -> nn.Module:
    """Prune to a share of the MACs: what torch-pruning cannot be asked for is searched."""
    if name.startswith("DiSparse"):
        return METHODS[name](model, data, 1 - left)
    candidates = [METHODS[name](model, data, ratio / 100) for ratio in range(10, 99, 2)]
    return min(candidates, key=lambda candidate: abs(macs(candidate) / macs(model) - left))


def at_time(name: str, model: nn.Module, data: list[Data], left: float) -> nn.Module:
    """Prune to a share of the time of a forward, as measured."""
    candidates = {f"{number}": METHODS[name](model, data, number / 100) for number in range(25, 86, 5)}
    x = data[0]["x"][:16]
    found = shares({"dense": model.eval(), **{number: other.eval() for number, other in candidates.items()}}, x, 60)
    return candidates[min(candidates, key=lambda number: abs(found[number][1] - left))]


METHODS = {
    "DiSparse": disparse(),
    "DiSparse, round_to=8": disparse(round_to=8),
    "tp Taylor, summed loss": by_torch_pruning(lambda: tp.importance.GroupTaylorImportance(), gradients=True),
    "tp magnitude": by_torch_pruning(lambda: tp.importance.GroupMagnitudeImportance(), gradients=False),
}


def compare(
    title: str,
    prune: Callable[[str, nn.Module, list[Data], float], nn.Module],
    tasks: tuple[str, ...],
    left: float,
    options: argparse.Namespace,
) -> None:
    """Print one table: what is left of MACs and time, the accuracies, and how much the worst task loses."""
    results: dict[str, list[dict[str, float]]] = {}
    costs: dict[str, list[tuple[float, float]]] = {}
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        data, test = make_data(seed)
        dense = Net(tasks)
        train(dense, data, options.epochs)
        models = {"dense": dense, **{name: prune(name, dense, batches(data, seed=99)[:8], left) for name in METHODS}}
        seconds = shares({name: model.eval() for name, model in models.items()}, test["x"][:16], 100)
        for name, model in models.items():
            costs.setdefault(name, []).append((macs(model) / macs(dense), seconds[name][1]))
            if name != "dense":
                train(model, data, max(1, options.epochs // 2))
            results.setdefault(name, []).append(accuracies(model, test))
    print(f"\n{len(tasks)} tasks, {title}, {options.seeds} seeds; accuracy in %, mean (deviation)")
    print(f"{'':28}{'MACs':>7}{'time':>7}" + "".join(f"{task:>14}" for task in tasks) + f"{'worst drop':>12}")
    for name, runs in results.items():
        cells = "".join(f"{statistics.mean(column):7.1%}" for column in zip(*costs[name], strict=True))
        for task in tasks:
            values = [100 * run[task] for run in runs]
            cells += f"{statistics.mean(values):7.1f} ({statistics.pstdev(values):4.1f})"
        drops = [100 * max(d[t] - r[t] for t in tasks) for d, r in zip(results["dense"], runs, strict=True)]
        print(f"{name:28}{cells}{statistics.mean(drops):12.1f}", flush=True)


def main() -> None:
    """Run both task sets, at equal MACs and at equal time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--macs", type=float, default=0.2, help="share of the MACs that stays")
    parser.add_argument("--time", type=float, default=0.5, help="share of the time that stays")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for tasks in (("digit", "turn"), tuple(CLASSES)):
        compare(f"{options.macs:.0%} of the MACs left", at_macs, tasks, options.macs, options)
        compare(f"{options.time:.0%} of the time left", at_time, tasks, options.time, options)


if __name__ == "__main__":
    main()
