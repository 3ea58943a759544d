"""Each transform's distribution, ours in batches against lightly's image by image, read off pictures made so that it can be.

A picture of one colour shows by what factor its brightness was changed, a slope where and how large it was cut, a line how far it was
blurred. 20,000 views of ours and 3,000 to 10,000 of lightly's, which are slow, are compared by Kolmogorov's and Smirnov's two-sample
test; small shifts of every setting are shown to be found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from featherlight.ssl_models import augment
from featherlight.ssl_models.augment import Augmentation, _blur
from featherlight.ssl_models.views import Views, _own_randomness, by_lightly

N = 20_000
STILL = Augmentation(min_scale=1.0, flip=0.0, jitter=0.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, grayscale=0.0, blur=0.0)


class Reading(NamedTuple):
    """A transform by itself, which of lightly's steps it is, how many views those make, a picture that shows it, and what is read.

    Levels 0 to 255 of views, (N, C, H, W), are read into values by name; where PIL is coarse, ours are said in its terms.
    """

    augmentation: Augmentation
    steps: tuple[str, ...]
    views: int
    picture: Tensor
    read: Callable[[Tensor], dict[str, Tensor]]
    ours: Callable[[Tensor], dict[str, Tensor]] | None = None


def of_colour(*colour: int) -> Tensor:
    return torch.tensor(colour, dtype=torch.uint8).view(-1, 1, 1).expand(-1, 4, 4)


# -- what pictures show -----------------------------------------------------------------------------------------------
SLOPE = (4 * (torch.arange(32)[:, None] + torch.arange(32))).to(torch.uint8)[None]
"""Levels rise by 4 a pixel, to the right and down."""


def cuts(levels: Tensor) -> dict[str, Tensor]:
    """A cut of w pixels that is stretched to 32 rises by 4 · w / 32 a pixel: by 3w in 24, away from edges; mirrored, it falls."""
    across = (levels[:, 0, 4:28, 28] - levels[:, 0, 4:28, 4]).mean(1) / 3
    down = (levels[:, 0, 28, 4:28] - levels[:, 0, 4, 4:28]).mean(1) / 3
    width, height = across.abs().round(), down.round()
    whole = {"area": width * height, "ratio": width / height, "place": (levels.mean((1, 2, 3)) / 2).round()}
    return {**whole, "mirrored": across < 0}


def brightness(levels: Tensor) -> dict[str, Tensor]:
    factor = levels[:, 0, 0, 0] / 180
    return {"changed": factor != 1, "factor": factor[factor != 1]}


def contrast(levels: Tensor) -> dict[str, Tensor]:
    return {"factor": (levels[:, 0, 0, 3] - levels[:, 0, 0, 0]) / 140}


def saturation(levels: Tensor) -> dict[str, Tensor]:
    return {"factor": (levels.amax(1) - levels.amin(1))[:, 0, 0] / 140}


RED = of_colour(220, 20, 20)


def hue(levels: Tensor) -> dict[str, Tensor]:
    """Of red, turned by less than a sixth: to green or to blue."""
    red, green, blue = levels[:, :, 0, 0].unbind(1)
    return {"shift": (green - blue) / (red - torch.minimum(green, blue)) / 6}


def hue_of_ours(levels: Tensor) -> dict[str, Tensor]:
    """PIL turns in 255 whole steps: ours is said as what PIL makes of a turn so far."""
    found = hue(levels)
    shifts = torch.linspace(-0.15, 0.15, 3001)
    red = Image.fromarray(RED[:, :1, :1].permute(1, 2, 0).contiguous().numpy())
    turned = torch.stack([torch.from_numpy(np.array(F.adjust_hue(red, float(shift)))) for shift in shifts]).permute(0, 3, 1, 2)
    return {"shift": hue(turned.float())["shift"][((found["shift"] + 0.15) * 10_000).round().long()]}


def switches(levels: Tensor) -> dict[str, Tensor]:
    """Every level is above 127 unless inverted, and no two channels are equal unless grey."""
    top, bottom = levels.amax(1)[:, 0, 0], levels.amin(1)[:, 0, 0]
    return {"grey": top - bottom < 1, "solarised": top < 128}


LINE = torch.zeros(1, 17, 17, dtype=torch.uint8)
LINE[:, :, 8] = 255


def blur(levels: Tensor) -> dict[str, Tensor]:
    """The wider a blur, the flatter a line's profile; widths under 0.4 leave it nearly as it is, and are not counted as blurred."""
    sharpness = (levels[:, 0, 8] / 255).square().sum(1)
    blurred = sharpness < sharpness_of_pil()[30]
    return {"blurred": blurred, "sharpness": sharpness[blurred]}


