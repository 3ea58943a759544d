"""The augmentation of SimCLR and MoCo, as operations on whole batches of tensors, on any device.

Drawing (:func:`draw`) and doing (:func:`apply`) are apart: all random numbers come from one generator on the CPU, so every device
and any part of a batch sees the same views. Distributions are those of torchvision's and lightly's transforms on PIL images, which
:mod:`~featherlight.ssl_models.views` offers beside this; tests compare the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

RATIO = (3 / 4, 4 / 3)
"""Width over height of a random crop: torchvision's default, which SimCLR and MoCo use."""
LUMA = (0.299, 0.587, 0.114)
"""Grey of red, green and blue (ITU-R 601-2), as PIL converts."""


@dataclass(frozen=True)
class Augmentation:
    """What a view of an image may look like. Defaults are MoCo v2's (arXiv 2003.04297), which are SimCLR's at strength 0.5.

    Args:
        min_scale: the smallest crop, as a part of the image's area; the largest is the whole image.
        flip: probability of mirroring left and right.
        jitter: probability of changing colours at all; the next four say by how much, in random order.
        brightness: factor within 1 ± this.
        contrast: factor within 1 ± this.
        saturation: factor within 1 ± this.
        hue: shift within ± this, as a part of the colour circle.
        grayscale: probability of taking the colour away.
        blur: probability of a Gaussian blur.
        sigma_min: smallest width of that blur, in pixels.
        sigma_max: largest width of that blur, in pixels.
        solarise: probability of inverting the pixels above one half.
    """

    min_scale: float = 0.2
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grayscale: float = 0.2
    blur: float = 0.5
    sigma_min: float = 0.1
    sigma_max: float = 2.0
    solarise: float = 0.0


def suited(shape: tuple[int, int, int], mirrored: bool = True) -> Augmentation:
    """The augmentation for images of ``shape`` (C, H, W) where a user names none.

    No blur under 64 pixels (SimCLR trains on CIFAR without, arXiv 2002.05709, appendix B.9), no colour operations on grey images,
    and no flip where a mirrored image is another thing (``mirrored=False``: digits).
    """
    channels, height, width = shape
    chosen = Augmentation(flip=0.5 if mirrored else 0.0)
    if min(height, width) < 64:
        chosen = replace(chosen, blur=0.0)
    if channels == 1:
        chosen = replace(chosen, saturation=0.0, hue=0.0, grayscale=0.0)
    return chosen


