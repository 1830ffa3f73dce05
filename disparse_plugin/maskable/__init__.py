"""Which of the chosen parameters ``torch.nn.utils.prune`` can mask, and what is in the way of the others.

``obstacles`` says of each parameter what is in the way, and words it for users; ``selection`` chooses what is left. A
file here looks at parameters and their modules, and runs nothing.
"""

from .obstacles import Obstacle, read_by_parent, refusal
from .selection import (
    Selection,
    check_parameters,
    check_takes_masks,
    check_tensor,
    checked_pairs,
    select,
    warn_of_kept_aside,
    warn_of_skipped,
)

__all__ = [
    "Obstacle",
    "Selection",
    "check_parameters",
    "check_takes_masks",
    "check_tensor",
    "checked_pairs",
    "read_by_parent",
    "refusal",
    "select",
    "warn_of_kept_aside",
    "warn_of_skipped",
]
