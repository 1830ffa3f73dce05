"""From the scores of the tasks to one cut: ranks, percentiles, agreement scores, budget, pattern.

A file here turns tensors into tensors; it knows no model, no loss and no file. In the order of the data: what is ranked
(``candidates``) goes through ``ranking`` and ``percentiles`` to the arbiter (:mod:`disparse_plugin.arbiters`), then
through ``budgets`` and ``cut`` to marks, of which ``patterns`` makes masks. Three ``ways`` lead to the same marks: to
rank everything, to count (``counting``), and to look near the cut alone (``band``).
"""

from .budgets import Amount, Budget
from .candidates import Candidates
from .patterns import Pattern, Place

__all__ = ["Amount", "Budget", "Candidates", "Pattern", "Place"]
