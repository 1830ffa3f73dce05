"""Shares of a layer once some of its entries have gone: what they are among those that are left.

A share ``x_i = s_i^2 / S_i``, with ``S_i`` the sum of the ``s_j^2`` at least as large, tells the scores of its layer up
to a factor, and no factor matters. From the highest entry down, ``n`` entries of one share ``x`` below a sum ``S`` make
it ``S / (1 - n * x)``; with the sums, ``s_i^2 = x_i * S_i``. So shares can be made anew without the scores. Entries
that had gone before scoring have the share 0, and count for nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..sorting import squared_shares, stable_order, taken
from .patterns import Place


def renewed(shares: Tensor, place: Place) -> Tensor:
    """Return shares of the entries alive now: as they are where nothing larger has gone.

    Args:
        shares: Of all entries that were alive when they were scored; of the parameter's shape.
        place: What of it is alive now.

    Returns:
        Same shape and type; entries that have gone hold anything.

    Example:
        >>> from disparse_plugin.criteria import lamp_scores
        >>> shares = lamp_scores(torch.tensor([1.0, 3.0, 2.0]))
        >>> alive = torch.tensor([True, False, True])
        >>> renewed(shares, Place("", shares.shape, alive))[alive]
        tensor([0.2000, 1.0000])
    """
    if place.alive is None:
        return shares
    flat, alive = shares.reshape(-1), place.alive.reshape(-1)
    limit = largest_gone(flat, alive)
    kept = taken(flat, place.positions)
    if not kept.numel() or not limit > 0 or float(kept.min()) > limit:
        return shares
    order = stable_order(flat)
    values = flat[order].double()
    growth, _ = growths(values, torch.ones_like(values, dtype=torch.bool), top=True)
    squares = torch.empty_like(values)
    squares[order] = values.mul_(growth.exp_())
    new = squared_shares(squares[place.positions].sqrt_()).to(flat.dtype)
    result = flat.clone()
    result[place.positions] = torch.where(kept > limit, kept, new)
    return result.reshape(shares.shape)


def largest_gone(shares: Tensor, alive: Tensor) -> float:
    """Return the largest share of what has gone, 1-D; 0 where nothing has that had one."""
    return float(shares.masked_fill(alive, 0).max()) if shares.numel() else 0.0


def growths(shares: Tensor, counts: Tensor, *, top: bool) -> tuple[Tensor, float]:
    """Return by how much the sum of the squares grows from the highest share down to each, as logarithms.

    Args:
        shares: 1-D, float64, ascending, equal ones together.
        counts: bool: which of them count.
        top: Whether the highest of all is among them, from which the sum begins.

    Returns:
        float64, same shape, and by how much it grows over all of them.

    Example:
        >>> shares = torch.tensor([1 / 14, 4 / 13, 1.0], dtype=torch.float64)  # of 1, 2 and 3
        >>> growths(shares, torch.ones(3, dtype=torch.bool), top=True)[0].exp() * 9
        tensor([14., 13.,  9.], dtype=torch.float64)
    """
    if not shares.numel():
        return shares, 0.0
    values, group = shares.unique_consecutive(return_inverse=True)
    number = torch.zeros_like(values).index_add_(0, group, counts.double())
    # The squares of n equal entries are at most n parts of n + 1 of a sum that holds a larger one too.
    part = torch.minimum(number * values, number / (number + 1))
    growth = -torch.log1p(-part)
    if top:
        growth[-1] = 0.0
    sums = growth.flip(0).cumsum(0).flip(0)
    return sums[group], float(sums[0])
