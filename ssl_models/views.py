"""Views of a training batch, made in either of two ways: by whole-batch operations on the device, or image by image in the loader
with lightly's and torchvision's transforms.

Two views are SimCLR's and MoCo's augmentation; one view is the pad, crop and flip of supervised training. All randomness of a
batch comes from its seed, in both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from featherlight.plugins.seeds import derive, generator
from featherlight.ssl_models.augment import Augmentation, apply, draw, suited
from featherlight.ssl_models.batches import Draw


class Views:
    """The views of a data set's batches.

    Args:
        shape: of the images, (C, H, W).
        count: 2 for contrastive training, 1 for supervised.
        mirrored: whether a mirrored image is still one of the same kind.
        first: augmentation of the first of two views; None: what is suited.
        second: of the second; None: the same.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        count: int,
        mirrored: bool = True,
        first: Augmentation | None = None,
        second: Augmentation | None = None,
    ) -> None:
        first = first or suited(shape, mirrored)
        self.shape, self.count, self.flip = shape, count, 0.5 if mirrored else 0.0
        self.pad = max(1, min(shape[1:]) // 8)  # 4 pixels at 32, as is usual for CIFAR
        self.augmentations = (first, second or first)

    def batched(self, images: Tensor, places: Tensor, total: int, seed: int) -> tuple[Tensor, ...]:
        """Views of a batch by whole-batch operations.

        Args:
            images: uint8 (B, C, H, W), on any device.
            places: their places in the whole batch, (B,).
            total: size of the whole batch.
            seed: the batch's seed.

        Returns:
            ``count`` tensors (B, C, H, W): float in [0, 1] of two views, uint8 of one.
        """
        places = places.cpu()
        if self.count == 1:
            random = generator(seed, "view")
            shifts = torch.randint(2 * self.pad + 1, (2, total), generator=random)[:, places]
            flips = (torch.rand(total, generator=random) < self.flip)[places]
            return (pad_crop_flip(images, self.pad, shifts[0], shifts[1], flips),)
        return tuple(
            apply(images, draw(augmentation, self.shape, total, generator(seed, "view", number)).at(places))
            for number, augmentation in enumerate(self.augmentations)
        )

    def in_loader(self, images: Tensor, drawn: Draw) -> tuple[Tensor, ...]:
        """Views of a batch image by image: ``count`` float tensors in [0, 1], (B, C, H, W)."""
        pictures = [Image.fromarray(image.squeeze(0).numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()) for image in images]
        views = []
        with _own_randomness() as start:
            for number, transform in enumerate(self._transforms):
                made = []
                for place, picture in zip(drawn.places.tolist(), pictures, strict=True):
                    start(derive(drawn.seed, "image", place, number))
                    made.append(transform(picture))
                views.append(torch.stack(made))
        return tuple(views)

    @cached_property
    def _transforms(self) -> tuple[Callable[[Any], Tensor], ...]:
        if self.count == 1:
            return (_supervised(self.shape, self.pad, self.flip),)
        return tuple(by_lightly(augmentation, self.shape) for augmentation in self.augmentations)


def pad_crop_flip(images: Tensor, pad: int, down: Tensor, right: Tensor, flip: Tensor) -> Tensor:
    """Surround images with ``pad`` black pixels and cut each to its old size, some mirrored.

    Args:
        images: (B, C, H, W).
        pad: in pixels.
        down: first row of each cut, from 0 to 2·pad, (B,).
        right: first column of each cut, (B,).
        flip: which are mirrored, bool (B,).

    Example:
        >>> image = torch.tensor([[[[1, 2], [3, 4]]]])
        >>> one, zero = torch.tensor([1]), torch.tensor([0])
        >>> pad_crop_flip(image, 1, down=one, right=zero, flip=torch.tensor([False]))[0, 0].tolist()
        [[0, 1], [0, 3]]
    """
    height, width = images.shape[-2:]
    rows = down[:, None] + torch.arange(height)
    columns = right[:, None] + torch.arange(width)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    padded = F.pad(images, (pad, pad, pad, pad))
    first, rows, columns = (index.to(images.device) for index in (torch.arange(len(images)), rows, columns))
    return padded.permute(0, 2, 3, 1)[first[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def by_lightly(augmentation: Augmentation, shape: tuple[int, int, int]) -> Callable[[Any], Tensor]:
    """lightly's transform of PIL images of ``shape`` (C, H, W) to float tensors in [0, 1]."""
    from lightly.transforms.byol_transform import BYOLView2Transform

    a = augmentation
    size: Any = shape[1:]  # lightly types it as one number; torchvision's crop below takes both
    return BYOLView2Transform(
        input_size=size,
        cj_prob=a.jitter,
        cj_strength=1.0,
        cj_bright=a.brightness,
        cj_contrast=a.contrast,
        cj_sat=a.saturation,
        cj_hue=a.hue,
        min_scale=a.min_scale,
        random_gray_scale=a.grayscale,
        gaussian_blur=a.blur,
        solarization_prob=a.solarise,
        sigmas=(a.sigma_min, a.sigma_max),
        hf_prob=a.flip,
        normalize=None,
    )


def _supervised(shape: tuple[int, int, int], pad: int, flip: float) -> Callable[[Any], Tensor]:
    from torchvision.transforms import v2

    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    return v2.Compose([v2.RandomCrop(shape[1:], padding=pad), v2.RandomHorizontalFlip(flip), *to_tensor])


@contextmanager
def _own_randomness() -> Iterator[Callable[[int], None]]:
    """A function that restarts the global streams, which these transforms draw from; both are left as they were found."""
    numpy_state = np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):

        def start(seed: int) -> None:
            torch.default_generator.manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002

        try:
            yield start
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
