"""What of the saved arithmetic becomes saved time: numbers of channels as they come, in multiples, and by the clock.

    python benchmarks/structured_latency.py --batch 8
    python benchmarks/structured_latency.py --batch 1 --compile --profile

A ResNet-18 of torchvision with two heads, random weights, one thread. At equal MACs ``round_to`` takes the numbers of
channels as they come, multiples of 8, or what ``"auto"`` finds for the device. ``of="latency"`` asks for a share of the
time instead; *asked* and *time left* should then agree within a tenth. Every way of running (as it is, with channels
last, compiled) compares with the dense network run in the same way. Models take turns, and the median over the rounds
of their share of the dense one's time is what counts, so that what else runs on the machine falls on all alike.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from disparse_plugin.structured import RemovalReport, remove_channels
from interleaved import shares, variants


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


def table(models: dict[str, nn.Module], reports: dict[str, RemovalReport], x: Tensor, options: Any) -> str:
    """Tabulate what is left of MACs, and of the time in each way of running."""
    ways: dict[str, dict[str, Any]] = {}
    inputs: dict[str, Tensor] = {}
    for name, model in models.items():
        for way, (run, own) in variants(model.eval(), x, compiled=options.compile).items():
            ways.setdefault(way, {})[name] = run
            inputs[way] = own
    found = {way: shares(runs, inputs[way], options.rounds) for way, runs in ways.items()}
    lines = [f"{'':34}{'MACs left':>10}" + "".join(f"{way + ', ms':>20}{'left':>8}" for way in found)]
    for name in models:
        left = 1 - reports[name].macs.removed if name in reports else 1.0
        cells = "".join(f"{1000 * own[name][0]:20.2f}{own[name][1]:8.1%}" for own in found.values())
        lines.append(f"{name:34}{left:10.1%}{cells}")
    return "\n".join(lines)


@torch.no_grad()
def operations(models: dict[str, nn.Module], x: Tensor, rounds: int) -> str:
    """Tabulate microseconds of a forward by operation, as torch's profiler sees them."""
    found: dict[str, dict[str, float]] = {}
    for name, model in models.items():
        model(x)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(rounds):
                model(x)
        for entry in profiler.key_averages():
            found.setdefault(entry.key, {})[name] = entry.self_cpu_time_total / rounds
    top = sorted(found, key=lambda key: -max(found[key].values()))[:8]
    lines = [f"{'microseconds of its own':34}" + "".join(f"{name[:30]:>32}" for name in models)]
    lines += [f"{key[:33]:34}" + "".join(f"{found[key].get(name, 0.0):32.0f}" for name in models) for key in top]
    return "\n".join(lines)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="run torch.compile too")
    parser.add_argument("--profile", action="store_true", help="say which operations take the time")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    x = torch.randn(options.batch, 3, options.size, options.size, device=options.device)
    models, reports = {"dense": build().to(options.device)}, {}
    for name, setting in SETTINGS.items():
        models[name] = build().to(options.device)
        reports[name] = remove_channels(models[name], losses, [x], x, **setting)
    print(table(models, reports, x, options))
    if options.profile:
        print(operations({name: model.eval() for name, model in models.items()}, x, 30))


if __name__ == "__main__":
    main()
