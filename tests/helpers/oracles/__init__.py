"""Slow references, straight from the definitions and without torch."""
