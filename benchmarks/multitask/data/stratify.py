"""Divide samples with several labels each so that every split has its share of every label."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def stratify(labels: npt.NDArray[np.bool_], shares: Sequence[float], seed: int) -> list[npt.NDArray[np.int64]]:
    """Iterative stratification (Sechidis, Tsoumakas and Vlahavas, ECML PKDD 2011).

    Labels are dealt out from the rarest on: a sample goes to the split that still lacks most of this label, of equals
    to the one that lacks most samples. Samples without any label go where samples are lacking.

    Args:
        labels: ``(samples, labels)``.
        shares: Of the splits, with sum 1.
        seed: Of the order in which samples are dealt.

    Returns:
        The indices of every split, sorted.

    Example:
        >>> labels = np.zeros((12, 1), dtype=bool)
        >>> labels[:4] = True
        >>> [labels[part].sum() for part in stratify(labels, (0.5, 0.25, 0.25), seed=0)]
        [np.int64(2), np.int64(1), np.int64(1)]
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    split_of = np.full(len(labels), -1)
    lacking = np.asarray(shares) * len(labels)
    lacking_labels = np.outer(shares, labels.sum(0)).astype(float)
    while (left := order[split_of[order] < 0]).size:
        remaining = labels[left].sum(0)
        rarest = int(np.where(remaining > 0, remaining, len(labels) + 1).argmin())
        some = remaining.any()
        for sample in left[labels[left, rarest]] if some else left:
            wish = lacking_labels[:, rarest] if some else lacking
            split = int(np.lexsort((lacking, wish))[-1])
            split_of[sample] = split
            lacking[split] -= 1
            lacking_labels[split] -= labels[sample]
    return [np.flatnonzero(split_of == split) for split in range(len(shares))]
