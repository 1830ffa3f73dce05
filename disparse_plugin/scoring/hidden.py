"""What hides gradients from ``torch.autograd.grad``, and losses that run the model by another way than they should."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import distributed as dist
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.nn.modules.module import register_module_forward_pre_hook

from ..parameters import unwrap


def hiding_function() -> str | None:
    """Return the autograd function inside whose ``forward`` the caller runs, if it runs in one.

    Re-entrant activation checkpointing, reversible blocks and the like run whole modules there, without a graph, and
    run them once more in their ``backward``, whose gradients ``torch.autograd.grad`` never sees. To be called only
    where gradients are off, because it looks through all frames.

    Example:
        >>> hiding_function() is None
        True
    """
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "forward":
            for value in frame.f_locals.values():
                if isinstance(value, FunctionCtx):
                    return getattr(value, "_forward_cls", type(value)).__name__
    return None


@contextlib.contextmanager
def refusing_wrappers(root: nn.Module) -> Iterator[None]:
    """Refuse losses that run the model inside ``DistributedDataParallel``, while the block runs.

    The wrapper would hang, or raise at its next forward, because scoring never runs the backward that it prepares for.
    There can be one only where there is a process group.

    Args:
        root: The model, unwrapped.

    Yields:
        Nothing.

    Raises:
        ValueError: When such a wrapper is called.
    """

    def check(module: nn.Module, _: Any) -> None:
        if isinstance(module, nn.parallel.DistributedDataParallel) and unwrap(module) is root:
            raise ValueError(
                "losses: must run the model that they are given, found that they run a DistributedDataParallel around "
                "it; call the argument model in losses(model, batch)"
            )

    with contextlib.ExitStack() as stack:
        if dist.is_available() and dist.is_initialized():
            stack.callback(register_module_forward_pre_hook(check).remove)
        yield


def refuse_hidden(functions: Mapping[str, str | None]) -> None:
    """Refuse to score if modules ran inside an autograd function.

    Args:
        functions: For each parameter's qualified name, the function that its module ran in, if any.

    Raises:
        ValueError: If there is one.
    """
    hidden = {name: function for name, function in functions.items() if function is not None}
    if not hidden:
        return
    name, function = next(iter(hidden.items()))
    raise ValueError(
        f"model: every layer must run where autograd sees it, found {len(hidden)} parameters (first: {name}) inside "
        f"{function}, which hides their gradients; re-entrant activation checkpointing does that: pass "
        "use_reentrant=False to torch.utils.checkpoint.checkpoint (in transformers: "
        "gradient_checkpointing_enable({'use_reentrant': False})), or turn it off while scoring"
    )