SIGMAS = torch.linspace(0.1, 2.2, 211)


@cache
def sharpness_of_pil() -> Tensor:
    line = Image.fromarray(LINE[0].numpy())
    made = [np.asarray(line.filter(ImageFilter.GaussianBlur(float(sigma))))[8] for sigma in SIGMAS]
    return torch.from_numpy(np.stack(made) / 255).square().sum(1).float()


def blur_of_ours(levels: Tensor) -> dict[str, Tensor]:
    """The width is read off our own blurs of known widths, and said as what PIL makes of that width."""
    own = _blur((LINE.float() / 255).expand(len(SIGMAS), -1, -1, -1), SIGMAS.view(-1, 1, 1, 1))[:, 0, 8].square().sum(1)
    found = (levels[:, 0, 8] / 255).square().sum(1)
    sigma = np.interp(-found.numpy(), -own.numpy(), SIGMAS.numpy())
    sharpness = torch.from_numpy(np.interp(sigma, SIGMAS.numpy(), sharpness_of_pil().numpy()))
    blurred = sharpness < sharpness_of_pil()[30]
    return {"blurred": blurred, "sharpness": sharpness[blurred]}


JITTER = ("RandomApply",)
HALVES = torch.tensor([50, 50, 190, 190], dtype=torch.uint8).expand(3, 4, 4)
READINGS = {
    "cut": Reading(replace(STILL, min_scale=0.08, flip=0.5), ("RandomResizedCrop", "RandomHorizontalFlip"), 5000, SLOPE, cuts),
    "brightness": Reading(replace(STILL, jitter=0.8, brightness=0.4), JITTER, 5000, of_colour(180, 180, 180), brightness),
    "contrast": Reading(replace(STILL, jitter=1.0, contrast=0.4), JITTER, 3000, HALVES, contrast),
    "saturation": Reading(replace(STILL, jitter=1.0, saturation=0.4), JITTER, 3000, of_colour(200, 60, 130), saturation),
    "hue": Reading(replace(STILL, jitter=1.0, hue=0.1), JITTER, 3000, RED, hue, ours=hue_of_ours),
    "switches": Reading(
        replace(STILL, grayscale=0.2, solarise=0.2), ("RandomGrayscale", "RandomSolarization"), 5000, of_colour(250, 140, 200), switches
    ),
    "blur": Reading(replace(STILL, blur=0.5), ("GaussianBlur",), 10_000, LINE, blur, ours=blur_of_ours),
}


