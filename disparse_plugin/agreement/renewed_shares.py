"""Shares of a layer once some of its entries have gone: what they are among those that are left.

A share ``x_i = s_i^2 / S_i``, with ``S_i`` the sum of the ``s_j^2`` at least as large, tells the scores of its layer up
to a factor, and no factor matters. From the highest entry down, ``n`` entries of one share ``x`` below a sum ``S`` make
it ``S / (1 - n * x)``; with the sums, ``s_i^2 = x_i * S_i``. So shares can be made anew without the scores. Entries
that had gone before scoring have the share 0, and count for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..sorting import squared_shares, stable_order, taken
from .patterns import Place
from .tallies import counts_true


def has_lost(rows: Sequence[Mapping[str, Tensor]], places: Sequence[Place]) -> list[bool]:
    """Tell of each parameter whether shares of a task are no longer right: one at least as large as another has gone.

    Args:
        rows: For each parameter, the tasks' shares, of its shape.
        places: What of each is alive now.
    """
    asked = [(index, task) for index, place in enumerate(places) if place.alive is not None for task in rows[index]]
    found = counts_true([_loss(rows[index][task], places[index]) for index, task in asked])
    lost = {index for (index, _), flag in zip(asked, found, strict=True) if flag}
    return [index in lost for index in range(len(places))]


def _loss(shares: Tensor, place: Place) -> Tensor:
    assert place.alive is not None
    gone, left = shares.masked_fill(place.alive, 0).max(), shares.masked_fill(~place.alive, torch.inf).min()
    return (gone > 0) & (left <= gone)


def renewed(shares: Tensor, place: Place) -> Tensor:
    """Return shares of the entries alive now; those below which alone something has gone stay as they are.

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
    flat = shares.reshape(-1)
    limit, kept = flat.masked_fill(place.alive.reshape(-1), 0).max(), taken(flat, place.positions)
    order = stable_order(flat)
    values = flat[order].double()
    growth = growths(values, torch.ones_like(values, dtype=torch.bool), top=True)
    squares = torch.empty_like(values)
    squares[order] = values.mul_(growth.exp_())
    new = squared_shares(squares[place.positions].sqrt_()).to(flat.dtype)
    result = flat.clone()
    result[place.positions] = torch.where(kept > limit, kept, new)
    return result.reshape(shares.shape)


def growths(shares: Tensor, counts: Tensor, *, top: bool) -> Tensor:
    """Return by how much the sum of the squares grows from the highest share down to each, as logarithms.

    Args:
        shares: 1-D, float64, ascending, equal ones together.
        counts: bool: which of them count.
        top: Whether the highest of all is among them, from which the sum begins.

    Returns:
        float64, same shape: 0 for what lies below no other that counts.

    Example:
        >>> shares = torch.tensor([1 / 14, 4 / 13, 1.0], dtype=torch.float64)  # of 1, 2 and 3
        >>> growths(shares, torch.ones(3, dtype=torch.bool), top=True).exp() * 9
        tensor([14., 13.,  9.], dtype=torch.float64)
    """
    if not shares.numel():
        return shares
    values, group = shares.unique_consecutive(return_inverse=True)
    number = torch.zeros_like(values).index_add_(0, group, counts.double())
    # The squares of n equal entries are at most n parts of n + 1 of a sum that holds a larger one too.
    part = torch.minimum(number * values, number / (number + 1))
    growth = -torch.log1p(-part)
    if top:
        growth[-1] = 0.0
    return growth.flip(0).cumsum(0).flip(0)[group]
