"""Convolutions as matrix products, for networks that are run side by side.

Under ``torch.vmap`` the convolutions of many networks become one grouped convolution, whose gradients are slow; matrix
products become one batched product. Depthwise convolutions stay as they are: side by side they are one depthwise
convolution of more channels, for which there are kernels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ProductConv2d(nn.Conv2d):
    """A convolution that multiplies its weight with the patches of its input; zero padding, one group, no dilation."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``(n, out channels, height, width)``."""
        (height, width), (down, across), (top, left) = self.kernel_size, self.stride, self._zeros
        padded = F.pad(inputs, (left, left, top, top)) if top or left else inputs
        patches = padded.unfold(2, height, down).unfold(3, width, across)  # (n, channels, h, w, height, width)
        samples, _, rows, columns = patches.shape[:4]
        table = patches.permute(1, 4, 5, 0, 2, 3).reshape(-1, samples * rows * columns)
        product = (self.weight.flatten(1) @ table).view(-1, samples, rows, columns).transpose(0, 1)
        return product if self.bias is None else product + self.bias.view(-1, 1, 1)

    @property
    def _zeros(self) -> tuple[int, ...]:
        return self.padding if isinstance(self.padding, tuple) else ()


def as_products(network: nn.Module) -> nn.Module:
    """Turn the convolutions of a network into products, depthwise ones excepted, in place; names and parameters stay.

    Raises:
        ValueError: If a convolution has groups of several channels, is dilated, or is not padded by zeros.
    """
    for name, module in network.named_modules():
        if type(module) is nn.Conv2d and not _is_depthwise(module):
            plain = module.groups == 1 and module.dilation == (1, 1) and module.padding_mode == "zeros"
            if not plain or isinstance(module.padding, str):
                raise ValueError(f"network: needs plain convolutions, found {module} at {name}; train it one at a time")
            module.__class__ = ProductConv2d
    return network


def _is_depthwise(module: nn.Conv2d) -> bool:
    return 1 < module.groups == module.in_channels
