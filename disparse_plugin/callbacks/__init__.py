"""What the callbacks of all trainers share: modes, the pruning inside a fit, and fits that follow each other.

No trainer is imported here.
"""
