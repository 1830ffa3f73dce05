"""What of the saved arithmetic becomes saved time: numbers of channels as they come, in multiples, and by the clock.

    python benchmarks/structured_latency.py --batch 8

A ResNet-18 of torchvision with two heads, random weights, one thread. At equal MACs ``round_to`` takes the numbers of
channels as they come, multiples of 8, or what ``"auto"`` finds for the device. ``of="latency"`` asks for a share of the
time instead; *asked* and *time left* should then agree within a tenth. Times are the least of many forwards, taken in
turns, so that what else runs on the machine falls on all alike.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from disparse_plugin.structured import RemovalReport, remove_channels


class TwoHeads(nn.Module):
    """A ResNet-18 with two linear heads."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import resnet18

        self.body = resnet18(num_classes=32)
        self.a, self.b = nn.Linear(32, 4), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs of both heads."""
        features = self.body(x)
        return self.a(features), self.b(features)


def losses(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """One loss per head."""
    return {name: out.square().mean() + out.mean() for name, out in zip("ab", model(x), strict=True)}


def build() -> nn.Module:
    """Build the model, the same every time."""
    torch.manual_seed(0)
    return TwoHeads().eval()


SETTINGS: dict[str, dict[str, Any]] = {
    "50% of MACs": {"amount": 0.5, "of": "macs"},
    "50% of MACs, round_to=8": {"amount": 0.5, "of": "macs", "round_to": 8},
    "50% of MACs, round_to='auto'": {"amount": 0.5, "of": "macs", "round_to": "auto"},
    "30% of latency, round_to='auto'": {"amount": 0.3, "of": "latency", "round_to": "auto"},
}


@torch.no_grad()
def times(models: dict[str, nn.Module], x: Tensor, rounds: int) -> dict[str, float]:
    """Return the least seconds of a forward of each model, taken in turns."""
    least = dict.fromkeys(models, float("inf"))
    for _ in range(rounds):
        for name, model in models.items():
            start = time.perf_counter()
            model(x)
            least[name] = min(least[name], time.perf_counter() - start)
    return least


def table(reports: dict[str, RemovalReport], seconds: dict[str, float]) -> str:
    """Tabulate what is left of MACs and of the time."""
    lines = [f"{'':34}{'MACs left':>10}{'ms':>8}{'time left':>11}"]
    for name, value in seconds.items():
        left = 1 - reports[name].macs.removed if name in reports else 1.0
        lines.append(f"{name:34}{left:10.1%}{1000 * value:8.2f}{value / seconds['dense']:11.1%}")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    x = torch.randn(options.batch, 3, options.size, options.size, device=options.device)
    models, reports = {"dense": build().to(options.device)}, {}
    for name, setting in SETTINGS.items():
        models[name] = build().to(options.device)
        reports[name] = remove_channels(models[name], losses, [x], x, **setting)
    print(table(reports, times({name: model.eval() for name, model in models.items()}, x, options.rounds)))


if __name__ == "__main__":
    main()
