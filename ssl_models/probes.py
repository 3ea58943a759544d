"""How good features are: nearest neighbours, a linear classifier, fine-tuning.

A probe is called with a module and data, and gives a score by name. It leaves the module's weights, its train and eval modes
and the global random stream as it found them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from featherlight.plugins.seeds import generator
from featherlight.ssl_models.views import pad_crop_flip

Loader = Iterable[Any]
"""Batches ``(x, labels)``, or with more behind them: ``(N, C, H, W)`` and ``(N,)``."""


class ProbeData(Protocol):
    """What a probe asks of data: a training and a test part without augmentation."""

    @property
    def num_classes(self) -> int: ...

    def probe_data(self) -> tuple[Loader, Loader]: ...


class Featurizer(Protocol):
    """What a probe asks of a module: ``features(x)``, ``(N, C, H, W)`` to ``(N, D)``."""

    def features(self, x: Tensor) -> Tensor: ...


class Probe:
    """A judge of features: called with a module and data, it gives figures by name. Configurations list them under ``probes``."""

    def __call__(self, module: nn.Module, data: ProbeData, device: torch.device | str | None = None) -> dict[str, float]:
        """``{name: figure}``."""
        raise NotImplementedError(f"{type(self).__name__} must say how it judges features")

    def check(self, data: ProbeData) -> None:
        """Find out before training what would stop this probe after it; no features are computed.

        Raises:
            ValueError: says what is missing.
        """
        data.probe_data()  # images that cannot be read and labels that are missing show here


@dataclass(frozen=True)
class KNN(Probe):
    """The share of test images whose class the weighted vote of their nearest training images names (arXiv 1805.01978).

    Args:
        k: neighbours that vote.
        temperature: T of a vote's weight, exp(cos / T).
        batch_size: test images compared at a time: ``batch_size × training images`` similarities are held.
    """

    k: int = 20
    temperature: float = 0.1
    batch_size: int = 512

    def __call__(self, module: nn.Module, data: ProbeData, device: torch.device | str | None = None) -> dict[str, float]:
        """``{"knn": accuracy}``.

        Raises:
            ValueError: fewer training images than neighbours.
        """
        from lightly.utils.benchmarking.knn import knn_predict

        with _set_aside(module):
            (bank, bank_labels), (queries, labels) = _both_parts(module, data, device)
        self._check_enough(len(bank))
        bank = normalize(bank, dim=1).T.contiguous()
        predicted = [
            knn_predict(chunk, bank, bank_labels, data.num_classes, self.k, self.temperature)[:, 0]
            for chunk in normalize(queries, dim=1).split(self.batch_size)
        ]
        return {"knn": _accuracy(torch.cat(predicted), labels, data.num_classes)}

    def check(self, data: ProbeData) -> None:
        """Count the training images, where their loader has a data set that knows how many there are.

        Raises:
            ValueError: fewer training images than neighbours.
        """
        train, _ = data.probe_data()
        images = getattr(train, "dataset", None)
        if isinstance(images, Sized):
            self._check_enough(len(images))

    def _check_enough(self, images: int) -> None:
        if images < self.k:
            raise ValueError(f"k={self.k} neighbours, but {images} training images: choose k up to {images}")


@dataclass(frozen=True)
class LinearProbe(Probe):
    """The test accuracy of a linear classifier on frozen features, each standardised by its training mean and deviation.

    The problem is convex and solved on all training images at once by L-BFGS from zero, so nothing is drawn at random.

    Args:
        iterations: most steps of L-BFGS.
        lr: first step length that its line search tries.
        weight_decay: λ of the penalty λ/2 · ‖W‖².
    """

    iterations: int = 100
    lr: float = 1.0
    weight_decay: float = 1e-3

    def __call__(self, module: nn.Module, data: ProbeData, device: torch.device | str | None = None) -> dict[str, float]:
        """``{"linear": accuracy}``."""
        with _set_aside(module):
            (train, train_labels), (test, labels) = _both_parts(module, data, device)
        # A feature that never changes carries nothing: its deviation counts as 1.
        deviation, mean = torch.std_mean(train, dim=0, correction=0)
        deviation = torch.where(deviation > 1e-6 * (1 + mean.abs()), deviation, 1.0)
        train, test = (train - mean) / deviation, (test - mean) / deviation
        weight, bias = self._fit(train, train_labels, data.num_classes)
        return {"linear": _accuracy((test @ weight + bias).argmax(1), labels, data.num_classes)}

    def _fit(self, features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        weight = features.new_zeros(features.shape[1], num_classes).requires_grad_()
        bias = features.new_zeros(num_classes).requires_grad_()
        solver = torch.optim.LBFGS([weight, bias], lr=self.lr, max_iter=self.iterations, history_size=10, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            solver.zero_grad()
            loss = cross_entropy(features @ weight + bias, labels) + self.weight_decay / 2 * weight.square().sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            solver.step(closure)
        return weight.detach(), bias.detach()


@dataclass(frozen=True)
class FineTune(Probe):
    """The test accuracy after training a copy of the backbone and a new linear layer end to end (warm-up, cosine).

    LW-FedSSL (arXiv 2401.11647) fine-tunes for 40 epochs, 10 of them warm-up, with AdamW at 1e-3 and RandAugment. With a share of the
    ``labels`` it is semi-supervised (arXiv 2002.05709: 1 % and 10 %). The training images are held in memory.

    Args:
        epochs: passes over the training images that have a label here.
        warmup_epochs: of these, the first ones with a rising learning rate.
        lr: highest learning rate.
        weight_decay: the optimizer's.
        batch_size: images per step.
        seed: of the order of images, the new layer and dropout; of which labels are known, and of crops and flips.
        labels: share of every class's training images whose labels are known, drawn once; one image of each at least.
        optimizer: ``adamw``, or ``sgd`` with momentum 0.9, whose learning rate wants to be higher.
        augment: how images are shown in training: as they are (``none``), shifted by up to an eighth (``crop``; what comes in is 0, the
            mean of normalised images), or half of them mirrored, too (``crop_flip``; not where a mirrored image is another thing).

    Raises:
        ValueError: a share of labels outside (0, 1], an optimizer or augmentation that is not known.
    """

    epochs: int = 40
    warmup_epochs: int = 10
    lr: float = 1e-3
    weight_decay: float = 1e-5
    batch_size: int = 128
    seed: int = 0
    labels: float = 1.0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    augment: Literal["none", "crop", "crop_flip"] = "none"

    def __post_init__(self) -> None:
        if not 0 < self.labels <= 1:
            raise ValueError(f"labels={self.labels} is no share of labels: give a number above 0, up to 1")
        for name, given, known in (
            ("optimizer", self.optimizer, ("adamw", "sgd")),
            ("augment", self.augment, ("none", "crop", "crop_flip")),
        ):
            if given not in known:
                raise ValueError(f'{name} "{given}" not found; there are {", ".join(known)}')

    def __call__(self, module: nn.Module, data: ProbeData, device: torch.device | str | None = None) -> dict[str, float]:
        """``{"finetune": accuracy}``.

        Raises:
            ValueError: more epochs of warm-up than epochs.
        """
        self._check_lengths()
        device = _device_of(module, device)
        with _set_aside(module):
            train, test = data.probe_data()
            images, labels = (torch.cat(part) for part in zip(*((batch[0], batch[1]) for batch in train)))
            known = self._known(labels)
            images, labels = images[known], labels[known]
            torch.manual_seed(self.seed)  # a fork of the global stream, which dropout draws from
            backbone = copy.deepcopy(cast(nn.Module, module.backbone)).requires_grad_(True).to(device)
            with torch.no_grad():
                width = backbone.eval()(images[:1].to(device)).shape[1]
            network = nn.Sequential(backbone, nn.Linear(width, data.num_classes, device=device))
            with torch.enable_grad():
                self._train(network, images, labels, device)
            network.eval()
            with torch.no_grad():
                scored = [(network(batch[0].to(device)).argmax(1), batch[1].to(device)) for batch in test]
        predicted, truth = (torch.cat(part) for part in zip(*scored))
        return {"finetune": _accuracy(predicted, truth, data.num_classes)}

    def check(self, data: ProbeData) -> None:
        """As :class:`Probe`, and

        Raises:
            ValueError: more epochs of warm-up than epochs.
        """
        self._check_lengths()
        super().check(data)

    def _check_lengths(self) -> None:
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} must lie between 0 and epochs {self.epochs}")

    def _known(self, labels: Tensor) -> Tensor:
        """Places of the images whose labels are known, in rising order: the same share of every class, so that more contain fewer."""
        if self.labels == 1:
            return torch.arange(len(labels))
        order = torch.randperm(len(labels), generator=generator(self.seed, "known labels"))
        each = [order[labels[order] == label] for label in labels.unique()]
        return torch.cat([mine[: max(1, round(self.labels * len(mine)))] for mine in each]).sort().values

    def _shown(self, images: Tensor, draw: torch.Generator) -> Tensor:
        if self.augment == "none":
            return images
        pad = max(1, min(images.shape[-2:]) // 8)
        down, right = torch.randint(2 * pad + 1, (2, len(images)), generator=draw)
        mirrored = torch.rand(len(images), generator=draw) < (0.5 if self.augment == "crop_flip" else 0.0)
        return pad_crop_flip(images, pad, down, right, mirrored)

    def _train(self, network: nn.Module, images: Tensor, labels: Tensor, device: torch.device) -> None:
        from lightly.utils.scheduler import CosineWarmupScheduler

        order = torch.Generator().manual_seed(self.seed)
        optimizer: torch.optim.Optimizer
        if self.optimizer == "sgd":
            optimizer = torch.optim.SGD(network.parameters(), lr=self.lr, momentum=0.9, weight_decay=self.weight_decay)
        else:
            optimizer = torch.optim.AdamW(network.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        # A last batch of one image would have no batch statistics: it is left out of that epoch.
        batches = [range(start, min(start + self.batch_size, len(images))) for start in range(0, len(images), self.batch_size)]
        batches = [batch for batch in batches if len(batch) > 1 or len(images) == 1]
        steps = self.epochs * len(batches)
        warmup = self.warmup_epochs * len(batches)
        # lightly reaches the end value in the last step; with one step more, the last step still trains.
        schedule = CosineWarmupScheduler(optimizer, warmup, steps + 1, end_value=0.0)
        network.train()
        for _ in range(self.epochs):
            shuffled = torch.randperm(len(images), generator=order)
            for batch in batches:
                chosen = shuffled[batch.start : batch.stop]
                optimizer.zero_grad()
                shown = self._shown(images[chosen].to(device), order)
                cross_entropy(network(shown), labels[chosen].to(device)).backward()
                optimizer.step()
                schedule.step()


@contextmanager
def _set_aside(module: nn.Module) -> Iterator[None]:
    """Work in eval mode and on a fork of the global random stream (a loader draws from it), then put both back."""
    modes = {part: part.training for part in module.modules()}
    gpus = sorted({parameter.device.index for parameter in module.parameters() if parameter.device.type == "cuda"})
    with torch.random.fork_rng(devices=gpus):
        module.eval()
        try:
            yield
        finally:
            for part, training in modes.items():
                part.training = training


@torch.no_grad()
def _features(module: nn.Module, loader: Loader, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features ``(N, D)`` in float32 and labels ``(N,)`` of everything that ``loader`` gives."""
    features, labels = [], []
    for batch in loader:
        features.append(cast(Featurizer, module).features(batch[0].to(device)).float())
        labels.append(batch[1].to(device))
    return torch.cat(features), torch.cat(labels)


def _both_parts(
    module: nn.Module, data: ProbeData, device: torch.device | str | None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    device = _device_of(module, device)
    train, test = data.probe_data()
    return _features(module, train, device), _features(module, test, device)


def _device_of(module: nn.Module, device: torch.device | str | None) -> torch.device:
    return next(module.parameters()).device if device is None else torch.device(device)


def _accuracy(predicted: Tensor, labels: Tensor, num_classes: int) -> float:
    from torchmetrics.functional.classification import multiclass_accuracy

    return float(multiclass_accuracy(predicted, labels, num_classes, average="micro"))
