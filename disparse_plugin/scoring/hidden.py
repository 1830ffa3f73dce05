"""What hides gradients from ``torch.autograd.grad``, and losses that run the model by another way than they should."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from torch.autograd.function import FunctionCtx


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
