"""Batched augmentation against torchvision's and lightly's: operation by operation, and in distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from featherlight.ssl_models.augment import Augmentation, Draws, _crops, apply, draw, suited
from featherlight.ssl_models.batches import Draw
from featherlight.ssl_models.views import Views, pad_crop_flip

STILL = Augmentation(min_scale=1.0, flip=0.0, jitter=0.0, grayscale=0.0, blur=0.0, solarise=0.0)


def pictures(count: int, channels: int = 3, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    """Smooth random pictures, uint8."""
    coarse = torch.rand(count, channels, 5, 5, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return (fine * 255).round().to(torch.uint8)


def drawn(augmentation: Augmentation, images: Tensor, seed: int = 0) -> Draws:
    return draw(augmentation, tuple(images.shape[1:]), len(images), torch.Generator().manual_seed(seed))  # type: ignore[arg-type]


def one_by_one(images: Tensor, draws: Draws) -> Tensor:
    """The same augmentation, a picture at a time, by torchvision on floats (no blur)."""
    made = []
    for at, image in enumerate(images.float() / 255):
        d = Draws(*(values[at] for values in draws))
        x = F.resized_crop(image, int(d.top), int(d.left), int(d.height), int(d.width), list(image.shape[1:]), antialias=True)
        x = F.horizontal_flip(x) if d.flip else x
        if d.jitter:
            for number in d.order.tolist():
                change = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)[number]
                x = change(x, float(d.factors[number]))
        x = F.rgb_to_grayscale(x, 3) if d.grayscale and len(x) == 3 else x
        x = F.solarize(x, 128 / 255) if d.solarise else x
        made.append(x)
    return torch.stack(made)


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 24, 40), (1, 8, 8)])
def test_a_batch_is_what_torchvision_makes_picture_by_picture(shape: tuple[int, int, int]) -> None:
    images = pictures(64, *shape)
    draws = drawn(Augmentation(blur=0.0, solarise=0.3), images)
    if shape[0] == 1:  # torchvision refuses saturation and hue of nothing but grey: they change nothing there
        draws.factors[:, 2:] = torch.tensor([1.0, 0.0])
    expected = one_by_one(images, draws)
    # torchvision's red weighs 0.2989, PIL's and ours 0.299. Solarisation jumps at 128/255, where rounding decides: one pixel in 10,000.
    difference = (apply(images, draws) - expected).abs()
    assert (difference > 5e-4).double().mean() < 1e-4


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_blur_is_pils_to_two_levels(sigma: float) -> None:
    images = pictures(8)
    draws = drawn(Augmentation(min_scale=1.0, flip=0, jitter=0, grayscale=0, blur=1.0, sigma_min=sigma, sigma_max=sigma), images)
    ours = (apply(images, whole(draws)) * 255).permute(0, 2, 3, 1).numpy()
    for image, made in zip(images, ours, strict=True):
        theirs = np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(sigma)), dtype=float)
        assert np.abs(made - theirs).mean() < 1
        assert np.abs(made - theirs).max() < 4


def whole(draws: Draws) -> Draws:
    """The same draws without a crop, of 32-pixel pictures."""
    none = torch.zeros_like(draws.top)
    return draws._replace(top=none, left=none, height=none + 32, width=none + 32)


def test_solarisation_is_pils() -> None:
    images = pictures(4)
    draws = whole(drawn(Augmentation(flip=0, jitter=0, grayscale=0, blur=0, solarise=1.0), images))
    ours = (apply(images, draws) * 255).round().to(torch.uint8)
    for image, made in zip(images, ours, strict=True):
        theirs = ImageOps.solarize(Image.fromarray(image.permute(1, 2, 0).numpy()), 128)
        assert np.array_equal(made.permute(1, 2, 0).numpy(), np.asarray(theirs))


def test_nothing_asked_nothing_done() -> None:
    images = pictures(6)
    draws = whole(drawn(STILL, images))
    assert torch.allclose(apply(images, draws), images.float() / 255, atol=1e-6)
    assert torch.allclose(apply(images, draws._replace(flip=~draws.flip)), images.flip(3).float() / 255, atol=1e-6)


def distance(a: Tensor, b: Tensor) -> float:
    """Kolmogorov's: the largest gap between two distribution functions."""
    at = torch.cat([a, b]).double().sort().values
    below = [torch.searchsorted(x.double().sort().values, at, right=True) / len(x) for x in (a, b)]
    return float((below[0] - below[1]).abs().max())


