"""What the sections of benchmarks/gpu.py measure with: seconds, memory, networks and batches on one device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from models.paper_network import TASK_SETS, PaperNetwork, random_batches

Figures: TypeAlias = dict[str, Any]


@dataclass
class Bench:
    """One run: where, how large, how long, and what was found."""

    device: torch.device
    quick: bool
    budget: float
    started: float = field(default_factory=time.monotonic)
    figures: Figures = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    @property
    def cuda(self) -> bool:
        """Whether there is something to wait for."""
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (time.monotonic() - self.started)

    def wait(self) -> None:
        """Let the device finish."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any], repeats: int = 3, warm: int = 1) -> float:
        """Time a call: the median, after a warm-up."""
        for _ in range(warm):
            run()
        found = []
        for _ in range(1 if self.quick else repeats):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            found.append(time.perf_counter() - start)
        return statistics.median(found)

    def gibibytes(self, run: Callable[[], Any]) -> float:
        """Measure how much memory a call takes at its peak, beyond what is held already; 0 without a card."""
        if not self.cuda:
            run()
            return 0.0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.wait()
        return (torch.cuda.max_memory_allocated() - before) / 2**30

    def network(self, tasks: int, *, small: bool = False) -> PaperNetwork:
        """Build the paper's network, or a narrow one."""
        torch.manual_seed(0)
        width, hidden = (4, 8) if self.quick or small else (64, 1024)
        return PaperNetwork(TASK_SETS[tasks], width=width, hidden=hidden).to(self.device)

    def batches(self, tasks: int, count: int, size: int, batch: int) -> list[Any]:
        """Make random batches, tiny ones if quick."""
        if self.quick:
            count, size, batch = 2, 33, 1
        made = random_batches(TASK_SETS[tasks], batches=count, batch=batch, size=size, device=self.device.type)
        return list(made)
