"""Warnings that point at the user's line, however deep they arise."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path

from torch.nn.utils import prune

_OURS = (str(Path(__file__).parents[1]), prune.__file__, contextlib.__file__)


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the first frame outside of this package and of ``torch.nn.utils.prune``.

    Args:
        message: What to say.
        category: Its category.
    """
    depth, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, category, stacklevel=depth)
