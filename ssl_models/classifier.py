"""A supervised classifier on the same backbones: what the self-supervised methods are compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import multiclass_accuracy

from featherlight.ssl_models.learner import Learner
from featherlight.ssl_models.probes import Probe, ProbeData


class Classifier(Learner):
    """Cross entropy of a linear layer on the backbone's features. A batch is ``(x, labels)``: ``(N, C, H, W)`` and ``(N,)``.

    Args:
        backbone: name of the backbone, as :func:`featherlight.ssl_models.make_backbone` takes it.
        num_classes: number of classes.
        label_smoothing: share of the probability that is spread over all classes.

    Example:
        >>> model = Classifier("vit", num_classes=10, image_size=8, backbone_options={"depth": 2, "patch_size": 2})
        >>> model.logits(torch.randn(4, 3, 8, 8)).shape
        torch.Size([4, 10])
    """

    learns_from_labels = True
    """Data whose images have none are refused before training begins."""

    def __init__(self, backbone: str, num_classes: int = 10, label_smoothing: float = 0.0, **options: Any) -> None:
        super().__init__(backbone, **options)
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.head = nn.Linear(self.feature_dim, num_classes)

    def logits(self, x: Tensor) -> Tensor:
        """Scores before the softmax: ``(N, C, H, W)`` to ``(N, num_classes)``."""
        return self.head(self.features(x))

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        """The loss of one batch."""
        x, labels = batch[0], batch[1]
        loss = cross_entropy(self.logits(x), labels, label_smoothing=self.label_smoothing)
        self._log("train", {"loss": loss}, len(x))
        return loss

    def validation_step(self, batch: Any, batch_idx: int = 0) -> dict[str, Tensor]:
        """``{"loss": scalar, "accuracy": scalar}``, means over the batch."""
        return self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int = 0) -> dict[str, Tensor]:
        """As :meth:`validation_step`."""
        return self._evaluate("test", batch)

    def _evaluate(self, part: str, batch: Any) -> dict[str, Tensor]:
        x, labels = batch[0], batch[1]
        with torch.no_grad():
            logits = self.logits(x)
        scores = {
            "loss": cross_entropy(logits, labels),
            "accuracy": multiclass_accuracy(logits, labels, self.num_classes, average="micro"),
        }
        self._log(part, scores, len(x))
        return scores


def accuracy(module: Any, data: Any) -> dict[str, float]:
    """An evaluator of classifiers: ``{"accuracy": the share of test images whose class is named}``.

    Args:
        module: has ``logits``, ``(N, C, H, W)`` to ``(N, num_classes)``; in evaluation mode.
        data: its ``probe_data()[1]`` gives ``(x, labels)``.
    """
    device = next(module.parameters()).device
    right = total = 0
    with torch.no_grad():
        for x, labels in data.probe_data()[1]:
            right += int((module.logits(x.to(device)).argmax(1).cpu() == labels.cpu()).sum())
            total += len(labels)
    return {"accuracy": right / total}


class Accuracy(Probe):
    """:func:`accuracy` for configurations, which list judges under ``probes``: of a classifier as it was trained, nothing is fitted.

    Raises:
        ValueError: the model names no class.
    """

    def __call__(self, module: nn.Module, data: ProbeData, device: torch.device | str | None = None) -> dict[str, float]:
        """``{"accuracy": the share of test images whose class is named}``."""
        if not hasattr(module, "logits"):
            raise ValueError(f"{type(module).__name__} names no class that Accuracy could count: judge its features, by KNN or LinearProbe")
        return accuracy(module, data)
