"""A backbone with an optimizer: what every model here shares, self-supervised or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from featherlight.ssl_models.backbones import fixed_size, make_backbone
from featherlight.ssl_models.optimizers import make_optimizer, make_schedule


class Learner(LightningModule):
    """A LightningModule around a backbone; subclasses add heads and steps. Runs under a Trainer and under Fabric alike.

    Args:
        backbone: name of the backbone, as :func:`featherlight.ssl_models.make_backbone` takes it.
        backbone_options: options of that backbone, for example ``{depth: 4, width: 64}``.
        image_size: height and width of the images in pixels.
        in_channels: channels of the images.
        pretrained: start from published weights (``timm/NAME`` and ``torchvision/NAME``).
        optimizer: ``adamw``, ``sgd`` or ``lars``.
        lr: learning rate.
        weight_decay: weight decay of matrices and kernels; biases and norms have none.
        optimizer_momentum: momentum of ``sgd`` and ``lars``.
        schedule: ``constant`` or ``cosine`` learning rate.
        periods: length of the schedule: epochs under a Trainer, rounds in a federation.
        warmup_periods: periods of linear warm-up at the start.
    """

    def __init__(
        self,
        backbone: str,
        backbone_options: dict[str, Any] | None = None,
        image_size: int = 32,
        in_channels: int = 3,
        pretrained: bool = False,
        optimizer: Literal["adamw", "sgd", "lars"] = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 1e-5,
        optimizer_momentum: float = 0.9,
        schedule: Literal["constant", "cosine"] = "constant",
        periods: int | None = None,
        warmup_periods: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.targets: dict[str, str] = {}
        """Momentum copies in this model: path of the copy to path of the module that it follows."""
        self.lr_factor = make_schedule(schedule, periods, warmup_periods)
        self.backbone = make_backbone(backbone, image_size, in_channels, pretrained, **(backbone_options or {}))
        self.feature_dim = int(cast(int, self.backbone.feature_dim))
        self._takes = int((backbone_options or {}).get("in_chans", in_channels)), fixed_size(self.backbone)

    def features(self, x: Tensor) -> Tensor:
        """Pooled features, as probes take them: ``(N, C, H, W)`` to ``(N, feature_dim)``.

        Raises:
            ValueError: images of another shape than the backbone was made for.
        """
        self.check_images(x)
        return self.backbone(x)

    def check_images(self, x: Tensor) -> None:
        """Refuse images ``(N, C, H, W)`` that the backbone cannot take: of other channels, or of another size where it has a fixed one.

        Raises:
            ValueError: naming both shapes, and what to set.
        """
        shape, (channels, size) = tuple(x.shape[1:]), self._takes
        if shape != (channels, *(size or shape[1:])):
            raise ValueError(_misfit(type(self).__name__, shape, channels, size))

    def forward(self, x: Tensor) -> Tensor:
        """The features of ``x``: ``(N, C, H, W)`` to ``(N, feature_dim)``."""
        return self.features(x)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """One optimizer over every parameter but the targets', and a scheduler that steps once a period."""
        copies = tuple(f"{path}." for path in self.targets)
        own = [parameter for name, parameter in self.named_parameters() if not name.startswith(copies)]
        given = self.hparams
        optimizer = make_optimizer(given["optimizer"], own, given["lr"], given["weight_decay"], given["optimizer_momentum"])
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, self.lr_factor), "interval": "epoch"},
        }

    def _log(self, part: str, scores: Mapping[str, Tensor], samples: int) -> None:
        for name, score in scores.items():
            # Evaluation is averaged over DDP's processes; a training loss is one process's own, so that no step waits for it.
            self.log(f"{part}/{name}", score.detach(), prog_bar=name == "loss", batch_size=samples, sync_dist=part != "train")


def _misfit(model: str, shape: tuple[int, ...], channels: int, size: tuple[int, ...] | None) -> str:
    of_model, of_data = [], []
    if shape[:1] != (channels,):
        of_model.append(f"in_channels={shape[0]}")
    if size is not None and shape[1:] != size:
        if len({*shape[1:]}) == 1:
            of_model.append(f"image_size={shape[-1]}")
        if len({*size}) == 1:
            of_data.append(f"image_size={size[-1]}")
    takes = f"in_channels={channels}" + ("" if size is None else f" and image_size={size[0]}" if len({*size}) == 1 else f" and size {size}")
    advice = [f"{' and '.join(settings)} of the {owner}" for owner, settings in (("model", of_model), ("data", of_data)) if settings]
    return f"images have the shape {shape} (C, H, W), but {model} was made for {takes}: set {', or '.join(advice)}"
