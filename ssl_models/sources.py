"""Where images come from: each data set as uint8 pictures with labels, in a training and a test part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from featherlight.ssl_models.batches import Images


class Tensors:
    """Images held decoded in memory.

    Args:
        pixels: uint8 (N, C, H, W).
    """

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, indices: Tensor) -> Tensor:
        return self.pixels[indices]

    def at(self, places: Tensor) -> Tensors:
        return Tensors(self.pixels[places])


@dataclass
class Source:
    """One part of a data set.

    Args:
        images: its pictures.
        labels: (N,), -1 where a picture has none.
        owners: to whom each picture belongs, where the data say so.
    """

    images: Images
    labels: Tensor
    owners: Sequence[str] | None = None

    def at(self, places: Tensor) -> Source:
        """Some of the pictures."""
        owners = None if self.owners is None else [self.owners[place] for place in places.tolist()]
        return Source(self.images.at(places), self.labels[places], owners)


@dataclass(frozen=True)
class Loaded:
    """A data set.

    Args:
        train: its training part, or all of it.
        test: its test part, None where it has none of its own.
        classes: names of its labels.
        mirrored: whether a mirrored picture is still a picture of the same kind.
    """

    train: Source
    test: Source | None
    classes: tuple[str, ...]
    mirrored: bool = True


def digits(root: str, download: bool) -> Loaded:
    """The 1,797 handwritten digits that ship inside scikit-learn: grey, 8×8, values 0 to 16."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    return Loaded(Source(Tensors(pixels), labels), None, tuple(map(str, range(10))), mirrored=False)


LOADERS: dict[str, Callable[[str, bool], Loaded]] = {"digits": digits}


def in_memory(source: Source, image_size: int | None, limit: int, skip_unreadable: bool) -> Source:
    """``source`` with its pictures read and resized, where they take no more than ``limit`` bytes."""
    return source


def moments(images: Images) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, of values in [0, 1], float (C, 1, 1) each."""
    pixels = images.take(torch.arange(len(images))).double() / 255
    return pixels.mean((0, 2, 3)).float().view(-1, 1, 1), pixels.std((0, 2, 3)).float().view(-1, 1, 1)
