"""How many images a second get their two views: our batched pipeline, lightly's transforms image by image, and kornia where it is there.

    python benchmarks/augmentation.py                  32 and 96 pixels, batch 256, one thread
    python benchmarks/augmentation.py --threads 4      torch's threads in this process; a loader's workers have one each
    python benchmarks/augmentation.py --clock cpu      by processor time: on a machine that has other work to do

All make MoCo v2's two views (arXiv 2003.04297) of the same random pictures, from uint8 to float in [0, 1], not normalised. lightly's run
in a DataLoader, in this process and in one or two workers, pictures decoded already. Every figure is the median of several runs, taken in
turn so that a machine's other work falls on all alike; a ratio is ours over that one's.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from PIL import Image
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from featherlight.ssl_models.augment import Augmentation, suited
from featherlight.ssl_models.views import Views, by_lightly

Run = Callable[[int], int]
"""Make the views of so many batches; gives the number of images."""


def batched(pictures: Tensor, augmentation: Augmentation) -> Run:
    views = Views(tuple(pictures.shape[1:]), 2, first=augmentation)  # type: ignore[arg-type]
    places = torch.arange(len(pictures))

    def run(batches: int) -> int:
        return sum(len(views.batched(pictures, places, len(places), seed)[0]) for seed in range(batches))

    return run


class TwoViews(Dataset[tuple[Tensor, Tensor]]):
    """lightly's two views of PIL pictures, which come round again ``batches`` times."""

    def __init__(self, pictures: Tensor, augmentation: Augmentation) -> None:
        self.pictures = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]
        self.transform = by_lightly(augmentation, tuple(pictures.shape[1:]))  # type: ignore[arg-type]
        self.batches = 1

    def __len__(self) -> int:
        return self.batches * len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        picture = self.pictures[index % len(self.pictures)]
        return self.transform(picture), self.transform(picture)


def in_loader(pictures: Tensor, augmentation: Augmentation, workers: int) -> Run:
    data = TwoViews(pictures, augmentation)

    def run(batches: int) -> int:
        data.batches = batches  # workers are started in every run, and take the data set as it is then
        return sum(len(first) for first, _ in DataLoader(data, len(pictures), num_workers=workers))

    return run


def by_kornia(pictures: Tensor, augmentation: Augmentation) -> Run | None:
    try:
        import kornia.augmentation as K
    except ImportError:
        return None
    a, size = augmentation, (pictures.shape[2], pictures.shape[3])
    steps = [
        K.RandomResizedCrop(size, scale=(a.min_scale, 1.0), p=1.0),
        K.RandomHorizontalFlip(p=a.flip),
        K.ColorJitter(a.brightness, a.contrast, a.saturation, a.hue, p=a.jitter),
        K.RandomGrayscale(p=a.grayscale),
    ]
    if a.blur:
        kernel = (size[0] // 10 | 1, size[1] // 10 | 1)  # SimCLR's: a tenth of the image, odd
        steps.append(K.RandomGaussianBlur(kernel, (a.sigma_min, a.sigma_max), p=a.blur))
    pipeline = torch.nn.Sequential(*steps)

    def run(batches: int) -> int:
        done = 0
        for _ in range(batches):
            images = pictures.float() / 255
            done += len(pipeline(images))
            pipeline(images)
        return done

    return run


def ways(size: int, batch: int) -> dict[str, Run | None]:
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, 8, 8, generator=random)
    pictures = (torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1) * 255).round().to(torch.uint8)
    augmentation = suited((3, size, size))
    return {
        "ours, whole batches": batched(pictures, augmentation),
        "lightly, image by image, workers=0": in_loader(pictures, augmentation, 0),
        "lightly, image by image, workers=1": in_loader(pictures, augmentation, 1),
        "lightly, image by image, workers=2": in_loader(pictures, augmentation, 2),
        "kornia, whole batches": by_kornia(pictures, augmentation),
    }


def computed() -> float:
    """Seconds of processor time so far, of this process and of those that it has waited for."""
    return sum(os.times()[:4])


CLOCKS = {"wall": perf_counter, "cpu": computed}


def measure(
    sizes: list[int], batch: int, batches: int, runs: int, clock: Callable[[], float], console: Console
) -> dict[int, dict[str, list[float]]]:
    """Images a second of every run, by size and way; a first run of each is not counted."""
    by_size = {size: {name: run for name, run in ways(size, batch).items() if run is not None} for size in sizes}
    found: dict[int, dict[str, list[float]]] = {size: {name: [] for name in all_ways} for size, all_ways in by_size.items()}
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("runs", total=sum(len(all_ways) for all_ways in by_size.values()) * (runs + 1))
        for size, all_ways in by_size.items():
            for number in range(runs + 1):
                for name, run in all_ways.items():
                    bar.update(task, description=f"{size} pixels: {name}")
                    start = clock()
                    made = run(batches if number else 1)
                    if number:
                        found[size][name].append(made / (clock() - start))
                    bar.advance(task)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="torch's threads in this process")
    parser.add_argument("--runs", type=int, default=5, help="runs of each, of which the median is told")
    parser.add_argument("--batch", type=int, default=256, help="images of a batch")
    parser.add_argument("--batches", type=int, default=4, help="batches of a run")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 96], help="pixels each way")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, workers' too: what a core does")
    options = parser.parse_args()
    for name in ("threads", "runs", "batch", "batches"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: it must be at least 1")
    torch.set_num_threads(options.threads)
    found = measure(options.sizes, options.batch, options.batches, options.runs, CLOCKS[options.clock], Console(stderr=True))
    console = Console(width=110)
    for size, speeds in found.items():
        table = Table(title=f"two views of {size}-pixel colour images, batch {options.batch}: images a second ({options.clock} time)")
        for heading in ("", "median", "slowest", "fastest", "ours over this"):
            table.add_column(heading, justify="left" if not heading else "right")
        first = median(next(iter(speeds.values())))
        for name, figures in speeds.items():
            middle = median(figures)
            table.add_row(name, f"{middle:.0f}", f"{min(figures):.0f}", f"{max(figures):.0f}", f"{first / middle:.2f}")
        console.print(table)
        if "kornia, whole batches" not in speeds:
            console.print("kornia is not installed, so it was not measured")
    machine = platform.processor() or platform.machine()
    console.print(f"torch {torch.__version__} on {machine}; threads {options.threads}, runs {options.runs} of {options.batches} batches")


if __name__ == "__main__":
    main()
