"""Steps of training recorded as a CUDA graph: small operations then start without the host."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TOLERANCE = 0.02  # of the mean change: where a gradient is nearly zero, rounding decides AdamW's first step
WARM_UPS = 3  # before a recording, as torch asks for


def captured(step: Callable[[], None], state: Sequence[Tensor]) -> Callable[[], None]:
    """Return what does the same as ``step``, by replaying a recording of it where that is possible.

    Args:
        step: Changes ``state`` in place and nothing else, without looking at a value on the host.
        state: All tensors that it changes; as before when this returns.

    Returns:
        The replay of a CUDA graph; ``step`` itself on other devices, where recording fails, and where the variable
        ``NO_CUDA_GRAPHS`` is set.
    """
    if state[0].device.type != "cuda" or os.environ.get("NO_CUDA_GRAPHS"):
        return step
    before = [tensor.clone() for tensor in state]
    graph = torch.cuda.CUDAGraph()
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        print(f"no CUDA graph: {error}", flush=True)
        return step
    finally:
        torch.cuda.synchronize()
        _restore(state, before)
    if _agree(step, graph.replay, state, before):
        torch.cuda.empty_cache()  # the recording has memory of its own; that of the steps tried is not needed again
        return graph.replay
    print("no CUDA graph: a replay did something else than the step", flush=True)
    return step


def _restore(state: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    for tensor, value in zip(state, before, strict=True):
        tensor.copy_(value)


def _agree(step: Callable[[], None], replay: Callable[[], None], state: Sequence[Tensor], before: list[Tensor]) -> bool:
    """Tell whether a replay changes what the step itself changes, up to rounding; the state is as before after that."""
    after = []
    for each in (step, replay):
        each()
        after.append([tensor.clone() for tensor in state])
        _restore(state, before)
    for own, replayed, value in zip(*after, before, strict=True):
        changed = (own.double() - value.double()).abs().mean()
        if not bool((own.double() - replayed.double()).abs().mean() <= TOLERANCE * changed):
            return False
    return True
