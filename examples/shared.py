"""What the examples share: pictures from this machine, and a table of what training a module costs as it is, and with each callback."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder

from featherlight.callbacks import CostMonitor
from featherlight.plugins.cost_table import readable

Ways = dict[str, Callable[[], list[L.Callback]]]
"""Name of a way to train → the callbacks that make it."""


def arguments(what: str, epochs: int, **defaults: Any) -> argparse.Namespace:
    """The command line that all examples have: few steps by default, so that a look costs seconds."""
    parser = argparse.ArgumentParser(description=what.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="folder of CLASS/*.png and so on; None: scikit-learn's digits")
    parser.add_argument("--image_size", type=int, default=defaults.get("image_size", 64), help="pixels")
    parser.add_argument("--batch_size", type=int, default=defaults.get("batch_size", 16))
    parser.add_argument("--steps", type=int, default=2, help="batches of an epoch; -1: all")
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--ways", nargs="*", default=None, help="train in these ways only; None: all")
    parser.add_argument("--accelerator", default="auto")
    for name, value in defaults.items():
        if name not in ("image_size", "batch_size"):
            parser.add_argument(f"--{name}", type=type(value), default=value)
    return parser.parse_args()


class _Digits(Dataset[Any]):
    """scikit-learn's 1,797 digits as RGB pictures of PIL."""

    def __init__(self, transform: Callable[[Any], Any]) -> None:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        self.pictures = [Image.fromarray((one * 15).astype(np.uint8)).convert("RGB") for one in bunch.images]
        self.labels, self.classes, self.transform = bunch.target.tolist(), list(range(10)), transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.pictures[index]), self.labels[index]


def pictures(options: argparse.Namespace, transform: Callable[[Any], Any]) -> tuple[DataLoader[Any], int]:
    """Batches of ``(transform(picture), label)``, and how many classes there are."""
    data: Any = _Digits(transform) if options.data is None else ImageFolder(options.data, transform)
    used = range(len(data)) if options.steps < 0 else range(min(len(data), options.steps * options.batch_size))
    return DataLoader(Subset(data, used), options.batch_size, shuffle=True, drop_last=True), len(data.classes)


def compare(module: Callable[[], L.LightningModule], loader: DataLoader[Any], ways: Ways, options: argparse.Namespace) -> dict[str, Any]:
    """Train a new module in each way, and print what a step holds and what a run computes, and how many times less that is.

    Returns:
        For each way its :class:`CostMonitor`'s total, and ``mean_saved_bytes``, over its stages.
    """
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    totals: dict[str, Any] = {}
    for name, callbacks in {"as it is": list, **ways}.items():
        if options.ways is not None and name not in ("as it is", *options.ways):
            continue
        L.seed_everything(0, verbose=False)
        monitor = CostMonitor(show=False)
        quiet: dict[str, Any] = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        trainer = L.Trainer(max_epochs=options.epochs, accelerator=options.accelerator, callbacks=[*callbacks(), monitor], **quiet)
        trainer.fit(module(), loader)
        stages = monitor.table.rows()
        mean = sum(row["rounds"] * row["saved_bytes"] for row in stages) / sum(row["rounds"] for row in stages)
        totals[name] = {**monitor.table.total(), "mean_saved_bytes": mean}
    _show(totals)
    return totals


def _show(totals: dict[str, Any]) -> None:
    """Saved for backward: the mean over stages and the largest; the others are the run's largest, or its sum."""
    columns = {
        "trained at once": lambda t: ("params_trained", t["params_trained"]),
        "saved, mean": lambda t: ("saved_bytes", t["mean_saved_bytes"]),
        "saved, most": lambda t: ("saved_bytes", t["saved_bytes"]),
        "peak": lambda t: ("peak_bytes", t["peak_bytes"]),
        "FLOPs": lambda t: ("flops_forward", t["flops_forward"] + t["flops_backward"]),
    }
    width = max(map(len, totals))
    print(" " * width, *(f"{heading:>20}" for heading in columns))
    whole = totals["as it is"]
    for name, total in totals.items():
        cells = []
        for column in columns.values():
            what, value = column(total)
            cells.append(
                f"{readable(what, value)} ({column(whole)[1] / max(value, 1):.1f}x less)" if total is not whole else readable(what, value)
            )
        print(f"{name:<{width}}", *(f"{cell:>20}" for cell in cells))


def tensor(image: Any, size: int) -> Tensor:
    """A PIL picture as a tensor (3, size, size) in [−1, 1]."""
    pixels = torch.from_numpy(np.array(image.convert("RGB").resize((size, size)), dtype=np.float32))
    return pixels.permute(2, 0, 1) / 127.5 - 1
