"""Which parameters of a model lie in one memory: tied weights, and views of each other."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..parameters import ParameterKey, qualified_names, stored
from .shards import is_sharded


def sharing_memory(model: nn.Module) -> dict[ParameterKey, tuple[ParameterKey, ParameterKey]]:
    """Find the parameters whose memory another one shares: masking one would leave the other unmasked.

    Returns:
        For each of them, the first pair of which it is one.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        >>> net[1].weight = net[0].weight
        >>> sharing_memory(net)[net[0], "weight"] == ((net[0], "weight"), (net[1], "weight"))
        True
    """
    spans = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not is_lazy(parameter) and not parameter.is_meta and parameter.numel():
                where = "DTensor" if is_sharded(parameter) else str(parameter.device)
                spans.append((where, *_span(parameter), (module, name.removesuffix("_orig"))))
    spans.sort(key=lambda span: span[:3])
    found: dict[ParameterKey, tuple[ParameterKey, ParameterKey]] = {}
    longest = None  # of those so far on the device, the one that ends last
    for span in spans:
        if longest is not None and span[0] == longest[0] and span[1] < longest[2]:
            pair = (longest[3], span[3])
            for key in pair:
                found.setdefault(key, pair)
        if longest is None or span[0] != longest[0] or span[2] > longest[2]:
            longest = span
    return found


def kept_aside(model: nn.Module, parameters: Sequence[ParameterKey]) -> dict[str, str]:
    """Find the parameters that other modules than their own keep in plain attributes, lists, tuples or dicts.

    Args:
        model: The model.
        parameters: The ``(module, name)`` pairs to look for.

    Returns:
        Where each is kept, as an attribute of the model, and its own qualified name.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Identity())
        >>> net[1].tied = [net[0].weight]
        >>> kept_aside(net, [(net[0], "weight")])
        {'1.tied': '0.weight'}
    """
    names = dict(zip(parameters, qualified_names(model, parameters), strict=True))
    own = {id(stored(*key)): (key[0], name) for key, name in names.items()}
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        for attribute, value in vars(module).items():
            kept = value.values() if type(value) is dict else value if isinstance(value, list | tuple) else [value]
            for entry in kept:
                owner, name = own.get(id(entry), (module, ""))
                if owner is not module:
                    found.setdefault(f"{path}.{attribute}".lstrip("."), name)
    return found


def _span(tensor: Tensor) -> tuple[int, int]:
    if is_sharded(tensor):  # on some ranks there may be nothing of it: two are tied only if they are one
        return id(tensor), id(tensor) + 1
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    start = tensor.data_ptr()
    return start, start + extent * tensor.element_size()
