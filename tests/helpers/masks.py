"""Comparing the masks of two models."""

import torch


def equal_masks(first, second):
    """Tell whether two mappings from name to mask are the same."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
