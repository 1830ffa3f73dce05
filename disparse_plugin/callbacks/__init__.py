"""What the callbacks of all trainers share.

A trainer's own file (:mod:`disparse_plugin.lightning`, :mod:`disparse_plugin.hf_trainer`) fills in a :class:`Fit`, a
frozen record of one training, and hands events on to :class:`PrunedFits`. To add a trainer, write such a file; to add a
mode, write a :class:`PruningInFit` and a line in ``modes.py``. A file in here imports no trainer: it is about what a
mode does during a fit, or between fits.

* ``base``: what a mode is told of a training, and what is asked of it.
* ``one_shot``, ``scheduled``: the two kinds of modes.
* ``modes``: which options each mode has.
* ``fits``: masks over one fit and the next, checkpoints between them, folding at the end.
"""

from .base import Fit, LossesFor, PruningInFit
from .fits import PrunedFits
from .modes import Mode, Options

__all__ = ["Fit", "LossesFor", "Mode", "Options", "PrunedFits", "PruningInFit"]