class Draws(NamedTuple):
    """All random numbers of one view of B images; every tensor is (B,) unless said otherwise, and on the CPU."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor
    jitter: Tensor
    order: Tensor  # (B, 4): the operation done first, second, ...
    factors: Tensor  # (B, 4): of each operation, of brightness, contrast, saturation, hue
    grayscale: Tensor
    blur: Tensor
    sigma: Tensor
    solarise: Tensor

    def at(self, places: Tensor) -> Draws:
        """The draws of some of the images."""
        return Draws(*(values[places] for values in self))


def draw(augmentation: Augmentation, shape: tuple[int, int, int], count: int, random: torch.Generator) -> Draws:
    """Draw one view of ``count`` images of ``shape`` (C, H, W)."""
    a = augmentation

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(count).uniform_(low, high, generator=random)

    def chance(probability: float) -> Tensor:
        return torch.rand(count, generator=random) < probability

    crop = _crops(a.min_scale, shape[1], shape[2], count, random)
    spans = ((1.0, a.brightness), (1.0, a.contrast), (1.0, a.saturation), (0.0, a.hue))
    return Draws(
        *crop,
        flip=chance(a.flip),
        jitter=chance(a.jitter),
        order=torch.rand(count, 4, generator=random).argsort(1),
        factors=torch.stack(
            [uniform(max(0.0, c - by) if c else -by, c + by) for c, by in spans],
            1,
        ),
        grayscale=chance(a.grayscale),
        blur=chance(a.blur),
        sigma=uniform(a.sigma_min, a.sigma_max),
        solarise=chance(a.solarise),
    )


def _crops(min_scale: float, height: int, width: int, count: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top, left, height, width of torchvision's RandomResizedCrop: the first of ten tries that fits, else the middle."""
    area = torch.empty(10, count).uniform_(min_scale, 1.0, generator=random) * (height * width)
    ratio = torch.empty(10, count).uniform_(math.log(RATIO[0]), math.log(RATIO[1]), generator=random).exp()
    h, w = (area / ratio).sqrt().round().long(), (area * ratio).sqrt().round().long()
    fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)
    first = fits.int().argmax(0, keepdim=True)
    middle_w, middle_h = width, height
    if width / height < RATIO[0]:
        middle_h = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        middle_w = round(height * RATIO[1])
    found = fits.any(0)
    h = torch.where(found, h.gather(0, first)[0], middle_h)
    w = torch.where(found, w.gather(0, first)[0], middle_w)
    at = torch.rand(2, count, generator=random, dtype=torch.float64)
    top = torch.where(found, (at[0] * (height - h + 1)).long(), (height - middle_h) // 2)
    left = torch.where(found, (at[1] * (width - w + 1)).long(), (width - middle_w) // 2)
    return top, left, h, w


def apply(images: Tensor, draws: Draws) -> Tensor:
    """One view of a batch.

    Args:
        images: uint8, or float in [0, 1], (B, C, H, W), on any device.
        draws: what was drawn for it, of B images.

    Returns:
        float in [0, 1], (B, C, H, W).
    """
    x = images.float().div_(255) if images.dtype == torch.uint8 else images
    height, width = x.shape[-2:]
    rows = _resampling(draws.top, draws.height, height).to(x.device)
    columns = _resampling(draws.left, draws.width, width)
    columns = torch.where(draws.flip[:, None, None], columns.flip(1), columns).to(x.device)
    x = _stretched(x, rows, columns)
    for slot in range(4):
        for number, operation in enumerate((_brightness, _contrast, _saturation, _hue)):
            if x.shape[1] > 1 or number < 2:
                chosen = draws.jitter & (draws.order[:, slot] == number)
                _change(x, chosen, operation, draws.factors[:, number])
    if x.shape[1] > 1:
        _change(x, draws.grayscale, lambda part, _: _grey(part).expand_as(part), draws.sigma)
    _change(x, draws.blur, _blur, draws.sigma)
    _change(x, draws.solarise, lambda part, _: torch.where(part >= 128 / 255, 1 - part, part), draws.sigma)
    return x


def _change(x: Tensor, chosen: Tensor, operation: Callable[[Tensor, Tensor], Tensor], values: Tensor) -> None:
    """Put ``operation(images, their values)`` in place of the chosen images of ``x``. The operation may use up what it is given."""
    index = chosen.nonzero().flatten()
    if len(index):
        there = index.to(x.device)
        x.index_copy_(0, there, operation(x.index_select(0, there), values[index].to(x.device, x.dtype).view(-1, 1, 1, 1)))


def _resampling(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Matrices (B, size, size) that stretch ``length`` pixels from ``start`` to ``size``, as PIL's BILINEAR resize of the crop."""
    step = (length.float() / size)[:, None, None]
    centre = start[:, None, None] + (torch.arange(size)[None, :, None] + 0.5) * step
    pixel = torch.arange(size)[None, None, :]
    weight = (1 - (centre - pixel - 0.5).abs() / step.clamp(min=1)).clamp(min=0)
    inside = (pixel >= start[:, None, None]) & (pixel < (start + length)[:, None, None])
    weight = weight * inside
    return weight / weight.sum(2, keepdim=True)


def _grey(x: Tensor) -> Tensor:
    if x.shape[1] == 1:
        return x
    red, green, blue = x.unbind(1)
    return (LUMA[0] * red).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2]).unsqueeze(1)


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return x.mul_(factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    grey = _grey(x.mean((2, 3), keepdim=True)).mean((1, 2, 3), keepdim=True)
    return torch.lerp(grey, x, factor, out=x).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_grey(x), x, factor, out=x).clamp_(0, 1)


def _hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of HSV, keeping saturation and value: largest and smallest channel stay what they are.

    Hue is counted in sixths of the circle. A channel is full within one sixth of its own hue, and empty from two on.
    """
    red, green, blue = x.unbind(1)
    top, bottom = x.amax(1), x.amin(1)
    span = top - bottom
    is_red, is_green = top == red, top == green
    ahead = torch.where(is_red, green - blue, torch.where(is_green, blue - red, red - green))
    turned = ahead.div_(bottom.copy_(span).clamp_(min=1e-8)).add_(6 * shift[:, 0])
    turned += torch.where(is_red, 0.0, torch.where(is_green, 2.0, 4.0))
    turned.remainder_(6)
    for channel, own in zip((red, green, blue), (0, 2, 4)):
        near = torch.sub(turned, own, out=channel).abs_().sub_(3).abs_()  # 3 where the hue is its own, 0 across the circle
        torch.addcmul(top, near.sub_(2).clamp_(-1, 0), span, out=channel)
    return x


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur, edges extended: each pixel's weight is the Gaussian's integral over it."""
    spread = (sigma.flatten() ** 2 - 1 / 12).clamp(min=1e-4).sqrt()  # the pixel's own width adds 1/12 to the variance
    rows, columns = (_smoothing(spread, size) for size in x.shape[-2:])
    return _stretched(x, rows, columns)


def _stretched(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(B, C, H, W) by (B, H, H) from above and by (B, W, W) along, each image its own."""
    return rows[:, None] @ (x.flatten(1, 2) @ columns.mT).view(x.shape)


def _smoothing(spread: Tensor, size: int) -> Tensor:
    """(B, size, size)"""
    edges = torch.arange(1, size, device=spread.device) - 0.5
    below = torch.special.ndtr((edges - torch.arange(size, device=spread.device)[:, None]) / spread[:, None, None])
    first, last = below[..., :1], 1 - below[..., -1:]
    return torch.cat([first, below.diff(dim=-1), last], dim=-1)
