"""A federation's work as a file, and what a worker answers: ours and the peers' read the same.

Nothing but torch and numpy is imported: every peer has an environment of its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from small_models import MODELS
from torch import Tensor, nn


@dataclass(frozen=True)
class Settings:
    """What a job says beside its arrays.

    Args:
        model: of ``small_models.MODELS``; lr: of clients' plain SGD; the server takes the mean.
        samples: of each client; batch: of a step; processes: that share a round's clients.
        clock: ``"wall"`` or ``"cpu"``, by which laps are counted; channels_last: everybody's model is laid out so.
    """

    model: str
    lr: float
    samples: int
    batch: int
    processes: int = 1
    clock: str = "wall"
    channels_last: bool = False


@dataclass(frozen=True)
class Job:
    """FedAvg over clients of equally many pictures.

    Args:
        images: (N, 3, 32, 32), uint8 or float32; client c has the rows from c · samples on, in the order in which it takes them.
        labels: (N,), int64.
        cohorts: (rounds, clients a round), by number.
        weights: the model's first, by name.
    """

    settings: Settings
    images: Tensor
    labels: Tensor
    cohorts: Tensor
    weights: Mapping[str, Tensor]

    @property
    def num_clients(self) -> int:
        return len(self.labels) // self.settings.samples

    @property
    def steps(self) -> int:
        """Of a visit."""
        return -(-self.settings.samples // self.settings.batch)

    def client(self, number: int) -> tuple[Tensor, Tensor]:
        """Its images as the model takes them, (samples, 3, 32, 32), and labels: made anew at every call, as cheap as it is."""
        rows = slice(number * self.settings.samples, (number + 1) * self.settings.samples)
        return as_input(self.images[rows]), self.labels[rows]

    def batches(self, number: int) -> list[tuple[Tensor, Tensor]]:
        """The client's steps."""
        images, labels = self.client(number)
        return list(zip(images.split(self.settings.batch), labels.split(self.settings.batch)))

    def model(self) -> nn.Module:
        """With its first weights."""
        model = MODELS[self.settings.model]()
        model.load_state_dict(dict(self.weights))
        return model.to(memory_format=torch.channels_last) if self.settings.channels_last else model

    def save(self, path: Path) -> None:
        weights = {f"weights.{name}": value.numpy() for name, value in self.weights.items()}
        own = {"images": self.images.numpy(), "labels": self.labels.numpy(), "cohorts": self.cohorts.numpy()}
        np.savez(path, settings=np.array(json.dumps(asdict(self.settings))), **own, **weights)

    @classmethod
    def load(cls, path: str | Path) -> Job:
        with np.load(path) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "settings"}
            settings = Settings(**json.loads(str(file["settings"])))
        weights = {name.removeprefix("weights."): value for name, value in arrays.items() if name.startswith("weights.")}
        return cls(settings, arrays["images"], arrays["labels"], arrays["cohorts"], weights)


def as_input(images: Tensor) -> Tensor:
    """Pictures of bytes from -1 to 1; float ones as they are."""
    return images.float().div_(127.5).sub_(1) if images.dtype == torch.uint8 else images


class Laps:
    """A worker's answer: when each round ended, by the job's clock, and how much memory its processes took.

    The clock of ``"cpu"`` and memory are of this process and all that descend from it (read off /proc, in steps of 10 ms).
    """

    def __init__(self, settings: Settings) -> None:
        self._clock = {"wall": time.perf_counter, "cpu": processor_time}[settings.clock]
        self.at = [self._clock()]
        self.mib = 0.0

    def lap(self) -> None:
        self.at.append(self._clock())
        self.mib = max(self.mib, peak_mib())

    def write(self, path: str, weights: Mapping[str, Tensor] | Sequence[Tensor]) -> None:
        values = weights.values() if isinstance(weights, Mapping) else weights
        numbered = {f"{place:03d}": value.detach().cpu().numpy() for place, value in enumerate(values)}
        np.savez(path, at=np.array(self.at), mib=np.array(self.mib), **numbered)


def family() -> list[Path]:
    """The folders in /proc of this process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (stat := _text(folder / "stat")):
            children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(folder.name))
    found = [os.getpid()]
    for process in found:
        found += children.get(process, [])
    return [Path("/proc", str(process)) for process in found]


def processor_time() -> float:
    """Seconds of this process and its descendants, those that have ended and were waited for among them."""
    ticks = 0
    for folder in family()[1:]:
        if stat := _text(folder / "stat"):
            ticks += sum(map(int, stat.rpartition(")")[2].split()[11:15]))
    own = os.times()
    return time.process_time() + own.children_user + own.children_system + ticks / os.sysconf("SC_CLK_TCK")


def peak_mib() -> float:
    """Peak resident memory of this process and its descendants that are alive, added up; what they share counts in each."""
    kib = 0
    for folder in family():
        lines = [line for line in _text(folder / "status").splitlines() if line.startswith("VmHWM")]
        kib += sum(int(line.split()[1]) for line in lines)
    return kib / 1024


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it ended meanwhile
        return ""


def arguments() -> tuple[Job, str]:
    """Of a worker's command line: the job, and where its answer goes."""
    torch.set_num_threads(1)
    return Job.load(sys.argv[1]), sys.argv[2]