@pytest.mark.parametrize(("height", "width", "scale"), [(32, 32, 0.2), (8, 8, 0.08), (20, 60, 0.5)])
def test_crops_are_distributed_as_torchvisions(height: int, width: int, scale: float) -> None:
    count = 3000
    ours = _crops(scale, height, width, count, torch.Generator().manual_seed(0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transform = RandomResizedCrop((height, width), scale=(scale, 1.0))
        image = torch.zeros(1, height, width)
        theirs = [transform.make_params([image]) for _ in range(count)]
    for mine, name in zip(ours, ("top", "left", "height", "width"), strict=True):
        # Two samples of one distribution are this far apart once in 1000 times: 1.95 · sqrt(2 / 3000).
        assert distance(mine, torch.tensor([crop[name] for crop in theirs])) < 0.051, name
    assert bool((ours[0] >= 0).all() and (ours[0] + ours[2] <= height).all())
    assert bool((ours[1] >= 0).all() and (ours[1] + ours[3] <= width).all())


@pytest.fixture(scope="module")
def both() -> dict[str, tuple[Tensor, Tensor]]:
    """1000 views of one colourful picture by each implementation, and 1000 without crop, jitter or blur."""
    image = pictures(1, seed=5)
    found = {}
    for name, augmentation in (("all", Augmentation(solarise=0.2)), ("flips", Augmentation(min_scale=1.0, jitter=0.0, blur=0.0))):
        views = Views((3, 32, 32), 2, first=augmentation)
        many = image.expand(500, -1, -1, -1)
        places = torch.arange(500)
        found[name] = (
            torch.cat(views.batched(many, places, 500, seed=1)),
            torch.cat(views.in_loader(many, Draw(places, places, 500, seed=1))),
        )
    return found


def test_both_implementations_agree_in_distribution(both: dict[str, tuple[Tensor, Tensor]]) -> None:
    ours, lightlys = both["all"]
    channels = lambda x: torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)  # noqa: E731
    # Standard error of a mean over 1000 views, of either, is sd / sqrt(1000); 4 of the difference's.
    error = 4 * (channels(ours).var(0) / 1000 + channels(lightlys).var(0) / 1000).sqrt()
    assert ((channels(ours).mean(0) - channels(lightlys).mean(0)).abs() < error).all()
    critical = 1.95 * (2 / 1000) ** 0.5  # exceeded once in 1000 times by samples of one distribution
    roughness = lambda x: x.diff(dim=3).abs().mean((1, 2, 3))  # noqa: E731  what crop scale and blur decide
    contrast = lambda x: x.mean(1).std((1, 2))  # noqa: E731
    for statistic in (lambda x: x.mean((1, 2, 3)), contrast, roughness):
        assert distance(statistic(ours), statistic(lightlys)) < critical
    histograms = [torch.histc(x, 32, 0, 1) / x.numel() for x in (ours, lightlys)]
    assert float((histograms[0] - histograms[1]).abs().sum() / 2) < 0.04  # total variation over all pixels
    assert colourless(ours) == pytest.approx(0.2, abs=0.05)
    assert colourless(lightlys) == pytest.approx(0.2, abs=0.05)


def colourless(x: Tensor) -> float:
    """Part of the views that have no colour; 4 standard errors of 0.2 in 1000 are 0.05."""
    return float(((x.amax(1) - x.amin(1)).amax((1, 2)) < 1e-3).double().mean())


def test_both_mirror_half_of_the_views(both: dict[str, tuple[Tensor, Tensor]]) -> None:
    image = pictures(1, seed=5).float() / 255
    grey = lambda x: x.mean(1, keepdim=True)  # noqa: E731
    for views in both["flips"]:
        straight = (grey(views) - grey(image)).abs().mean((1, 2, 3))
        mirrored = (grey(views) - grey(image).flip(3)).abs().mean((1, 2, 3))
        assert float((mirrored < straight).double().mean()) == pytest.approx(0.5, abs=0.065)  # 4 standard errors


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("way", ["batched", "in_loader"])
def test_views_depend_on_the_seed_alone_and_any_part_of_a_batch_sees_its_own(count: int, way: str) -> None:
    images = pictures(12)
    views = Views((3, 32, 32), count)

    def made(places: Tensor, seed: int) -> Tensor:
        part = images[places]
        if way == "batched":
            return torch.stack([x.float() for x in views.batched(part, places, 12, seed)])
        return torch.stack(views.in_loader(part, Draw(places, places, 12, seed)))

    everything = torch.arange(12)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    whole = made(everything, seed=7)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    torch.rand(3)
    assert torch.equal(made(everything, seed=7), whole)
    assert not torch.equal(made(everything, seed=8), whole)
    odd = torch.arange(1, 12, 2)
    assert torch.allclose(made(odd, seed=7), whole[:, odd], atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.sampled_from([1, 3]), st.integers(1, 4), st.integers(0, 2**31))
def test_pad_crop_flip_is_a_loop_over_pictures(count: int, channels: int, pad: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, channels, 8, 6), generator=random, dtype=torch.uint8)
    down, right = torch.randint(2 * pad + 1, (2, count), generator=random)
    flip = torch.rand(count, generator=random) < 0.5
    made = pad_crop_flip(images, pad, down, right, flip)
    for at, image in enumerate(images):
        cut = torch.nn.functional.pad(image, (pad,) * 4)[:, down[at] : down[at] + 8, right[at] : right[at] + 6]
        assert torch.equal(made[at], cut.flip(2) if flip[at] else cut)


def test_supervised_views_are_all_the_cuts_equally_often_in_both_implementations() -> None:
    image = pictures(1, 1, 8, 8)
    cuts = torch.stack(
        [
            pad_crop_flip(image, 1, torch.tensor([down]), torch.tensor([right]), torch.tensor([flip]))[0]
            for down in range(3)
            for right in range(3)
            for flip in (False, True)
        ]
    ).flatten(1)
    views, places = Views((1, 8, 8), 1), torch.arange(900)
    many = image.expand(900, -1, -1, -1)
    batched = views.batched(many, places, 900, seed=0)[0]
    loaded = (views.in_loader(many, Draw(places, places, 900, 0))[0] * 255).round().to(torch.uint8)
    for made in (batched, loaded):
        same = (made.flatten(1)[:, None] == cuts[None]).all(2)
        assert (same.sum(1) == 1).all()
        # 900 views in 18 equally likely kinds: chi-squared of 17 degrees of freedom is above 40.8 once in 1000 times.
        assert float(((same.sum(0) - 50.0) ** 2 / 50).sum()) < 40.8


def test_what_suits_small_grey_and_unmirrored_pictures() -> None:
    assert suited((3, 224, 224)) == Augmentation()
    assert suited((3, 32, 32)) == Augmentation(blur=0.0)
    assert suited((1, 8, 8), mirrored=False) == Augmentation(flip=0.0, saturation=0.0, hue=0.0, grayscale=0.0, blur=0.0)
