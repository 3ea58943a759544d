"""What self-supervised models share: two views of each image come in, a loss without labels comes out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from featherlight.ssl_models.learner import Learner


class SelfSupervised(Learner):
    """Steps of a model that learns from two views. A subclass has ``view_loss`` and, through ``make_projector``, its head.

    A batch is ``((x0, x1), labels)``, or lightly's ``((x0, x1), labels, filenames)``; views are ``(N, C, H, W)`` and the
    labels are not looked at.

    Args:
        hidden_dim: width of the hidden layers of projector and predictor (512 in LW-FedSSL, arXiv 2401.11647).
        output_dim: width of their output (256 there).
        projector_layers: linear layers of the projector (3 there), at least 2.
    """

    def __init__(self, backbone: str, hidden_dim: int = 512, output_dim: int = 256, projector_layers: int = 3, **options: Any) -> None:
        if projector_layers < 2:
            raise ValueError(f"projector_layers must be at least 2, got {projector_layers}")
        super().__init__(backbone, **options)
        self.projector = self.make_projector(self.feature_dim, hidden_dim, output_dim, projector_layers)

    def make_projector(self, input_dim: int, hidden_dim: int, output_dim: int, layers: int) -> nn.Module:
        """The projector: ``(N, input_dim)`` to ``(N, output_dim)``."""
        raise NotImplementedError

    def view_loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        """The loss of two views, each ``(N, C, H, W)``: a scalar."""
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        """The loss of one batch.

        Raises:
            ValueError: the batch is not two views, or has fewer than 2 samples.
        """
        views = _views(batch)
        if views is None:
            raise ValueError(
                f"{type(self).__name__} needs two views of each image, ((x0, x1), labels); "
                f"got {type(batch[0]).__name__}: use a two-view augmentation for training"
            )
        if len(views[0]) < 2:
            raise ValueError(f"{type(self).__name__} needs at least 2 samples in a batch, got {len(views[0])}: drop the last batch")
        loss = self.view_loss(*views)
        self._log("train", {"loss": loss}, len(views[0]))
        return loss

    def validation_step(self, batch: Any, batch_idx: int = 0) -> dict[str, Tensor]:
        """``{"loss": scalar}`` of two views; nothing for plain ``(x, labels)``, which are there for probes."""
        return self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int = 0) -> dict[str, Tensor]:
        """As :meth:`validation_step`."""
        return self._evaluate("test", batch)

    def _evaluate(self, part: str, batch: Any) -> dict[str, Tensor]:
        views = _views(batch)
        if views is None:
            return {}
        with torch.no_grad():
            scores = {"loss": self.view_loss(*views)}
        self._log(part, scores, len(views[0]))
        return scores


def _views(batch: Any) -> tuple[Tensor, Tensor] | None:
    images = batch[0]
    if isinstance(images, Tensor):
        return None
    if len(images) != 2:
        raise ValueError(f"got {len(images)} views of each image; these models take two")
    return images[0], images[1]
