"""Everything that touches torch-pruning, and nothing else: a change of that package is met here."""
