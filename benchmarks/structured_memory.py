"""How much memory a removal of channels needs, in sizes of the model.

    python benchmarks/structured_memory.py

A wide perceptron with two heads, small inputs, so that weights are what counts. The peak is that of the process (Linux:
``VmHWM``), less what it held before. *a training step* is forward, backward and Adam, for comparison.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from disparse_plugin import score_tasks
from disparse_plugin.structured import remove_channels


class Wide(nn.Module):
    """Hidden layers of one width, as they are or cut into heads by a number that is stored."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.enter, self.heads = nn.Linear(16, width), heads
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.a, self.b = nn.Linear(width, 3), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs of both heads."""
        x = self.enter(x)
        for layer in self.hidden:
            x = layer(x.view(len(x), self.heads, -1).relu().flatten(1)) if self.heads > 1 else layer(x.relu())
        return self.a(x), self.b(x)


def losses(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """One loss per head."""
    return {name: out.square().mean() for name, out in zip("ab", model(x), strict=True)}


def peak(action: Callable[[], object]) -> int:
    """Return by how many bytes the process grows at most while something runs."""
    status = Path("/proc/self/status")

    def held(field: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return 1024 * int(line.split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # the highest value begins anew
    before = held("VmRSS")
    action()
    return held("VmHWM") - before


def in_a_child(action: Callable[[], object]) -> int:
    """Measure in a process of its own, in which nothing was freed before."""
    fork = multiprocessing.get_context("fork")
    mine, theirs = fork.Pipe(duplex=False)
    child = fork.Process(target=lambda: theirs.send(peak(action)))
    child.start()
    found: int = mine.recv()
    child.join()
    return found


def train(model: nn.Module, x: Tensor) -> None:
    """Take a step of training."""
    optimizer = torch.optim.Adam(model.parameters())
    sum(losses(model, x).values()).backward()
    optimizer.step()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--depth", type=int, default=4)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    x, model = torch.randn(4, 16), Wide(options.width, options.depth, 1)
    cut = Wide(options.width, options.depth, 8)
    size = sum(4 * parameter.numel() for parameter in model.parameters())
    print(f"one model: {size / 1e6:.0f} MB")
    for name, action in {
        "a training step": lambda: train(copy.deepcopy(model), x),
        "scores of two tasks": lambda: score_tasks(model, losses, [x]),
        "remove_channels": lambda: remove_channels(model, losses, [x], x, 0.5),
        "remove_channels, traced anew": lambda: remove_channels(cut, losses, [x], x, 0.5),
    }.items():
        print(f"{name:30}{in_a_child(action) / size:5.1f} models", flush=True)


if __name__ == "__main__":
    main()
