"""The masks that sparse training starts from: how many weights of each layer, and which."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .._support.shards import is_sharded, local
from ..agreement.amounts import count_to_prune, warn_of_percentage
from ..agreement.patterns import WEIGHTS, NofM, Pattern, Place
from ..errors import wrong
from ..parameters import ParameterKey, alive_mask, inputs_first, is_masked, present_mask, stored
from .blocks import blocks_with_other_counts, check_amount_of, random_blocks
from .densities import count_of, layer_counts
from .exchange import random_mask
from .schedules import checked_count

EXISTING = "existing"


def initial_masks(
    keys: Sequence[ParameterKey],
    names: Sequence[str],
    amount: float | None,
    distribution: str | Mapping[ParameterKey | str, float] | None,
    exempt: Sequence[nn.Module | str],
    generator: torch.Generator,
    pattern: Pattern = WEIGHTS,
) -> dict[int, Tensor]:
    """Choose a first mask for every layer that is not exempt.

    Args:
        keys: The ``(module, name)`` pairs.
        names: Their qualified names.
        amount: How much of all of them is pruned; None if the distribution says it.
        distribution: ``"erk"`` (or None), ``"uniform"``, ``"existing"`` (the masks that are on the model), or densities
            by pair or qualified name.
        exempt: Modules (with everything inside) or qualified names that stay dense.
        generator: Draws which weights of a layer stay.
        pattern: Single weights, or n of every m.

    Returns:
        bool masks by index; of a sharded parameter what of it lies on this rank.

    Raises:
        TypeError: As :func:`.layer_counts`.
        ValueError: As :func:`.layer_counts`; if a layer is unknown,
            ``amount`` is missing or contradicts the distribution, or the model carries masks already. If the pattern
            is another, or does not go with an option or a layer.
    """
    check_exchangeable(pattern)
    pattern.check(places_of(keys, names))
    if isinstance(pattern, NofM):
        return _in_blocks(keys, names, amount, distribution, exempt, generator, pattern)
    distribution = "erk" if distribution is None else distribution
    if not isinstance(distribution, str | Mapping):
        raise TypeError(f"distribution: must be a name or a mapping of densities, found {wrong(distribution)}")
    dense = _exempt_indices(keys, names, exempt)
    total = sum(stored(*key).numel() for key in keys)
    if distribution == EXISTING:
        masks = {index: local(present_mask(key)) for index, key in enumerate(keys) if index not in dense}
        if any(is_sharded(stored(*key)) for key in keys):
            if amount is not None:
                raise ValueError("amount: must be left out with distribution='existing' in a sharded model, found one")
            return masks
        pruned = sum(mask.numel() - int(mask.sum()) for mask in masks.values())
        if amount is not None and count_to_prune(amount, total) != pruned:
            raise ValueError(
                f"amount: must be left out with distribution='existing' or fit the masks, found {amount} with "
                f"{pruned} of {total} entries masked"
            )
        return masks
    _check_unmasked(keys, names)
    shapes = [tuple(stored(*key).shape) for key in keys]
    wanted = distribution if isinstance(distribution, str) else _by_index(keys, names, distribution)
    if amount is not None:
        checked_count(amount, total)
        warn_of_percentage(amount, total)
    counts = layer_counts(shapes, _total_amount(amount, shapes, wanted, dense), wanted, dense)
    return {
        index: random_mask(stored(*key), counts[index], generator)
        for index, key in enumerate(keys)
        if index not in dense
    }


def check_exchangeable(pattern: Pattern) -> None:
    """Check that weights can drop and grow in a pattern.

    Raises:
        ValueError: If it is neither single weights nor n of every m.
    """
    if pattern is not WEIGHTS and not isinstance(pattern, NofM):
        raise ValueError(
            f"pattern: must be 'weights' or n:m where weights drop and grow, found {pattern.name!r}; GradualPruning "
            "takes others"
        )


def places_of(keys: Sequence[ParameterKey], names: Sequence[str]) -> list[Place]:
    """Describe the parameters as patterns want to see them."""
    return [
        Place(name, stored(*key).shape, alive_mask(*key), inputs_first(*key))
        for key, name in zip(keys, names, strict=True)
    ]


def _in_blocks(
    keys: Sequence[ParameterKey],
    names: Sequence[str],
    amount: float | None,
    distribution: str | Mapping[ParameterKey | str, float] | None,
    exempt: Sequence[nn.Module | str],
    generator: torch.Generator,
    pattern: NofM,
) -> dict[int, Tensor]:
    """Choose n of every m weights at random, or take over masks that have them."""
    for option, given, way in (("distribution", distribution, ""), ("exempt", exempt, "; use exclude=[...]")):
        if given and given != EXISTING:
            raise ValueError(
                f"{option}: must be left out with pattern={pattern.name!r}, found {given!r}; every block keeps "
                f"{pattern.n}{way}"
            )
    check_amount_of(pattern, amount, sum(stored(*key).numel() for key in keys))
    if distribution is None:
        _check_unmasked(keys, names)
        return {
            index: random_blocks(stored(*key).shape, pattern.n, pattern.m, generator).to(stored(*key).device)
            for index, key in enumerate(keys)
        }
    masks = {index: present_mask(key) for index, key in enumerate(keys)}
    for index, mask in masks.items():
        if others := blocks_with_other_counts(mask, pattern.n, pattern.m):
            raise ValueError(
                f"distribution: every block must have {pattern.n} of {pattern.m} alive with distribution='existing' "
                f"and pattern={pattern.name!r}, found {others} of {names[index]} that have not; prune with "
                f"disparse_static(..., pattern={pattern.name!r}) first"
            )
    return masks


def _exempt_indices(
    keys: Sequence[ParameterKey], names: Sequence[str], exempt: Iterable[nn.Module | str]
) -> frozenset[int]:
    found: set[int] = set()
    for entry in exempt:
        inside = set(entry.modules()) if isinstance(entry, nn.Module) else set()
        matches = {
            i for i, (key, name) in enumerate(zip(keys, names, strict=True)) if key[0] in inside or name == entry
        }
        if not matches:
            what = repr(entry) if isinstance(entry, str) else type(entry).__name__
            raise ValueError(
                f"exempt: every entry must be a module with prunable weights or one of their names, found {what}; the "
                f"names are {', '.join(names)}"
            )
        found |= matches
    return frozenset(found)


def _by_index(
    keys: Sequence[ParameterKey], names: Sequence[str], densities: Mapping[ParameterKey | str, float]
) -> dict[int, float]:
    places: dict[ParameterKey | str, int] = {key: index for index, key in enumerate(keys)}
    places.update({name: index for index, name in enumerate(names)})
    unknown = [entry for entry in densities if entry not in places]
    if unknown:
        raise ValueError(
            f"distribution: every key must be a (module, name) pair or a qualified name, found {unknown[0]!r}; the "
            f"names are {', '.join(names)}"
        )
    return {places[entry]: density for entry, density in densities.items()}


def _total_amount(
    amount: float | None,
    shapes: Sequence[tuple[int, ...]],
    distribution: str | Mapping[int, float],
    dense: frozenset[int],
) -> float:
    if amount is not None:
        return amount
    if isinstance(distribution, str) or len(distribution.keys() | dense) < len(shapes):
        raise ValueError(
            "amount: must say how much is pruned, found None; leave it out only with distribution='existing' or a "
            "density for every layer"
        )
    sizes = [torch.Size(shape).numel() for shape in shapes]
    return sum(sizes) - sum(
        size if index in dense else count_of(distribution[index], size) for index, size in enumerate(sizes)
    )


def _check_unmasked(keys: Sequence[ParameterKey], names: Sequence[str]) -> None:
    masked = [name for key, name in zip(keys, names, strict=True) if is_masked(*key)]
    if masked:
        raise ValueError(
            f"distribution: the model must not carry masks yet, found {len(masked)} pruned parameters (first: "
            f"{masked[0]}); pass distribution='existing' to go on from its masks, or remove them with prune.remove"
        )
