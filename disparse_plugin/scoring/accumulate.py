"""Score the parameters on one batch and add the scores up: large ones in pieces, many at once on an accelerator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor

from ..agreement.tallies import extremes
from ..criteria import Criterion
from ..parameters import score_dtype
from .finite import peaks

# Entries scored at a time on a CPU: a piece of the weight, gradient, score and sum together stay in its cache, and no
# temporary of the weight's size is made, whose fresh memory costs more than the arithmetic.
PIECE = 2**18
# Entries scored together on an accelerator, where to launch an operation takes longer than to run it on few of them.
PORTION = 2**24


def accumulate(
    rule: Criterion,
    weights: Mapping[int, Tensor],
    grads: MutableMapping[int, Tensor],
    sums: MutableMapping[int, Tensor],
    names: Sequence[str],
) -> list[tuple[tuple[int, ...], Tensor]]:
    """Score parameters on one batch and add the scores to ``sums`` in place.

    Nothing is read back to the host.

    Args:
        rule: The criterion.
        weights: The effective weights. A criterion that works in place is given copies.
        grads: The gradients of one task's loss with respect to them, by the same keys; emptied on the way, so that each
            is freed early.
        sums: The sums so far. Where there is none one is made: float32 (float64 for float64 weights), of the weight's
            shape.
        names: What messages call the parameters.

    Returns:
        For each device, which parameters, and the :func:`.peaks` of the scores that were added.

    Raises:
        ValueError: If the criterion returns something else than a floating point tensor of the weight's shape.

    Example:
        >>> from disparse_plugin.criteria import resolve
        >>> sums = {0: torch.ones(2)}
        >>> weights, grads = {0: torch.tensor([2.0, -3.0])}, {0: torch.tensor([1.0, 1.0])}
        >>> accumulate(resolve("snip"), weights, grads, sums, ["weight"])
        [((0,), tensor([[2., 3.]]))]
        >>> sums[0]
        tensor([3., 4.])
    """
    found: dict[torch.device, list[tuple[list[int], Tensor]]] = {}
    for group in _groups(rule, weights):
        listed = [weights[index].detach() for index in group]
        taken = [grads.pop(index).detach() for index in group]
        totals = [sums.get(index) for index in group]
        run = _in_pieces if len(group) == 1 else _together
        added, peak = run(rule, listed, taken, totals, ", ".join(names[index] for index in group))
        sums.update(zip(group, added, strict=True))
        found.setdefault(peak.device, []).append((group, peak))
    # One tensor per batch, not one per parameter: there may be very many batches.
    return [
        (tuple(index for group, _ in parts for index in group), torch.cat([peak for _, peak in parts]))
        for parts in found.values()
    ]


def _groups(rule: Criterion, weights: Mapping[int, Tensor]) -> Iterator[list[int]]:
    """Yield which parameters are scored together."""
    waiting: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    sizes: dict[tuple[torch.device, torch.dtype], int] = {}
    for index, weight in weights.items():
        if not rule.elementwise or weight.device.type == "cpu":
            yield [index]
            continue
        kind = (weight.device, weight.dtype)
        if kind in waiting and sizes[kind] + weight.numel() > PORTION:
            yield waiting.pop(kind)
        waiting.setdefault(kind, []).append(index)
        sizes[kind] = sizes[kind] + weight.numel() if len(waiting[kind]) > 1 else weight.numel()
    yield from waiting.values()


def _together(
    rule: Criterion, weights: Sequence[Tensor], grads: Sequence[Tensor], totals: Sequence[Tensor | None], name: str
) -> tuple[list[Tensor], Tensor]:
    """Score several weights of one device and type as one vector."""
    dtype = score_dtype(weights[0])
    # Joining copies, so that a criterion may work in place.
    w, g = (torch.cat([tensor.reshape(-1) for tensor in tensors]).to(dtype) for tensors in (weights, grads))
    score = _checked(rule, w, g, name).to(dtype)
    parts = [
        part.view(weight.shape)
        for part, weight in zip(score.split([weight.numel() for weight in weights]), weights, strict=True)
    ]
    added = [
        torch.empty_like(weight, dtype=dtype) if total is None else total
        for weight, total in zip(weights, totals, strict=True)
    ]
    new = [place for place, total in enumerate(totals) if total is None]
    old = [place for place, total in enumerate(totals) if total is not None]
    if new:
        torch._foreach_copy_([added[place] for place in new], [parts[place] for place in new])
    if old:
        torch._foreach_add_([added[place] for place in old], [parts[place] for place in old])
    return added, peaks(parts)


def _in_pieces(
    rule: Criterion, weights: Sequence[Tensor], grads: Sequence[Tensor], totals: Sequence[Tensor | None], name: str
) -> tuple[list[Tensor], Tensor]:
    """Score one weight, a piece at a time where pieces may be scored apart."""
    (weight,), (grad,), (total,) = weights, grads, totals
    dtype, copied = score_dtype(weight), rule.may_write
    result = torch.empty_like(weight, dtype=dtype) if total is None else total
    found = []
    for w, g, part in _pieces(rule, weight, grad, result):
        score = _checked(rule, w.to(dtype, copy=copied), g.to(dtype, copy=copied), name).to(dtype)
        found.append(extremes(score))
        part.copy_(score) if total is None else part.add_(score)
    peak = found[0] if len(found) == 1 else extremes(torch.stack(found))
    return [result], peak.unsqueeze(0)


def _pieces(rule: Criterion, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of one shape along their first axis, where pieces may be scored apart and it is worth it."""
    shape, count = tensors[0].shape, tensors[0].numel()
    if not rule.elementwise or count <= PIECE or tensors[0].device.type != "cpu":
        return iter([tensors])
    rows = max(1, PIECE * shape[0] // count)
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _checked(rule: Criterion, weight: Tensor, grad: Tensor, name: str) -> Tensor:
    score = rule.score(weight, grad)
    if not isinstance(score, Tensor) or score.shape != weight.shape or not score.is_floating_point():
        found = f"{score.dtype} {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
        raise ValueError(
            f"criterion: {rule.name} must return a floating point tensor of the weight's shape {tuple(weight.shape)}, "
            f"found {found} for {name}"
        )
    return score.detach()
