"""Pictures as they are held: decoded in memory, or as files that are decoded when they are taken."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from time import monotonic

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from featherlight.ssl_models.batches import Images

BAR_AFTER = 2.0
"""Seconds of reading after which a progress bar appears."""


BROKEN = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, NotImplementedError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
"""What PIL's decoders raise for files that are damaged or are no pictures."""


class UnreadableImage(ValueError):
    """An image file that cannot be decoded, by name."""


class Tensors:
    """Pictures held decoded in memory.

    Args:
        pixels: uint8 (N, C, H, W), in any order of memory.
    """

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, indices: Tensor) -> Tensor:
        return self.pixels[indices].contiguous()

    def at(self, places: Tensor) -> Tensors:
        return Tensors(self.pixels[places])


class Files:
    """Pictures decoded when they are taken, as colour.

    Args:
        paths: their files.
        size: (H, W) they are cut and resized to; None where all must have the size of the first.
    """

    def __init__(self, paths: Sequence[str] | np.ndarray, size: tuple[int, int] | None = None) -> None:
        self.paths, self.size = np.array(paths, dtype=object), size

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: Tensor) -> Tensor:
        pictures = np.stack([np.asarray(self.one(index, self.size)) for index in indices.tolist()])
        return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()

    def at(self, places: Tensor) -> Files:
        return Files(self.paths[places.numpy()], self.size)

    def one(self, index: int, size: tuple[int, int] | None) -> Image.Image:
        """One picture, which must be of ``size`` (H, W) where that is given."""
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                if self.size is not None:
                    image.draft("RGB", (self.size[1], self.size[0]))  # lets JPEG decode at a fraction of its size
                picture = image.convert("RGB")
            if self.size is not None and picture.size != (self.size[1], self.size[0]):
                picture = ImageOps.fit(picture, (self.size[1], self.size[0]), Image.Resampling.BILINEAR)
        except BROKEN as error:
            reason = type(error).__name__ if str(path) in str(error) else str(error)
            raise UnreadableImage(f"cannot read image {path} ({reason}); repair or remove it, or set skip_unreadable=true") from None
        if size is not None and picture.size != (size[1], size[0]):
            raise ValueError(
                f"image {path} is {picture.size[0]}x{picture.size[1]} pixels, the first is {size[1]}x{size[0]}; set image_size "
                "to bring all to one size"
            )
        return picture


class Grey:
    """Colour pictures, grey when they are taken: (299 R + 587 G + 114 B) / 1000, rounded, so that grey ones keep their values."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Tensor) -> Tensor:
        red, green, blue = self.images.take(indices).int().unbind(1)
        return ((299 * red + 587 * green + 114 * blue + 500) // 1000).to(torch.uint8).unsqueeze(1)

    def at(self, places: Tensor) -> Grey:
        return Grey(self.images.at(places))


def grey(images: Images) -> Images:
    """``images`` with one channel, held in memory where they are."""
    if not len(images) or images.take(torch.tensor([0])).shape[1] == 1:
        return images
    return Tensors(Grey(images).take(torch.arange(len(images)))) if isinstance(images, Tensors) else Grey(images)


def resized(pixels: Tensor, image_size: int | None) -> Tensor:
    """Pictures (N, C, H, W) at ``image_size`` pixels each way; None keeps them as they are."""
    if image_size is None or pixels.shape[-2:] == (image_size, image_size) or not len(pixels):
        return pixels
    return torch.cat([F.interpolate(part, (image_size, image_size), mode="bilinear", antialias=True) for part in pixels.split(1024)])


def first_size(images: Files, skip_unreadable: bool) -> tuple[int, int]:
    """(H, W) of the first picture, or with ``skip_unreadable`` of the first that can be read.

    Raises:
        UnreadableImage: the first cannot be read; ValueError: none can.
    """
    for index in range(len(images)):
        try:
            width, height = images.one(index, None).size
            return height, width
        except UnreadableImage:
            if not skip_unreadable:
                raise
    raise ValueError(f"none of {len(images)} images can be read, for example {images.paths[0]}")


def decode(images: Files, size: tuple[int, int], pixels: np.ndarray, skip_unreadable: bool) -> Tensor:
    """Decode all into ``pixels`` (nowhere where that is empty); which of them could be read, bool (N,)."""
    from rich.console import Console
    from rich.progress import Progress

    good = torch.ones(len(images), dtype=torch.bool)

    def some(start: int) -> int:
        stop = min(start + 256, len(images))
        for index in range(start, stop):
            try:
                picture = images.one(index, size)
            except UnreadableImage:
                if not skip_unreadable:
                    raise
                good[index] = False
                continue
            if len(pixels):
                pixels[index] = picture
        return stop - start

    began, done = monotonic(), 0
    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task("reading images", total=len(images))
    # Tiny files spend their time in Python, where threads wait for each other (0.28 against 0.18 ms each, 32 pixels).
    threads = min(8, os.cpu_count() or 1) if os.path.getsize(images.paths[0]) > 2**14 else 1
    pool = ThreadPoolExecutor(threads)
    try:
        for count in pool.map(some, range(0, len(images), 256)):
            done += count
            bar.update(task, completed=done)
            if monotonic() - began > BAR_AFTER:
                bar.start()
    finally:
        pool.shutdown(cancel_futures=True)
        bar.stop()
    return good


def moments(images: Images, most: int = 50_000) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, of values in [0, 1], float (C, 1, 1) each.

    They come from counts of the 256 values, so that they are the same on every machine; of evenly spaced images where
    there are more than ``most`` (2,000 where images are decoded as they are taken).
    """
    count = min(len(images), most if isinstance(images, Tensors) else 2000)
    places = torch.linspace(0, len(images) - 1, count).round().long()
    tally: Tensor | int = 0
    for some in places.split(1024):
        channels = images.take(some).transpose(0, 1).flatten(1).int()
        tally = tally + torch.stack([channel.bincount(minlength=256) for channel in channels])
    assert isinstance(tally, Tensor)
    share = tally.double() / tally.sum(1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ values
    std = (share @ values**2 - mean**2).clamp(min=0).sqrt()
    return mean.float().view(-1, 1, 1), std.clamp(min=1e-3).float().view(-1, 1, 1)