# -- views of both, and how far apart they are ------------------------------------------------------------------------
def ours(name: str, **changes: float) -> dict[str, Tensor]:
    """What is read off N of our views, half of them first and half second ones."""
    reading = READINGS[name]
    views = Views(tuple(reading.picture.shape), 2, first=replace(reading.augmentation, **changes))  # type: ignore[arg-type]
    made = []
    for seed in range(N // 4000):
        made += views.batched(reading.picture.expand(2000, -1, -1, -1), torch.arange(2000), 2000, seed)
    return (reading.ours or reading.read)((torch.cat(made) * 255).round())


@cache
def lightlys(name: str) -> dict[str, Tensor]:
    """What is read off lightly's views; of its transform, only the steps that do anything here are done."""
    reading = READINGS[name]
    transform = by_lightly(reading.augmentation, tuple(reading.picture.shape))  # type: ignore[arg-type]
    steps = [step for step in transform.transform.transforms if type(step).__name__ in reading.steps]  # type: ignore[attr-defined]
    assert len(steps) == len(reading.steps)
    picture, made = Image.fromarray(reading.picture.permute(1, 2, 0).squeeze(2).contiguous().numpy()), []
    with _own_randomness() as start:
        start(4)
        for _ in range(reading.views):
            view = picture
            for step in steps:
                view = step(view)
            made.append(np.asarray(view))
    return reading.read(torch.from_numpy(np.stack(made)).view(reading.views, *view.size[::-1], -1).permute(0, 3, 1, 2).float())


def apart(one: Tensor, other: Tensor) -> float:
    """Largest gap between two distribution functions, in units of what samples of one distribution exceed once in 1000 times.

    That is 1.95 · sqrt(1/n + 1/m) (Smirnov): 0.038 for 20,000 and 3,000 views, 0.031 with 5,000, 0.024 with 10,000.
    """
    at = torch.cat([one, other]).double().unique()
    below = [torch.searchsorted(x.double().sort().values, at, right=True) / len(x) for x in (one, other)]
    return float((below[0] - below[1]).abs().max()) / (1.95 * (1 / len(one) + 1 / len(other)) ** 0.5)


@pytest.mark.parametrize("name", READINGS)
def test_each_transform_is_distributed_as_lightlys(name: str) -> None:
    found = ours(name)
    assert {statistic: round(apart(values, lightlys(name)[statistic]), 2) for statistic, values in found.items()} == pytest.approx(
        dict.fromkeys(found, 0.0), abs=1.0
    )


SHIFTS: list[tuple[str, str, dict[str, float]]] = [
    ("cut", "area", {"min_scale": 0.12}),
    ("cut", "mirrored", {"flip": 0.45}),
    ("brightness", "changed", {"jitter": 0.75}),
    ("brightness", "factor", {"brightness": 0.35}),  # strength 0.8 → 0.7, as of all four
    ("contrast", "factor", {"contrast": 0.35}),
    ("saturation", "factor", {"saturation": 0.35}),
    ("hue", "shift", {"hue": 0.0875}),
    ("switches", "grey", {"grayscale": 0.15}),
    ("switches", "solarised", {"solarise": 0.15}),
    ("blur", "blurred", {"blur": 0.45}),
    ("blur", "sharpness", {"sigma_max": 1.8}),
    ("blur", "blurred", {"sigma_min": 0.3}),  # fewer blurs too narrow to be seen
]


@pytest.mark.parametrize(("name", "statistic", "shift"), SHIFTS, ids=lambda value: str(value))
def test_a_small_shift_is_found(name: str, statistic: str, shift: dict[str, float]) -> None:
    assert apart(ours(name, **shift)[statistic], lightlys(name)[statistic]) > 1


def test_another_range_of_ratios_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "RATIO", (4 / 5, 5 / 4))
    assert apart(ours("cut")["ratio"], lightlys("cut")["ratio"]) > 1


def test_cuts_from_the_middle_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def middle(*arguments: object) -> tuple[Tensor, ...]:
        _, _, height, width = crops(*arguments)
        return (32 - height) // 2, (32 - width) // 2, height, width

    crops = augment._crops
    monkeypatch.setattr(augment, "_crops", middle)
    assert apart(ours("cut")["place"], lightlys("cut")["place"]) > 1


def test_every_setting_is_shifted_by_some_test() -> None:
    shifted = {setting for _, _, shift in SHIFTS for setting in shift}
    assert shifted == set(vars(Augmentation()))


def test_all_orders_of_the_four_colour_changes_are_equally_likely() -> None:
    draws = augment.draw(Augmentation(), (3, 32, 32), N, torch.Generator().manual_seed(0))
    counts = (draws.order @ torch.tensor([64, 16, 4, 1])).unique(return_counts=True)[1].double()
    assert len(counts) == 24
    # Chi-squared of 23 degrees of freedom is above 49.7 once in 1000 times.
    assert float(((counts - N / 24) ** 2 / (N / 24)).sum()) < 49.7
