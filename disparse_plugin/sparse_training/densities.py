"""How many weights each layer keeps, so that the whole network keeps an exact count."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from ..agreement.amounts import check_amount, count_to_prune
from ..kinds import check_kind, whole_number

# The exponent of the DiSparse authors' code; the Erdos-Renyi-Kernel of RigL (Evci et al., ICML 2020) has 1.
ERK_POWER = 0.9


def layer_counts(
    shapes: Sequence[Sequence[int]],
    amount: float,
    distribution: str | Mapping[int, float] = "erk",
    dense: Collection[int] = (),
) -> list[int]:
    """Share out the weights that stay alive over the layers.

    ``"erk"``: layer l keeps the density ``min(1, c * (sum(shape_l) / prod(shape_l)) ** 0.9)`` (Erdos-Renyi-Kernel;
    Mocanu et al., 2018; Evci et al., ICML 2020; power as in DiSparse's code), ``"uniform"``: the density ``c`` for all,
    with c such that the total is met. Whole numbers come from the largest remainders.

    Args:
        shapes: The shape of each layer's weight.
        amount: How much of all of them is pruned: a fraction (float in [0, 1]) or a count (int).
        distribution: ``"erk"``, ``"uniform"``, or densities in (0, 1] by index; layers without one share what is left
            by ERK.
        dense: Indices of layers that keep everything. They count in the total.

    Returns:
        How many entries of each layer stay alive. The sum is exactly ``total - count_to_prune(amount, total)``. A layer
        whose density is below 1 keeps at least one entry and never all of them (a layer of one entry keeps it).

    Raises:
        TypeError: If ``amount`` is neither int nor float, or the distribution is neither a name nor a mapping.
        ValueError: If a name is unknown, a density is out of range, or no choice of whole numbers gives the total.

    Example:
        >>> layer_counts([(16, 3, 3, 3), (64, 16, 3, 3), (10, 64)], 0.9)
        [131, 538, 360]
        >>> layer_counts([(10, 10), (20, 10)], 0.9, "uniform")
        [10, 20]
    """
    check_amount(amount)
    check_kind("shapes", shapes, Sequence, "a list of shapes")
    check_kind("dense", dense, Collection, "a list of indices of layers")
    sizes = [math.prod(shape) for shape in shapes]
    target = sum(sizes) - count_to_prune(amount, sum(sizes))
    _check_layers("dense", dense, len(sizes))
    fixed = dict.fromkeys(dense, 1.0)
    weights = [(sum(shape) / size) ** ERK_POWER for shape, size in zip(shapes, sizes, strict=True)]
    if isinstance(distribution, Mapping):
        _check_layers("distribution", distribution, len(sizes))
        fixed |= {index: _check_density(index, density) for index, density in distribution.items()}
    elif distribution == "uniform":
        weights = [1.0] * len(shapes)
    elif isinstance(distribution, str) and distribution != "erk":
        raise ValueError(f"distribution: must be 'erk', 'uniform' or a mapping of densities, found {distribution!r}")
    elif not isinstance(distribution, str):
        raise TypeError(f"distribution: must be a name or a mapping, found {type(distribution).__name__}")
    densities = _scaled(sizes, weights, target, fixed)
    counts = _whole_numbers(sizes, densities, target, exact=set(fixed))
    if (kept := sum(counts)) != target:
        fits, nearer = target, kept
        while nearer != fits:  # fewer entries may fill fewer layers, which then cannot keep all; always one way
            fits = nearer
            nearer = sum(_whole_numbers(sizes, _scaled(sizes, weights, fits, fixed), fits, exact=set(fixed)))
        raise ValueError(
            f"amount: the layers must be able to keep {target} of {sum(sizes)} entries, found that they keep {kept} "
            f"(dense layers: {sum(density >= 1.0 for density in densities)}, and at least one entry in every layer); "
            f"amount={sum(sizes) - fits} / {sum(sizes)} would fit"
        )
    return counts


def count_of(density: float, size: int) -> int:
    """Return how many entries a layer of a given density keeps: neither none nor, below 1, all.

    Example:
        >>> count_of(0.98, 16), count_of(0.02, 16), count_of(1.0, 16)
        (15, 1, 16)
    """
    return size if density >= 1.0 else min(max(round(density * size), 1), max(size - 1, 1))


def _check_layers(argument: str, layers: Collection[int], count: int) -> None:
    for index in layers:
        if not whole_number(argument, index, least=0) < count:
            raise ValueError(f"{argument}: must hold indices of layers, 0 to {count - 1}, found {index}")


def _check_density(index: int, density: float) -> float:
    if not 0.0 < density <= 1.0:
        raise ValueError(
            f"distribution: every density must be in (0, 1], found {density} for layer {index}; a density is the share "
            "that stays alive"
        )
    return float(density)


def _scaled(sizes: Sequence[int], weights: Sequence[float], target: int, fixed: Mapping[int, float]) -> list[float]:
    """Find densities ``min(1, c * weight)`` that meet the target; the fixed ones are as given."""
    densities = dict(fixed)
    while True:
        free = [index for index in range(len(sizes)) if index not in densities]
        left = target - sum(densities[index] * sizes[index] for index in densities)
        if not free:
            return [densities[index] for index in range(len(sizes))]
        scale = left / sum(weights[index] * sizes[index] for index in free)
        # What a layer over 1 cannot take goes to the others, so theirs only grow and it stays over 1.
        full = [index for index in free if scale * weights[index] > 1.0 - 1e-9]
        if not full:
            return [densities.get(index, scale * weights[index]) for index in range(len(sizes))]
        densities.update(dict.fromkeys(full, 1.0))


def _whole_numbers(sizes: Sequence[int], densities: Sequence[float], target: int, exact: Collection[int]) -> list[int]:
    """Round densities to counts, by the largest remainders, without emptying or filling a layer.

    Args:
        sizes: Number of entries of each layer.
        densities: Their densities.
        target: The total.
        exact: Layers whose density the user gave: they are rounded first, and take up a difference only by one entry.

    Returns:
        The counts, with the exact total if it can be met.
    """
    wanted = [density * size for density, size in zip(densities, sizes, strict=True)]
    low, high = [], []
    for index, (size, density) in enumerate(zip(sizes, densities, strict=True)):
        near = math.floor(wanted[index] + 1e-9) if index in exact else 1
        far = math.ceil(wanted[index] - 1e-9) if index in exact else size - 1
        low.append(size if density >= 1.0 else min(max(near, 1), max(size - 1, 1)))
        high.append(size if density >= 1.0 else max(min(far, size - 1), low[-1]))
    counts = [
        count_of(densities[index], sizes[index])
        if index in exact
        else min(max(math.floor(want), low[index]), high[index])
        for index, want in enumerate(wanted)
    ]
    free = [index for index in range(len(sizes)) if index not in exact]
    for group in (free, sorted(exact)):
        _settle(counts, wanted, low, high, group, target)
    return counts


def _settle(
    counts: list[int], wanted: Sequence[float], low: Sequence[int], high: Sequence[int], group: list[int], target: int
) -> None:
    """Move counts of a group, one entry at a time and where the rounding error is largest, until the total fits."""
    while (missing := target - sum(counts)) != 0:
        step = 1 if missing > 0 else -1
        movable = [i for i in group if low[i] <= counts[i] + step <= high[i]]
        if not movable:
            return
        for index in sorted(movable, key=lambda i: (step * (counts[i] - wanted[i]), i))[: abs(missing)]:
            counts[index] += step
