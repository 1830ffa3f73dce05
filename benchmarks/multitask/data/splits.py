"""Splits that lie in memory, and how indices are divided among splits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..problem.problem import Batch, Split


class InMemory:
    """Samples as tensors in compact types, which ``batch`` widens: inputs and half floats to float32, bytes to int64.

    Inputs are returned as ``(inputs - mean) / spread``, with ``mean`` and ``spread`` per channel (the second axis).

    Args:
        inputs: ``(n, channels, ...)``, any type.
        targets: Task name to tensor, ``n`` samples along its first axis.
        mean: What is subtracted, ``(channels,)``.
        spread: What is divided by, ``(channels,)``.
    """

    def __init__(self, inputs: Tensor, targets: Mapping[str, Tensor], mean: Tensor, spread: Tensor) -> None:
        self.inputs = inputs
        self.targets = dict(targets)
        axes = (1, -1) + (1,) * (inputs.ndim - 2)
        self.mean, self.spread = mean.float().view(axes), spread.float().view(axes)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.inputs)

    def to(self, device: torch.device) -> InMemory:
        """Return the same samples on another device, where batches are then made."""
        targets = {task: target.to(device) for task, target in self.targets.items()}
        return InMemory(
            self.inputs.to(device), targets, self.mean.flatten().to(device), self.spread.flatten().to(device)
        )

    def first(self, count: int) -> InMemory:
        """Return the first samples alone."""
        targets = {task: target[:count] for task, target in self.targets.items()}
        return InMemory(self.inputs[:count], targets, self.mean.flatten(), self.spread.flatten())

    def batch(self, which: Tensor) -> Batch:
        """Return the samples of these indices."""
        inputs = (self.inputs[which].float() - self.mean) / self.spread
        return inputs, {task: _widen(target[which]) for task, target in self.targets.items()}


def channel_statistics(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of every channel (the second axis), never a deviation of zero."""
    channels = inputs.shape[1]
    total, squares = torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    for part in inputs.split(1024):  # a float64 copy of everything may not fit
        values = part.transpose(0, 1).flatten(1).double()
        total += values.sum(1)
        squares += values.square().sum(1)
    entries = inputs.numel() // channels
    mean = total / entries
    spread = (squares / entries - mean**2).clamp(min=0).sqrt()
    return mean.float(), torch.where(spread > 0, spread, 1.0).float()


def sizes(splits: Mapping[str, Split]) -> str:
    """Say how many samples every split has."""
    return ", ".join(f"{len(split):,} {name}" for name, split in splits.items())


def carve(samples: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Divide ``samples`` indices by chance: ``(the rest, share of them)``, each sorted; at least one in each.

    Example:
        >>> rest, held = carve(10, 0.2, seed=0)
        >>> len(rest), len(held), sorted(torch.cat([rest, held]).tolist()) == list(range(10))
        (8, 2, True)
    """
    if not 0 < share < 1 or samples < 2:
        raise ValueError(
            f"share: needs a number between 0 and 1 and at least 2 samples, found {share} of {samples} samples; "
            "give another share"
        )
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    held = min(max(round(samples * share), 1), samples - 1)
    return order[held:].sort().values, order[:held].sort().values


def spread_out(samples: int, wanted: int | None, argument: str) -> Tensor:
    """Return ``wanted`` evenly spaced indices of ``samples`` (all of them for None)."""
    if wanted is None:
        return torch.arange(samples)
    if not 1 <= wanted <= samples:
        raise ValueError(f"{argument}: needs 1 to {samples} samples, found {wanted}; there are no more")
    return torch.arange(wanted) * samples // wanted


def _widen(target: Tensor) -> Tensor:
    if target.dtype == torch.uint8:
        return target.long()
    return target.float() if target.is_floating_point() else target
