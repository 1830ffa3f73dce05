"""Overlap measures by sets and plain loops, straight from their definitions."""

import itertools
from fractions import Fraction

import numpy as np


def kept_sets(masks, parameters):
    """``{task: {parameter: set of kept places}}`` of masks as ``own_masks`` returns them."""
    return {
        task: {
            index: set(np.flatnonzero(table[key].flatten().cpu().numpy()).tolist())
            for index, key in enumerate(parameters)
            if key in table
        }
        for task, table in masks.items()
    }


def iou(sets):
    union = set().union(*sets)
    return len(set.intersection(*sets)) / len(union) if union else None


def kept_by(sets, size):
    times = [sum(place in kept for kept in sets) for place in range(size)]
    return tuple(times.count(k) for k in range(len(sets) + 1))


def kappa(sets, size):
    """Conger's kappa from every single decision; Cohen's for two."""
    observed, chance = [], []
    for a, b in itertools.combinations(sets, 2):
        observed.append(Fraction(sum((place in a) == (place in b) for place in range(size)), size))
        p, q = Fraction(len(a), size), Fraction(len(b), size)
        chance.append(p * q + (1 - p) * (1 - q))
    observed, chance = sum(observed) / len(observed), sum(chance) / len(chance)
    return None if chance == 1 else float((observed - chance) / (1 - chance))


def average_ranks(values):
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2 for value in values
    ]


def spearman(a, b):
    ranks = np.array([average_ranks(a), average_ranks(b)])
    return None if (np.ptp(ranks, axis=1) == 0).any() else float(np.corrcoef(ranks)[0, 1])
