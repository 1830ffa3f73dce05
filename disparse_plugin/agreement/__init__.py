"""From the scores of the tasks to one cut: ranks, percentiles, the exact cut, amounts and budgets.

A file here turns tensors into tensors; it knows no model, no loss and no file. The rule by which tasks agree is in
:mod:`disparse_plugin.arbiters`.
"""
