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

from featherlight.callbacks import CostMonitor, PluginCallback
from featherlight.callbacks.host import common_seed
from featherlight.plugins import Chain, Visit, find_targets, trained
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


class _Sent(L.Callback):
    """What a federation's client would send after each epoch: the entries that trained, as the methods encode them."""

    def __init__(self) -> None:
        self.bytes = 0
        self._targets: tuple[str, ...] = ()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._targets = tuple(find_targets(pl_module))  # momentum copies are never sent

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        chain = Chain(callback.plugin for callback in trainer.callbacks if isinstance(callback, PluginCallback))
        entries = {name: value.detach() for name, value in trained(pl_module, self._targets).items()}
        message = chain.encode(entries, Visit(trainer.current_epoch, 0, common_seed(trainer)))
        self.bytes += sum(value.numel() * value.element_size() for value in message.values())


def compare(module: Callable[[], L.LightningModule], loader: DataLoader[Any], ways: Ways, options: argparse.Namespace) -> dict[str, Any]:
    """Train a new module in each way, and print what a step holds and what a run computes, and how many times less that is.

    Returns:
        For each way its :class:`CostMonitor`'s total, ``mean_saved_bytes``, over its stages, and as ``bytes_up`` what a federation's
        client would have sent after each epoch, in all.
    """
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    totals: dict[str, Any] = {}
    for name, callbacks in {"as it is": list, **ways}.items():
        if options.ways is not None and name not in ("as it is", *options.ways):
            continue
        L.seed_everything(0, verbose=False)
        monitor, sent = CostMonitor(show=False), _Sent()
        quiet: dict[str, Any] = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        trainer = L.Trainer(max_epochs=options.epochs, accelerator=options.accelerator, callbacks=[*callbacks(), monitor, sent], **quiet)
        trainer.fit(module(), loader)
        stages = monitor.table.rows()
        mean = sum(row["rounds"] * row["saved_bytes"] for row in stages) / sum(row["rounds"] for row in stages)
        totals[name] = {**monitor.table.total(), "mean_saved_bytes": mean, "bytes_up": sent.bytes}
    _show(totals)
    return totals


def _show(totals: dict[str, Any]) -> None:
    """Saved for backward: the mean over stages and the largest; the others are the run's largest, or its sum.

    Would send: what a client of a federation would, were an epoch its turn.
    """
    columns = {
        "trained at once": lambda t: ("params_trained", t["params_trained"]),
        "saved, mean": lambda t: ("saved_bytes", t["mean_saved_bytes"]),
        "saved, most": lambda t: ("saved_bytes", t["saved_bytes"]),
        "peak": lambda t: ("peak_bytes", t["peak_bytes"]),
        "FLOPs": lambda t: ("flops_forward", t["flops_forward"] + t["flops_backward"]),
        "would send": lambda t: ("bytes_up", t["bytes_up"]),
    }
    width = max(map(len, totals))
    print(" " * width, *(f"{heading:>20}" for heading in columns))
    whole = totals["as it is"]
    for name, total in totals.items():
        cells = []
        for column in columns.values():
            what, value = column(total)
            cells.append(readable(what, value) + (f" ({_beside(value, column(whole)[1])})" if total is not whole else ""))
        print(f"{name:<{width}}", *(f"{cell:>20}" for cell in cells))


def _beside(value: float, whole: float) -> str:
    """``2.0x less`` of half as much."""
    times = whole / max(value, 1)
    if abs(times - 1) < 0.05:
        return "the same"
    return f"{times:.1f}x less" if times > 1 else f"{1 / times:.1f}x more"


def tensor(image: Any, size: int) -> Tensor:
    """A PIL picture as a tensor (3, size, size) in [−1, 1]."""
    pixels = torch.from_numpy(np.array(image.convert("RGB").resize((size, size)), dtype=np.float32))
    return pixels.permute(2, 0, 1) / 127.5 - 1
