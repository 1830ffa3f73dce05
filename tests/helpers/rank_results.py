"""What a worker of torchrun does: call scenarios, and write down what each returned or raised on this rank."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist


def write_results(scenarios: Mapping[str, Callable[[int, int], Any]], folder: Path) -> None:
    """Call each with the rank and the number of ranks; all go into one file of this rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    results = {}
    for name, scenario in scenarios.items():
        try:
            results[name] = scenario(rank, ranks)
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            results[name] = f"{type(error).__name__}: {error}"
    torch.save(results, folder / f"{rank}.pt")
