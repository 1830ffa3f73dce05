"""From losses to one score per weight and task: losses, gradients, saliency, sums, and what can be asked of them.

A file here does one step of that line. How one task scores one weight is in :mod:`disparse_plugin.criteria`.
"""
