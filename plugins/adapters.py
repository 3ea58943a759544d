"""A linear layer for stages whose newest block is narrower than the head's input (arXiv 2401.11647: "linear to 512" for ResNets)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from featherlight.plugins.seeds import derive


class WidthAdapter(nn.Module):
    """Global mean and a linear layer for feature maps (N, C, H, W) → (N, C', 1, 1); a linear layer for tokens (N, L, C) → (N, L, C').

    The mean comes first because it commutes with the linear layer and makes it H·W times cheaper; a model whose tail
    averages the map once more gets the same numbers.
    """

    def __init__(self, width: int, wanted: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # a draw of its own: attaching a plugin must not move the model's random numbers
            torch.manual_seed(derive(width, wanted, "width adapter"))
            self.linear = nn.Linear(width, wanted)

    def forward(self, features: Tensor) -> Tensor:
        if features.ndim == 4:
            return self.linear(features.mean(dim=(2, 3)))[:, :, None, None]
        return self.linear(features)


def make_adapters(newest: Sequence[nn.Module]) -> nn.ModuleDict:
    """One adapter for each stage, named by its number, whose newest block's width is not the last block's."""
    widths = [width_of(block) for block in newest]
    adapters = nn.ModuleDict()
    for stage, width in enumerate(widths):
        if width is not None and widths[-1] is not None and width != widths[-1]:
            adapters[str(stage)] = WidthAdapter(width, widths[-1])
    return adapters


def width_of(block: nn.Module) -> int | None:
    """Channels of what ``block`` puts out, read off its last layer that has a width; None where no layer has one.

    GPT-2's linear layers, transformers' ``Conv1D``, call their widths ``nx`` and ``nf``.
    """
    return _last_width(block, ("num_features", "out_channels", "out_features", "nf"))


def _last_width(block: nn.Module, attributes: Sequence[str]) -> int | None:
    width = None
    for module in block.modules():
        for attribute in attributes:
            value = getattr(module, attribute, None)
            if isinstance(value, int) and not list(module.children()):
                width = value
    return width


def keeps_shape(block: nn.Module) -> bool:
    """Whether identity can stand in for ``block``: no stride or pooling inside, no convolution that eats the border, and as many
    channels out as in.

    Example:
        >>> from torch import nn
        >>> keeps_shape(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))), keeps_shape(nn.Conv2d(8, 8, 3, stride=2))
        (True, False)
    """
    first: int | None = None
    for module in block.modules():
        if isinstance(
            module,
            nn.modules.pooling._MaxPoolNd | nn.modules.pooling._AvgPoolNd | nn.modules.pooling._AdaptiveAvgPoolNd,
        ):
            return False
        if isinstance(module, nn.modules.conv._ConvNd):
            if any(step != 1 for step in module.stride) or not _pads_fully(module):
                return False
            first = first if first is not None else module.in_channels
        elif first is None:
            first = module.in_features if isinstance(module, nn.Linear) else getattr(module, "nx", None)
    return first is not None and first == width_of(block)


def _pads_fully(conv: nn.modules.conv._ConvNd) -> bool:
    if isinstance(conv.padding, str):
        return conv.padding == "same"
    return all(2 * pad == step * (size - 1) for pad, step, size in zip(conv.padding, conv.dilation, conv.kernel_size))
