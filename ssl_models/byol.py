"""BYOL (arXiv 2006.07733): predict, from one view, the momentum copy's projection of the other."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules.heads import BYOLPredictionHead, ProjectionHead
from torch import Tensor, nn

from featherlight.ssl_models.momentum import MomentumSSL


class BYOL(MomentumSSL):
    """BYOL: the sum of ``2 − 2 cos(prediction, target)`` over both ways of pairing the views; no negatives.

    Args:
        backbone: name of the backbone, as :func:`featherlight.ssl_models.make_backbone` takes it.

    Example:
        >>> import torch
        >>> model = BYOL("vit", image_size=8, backbone_options={"depth": 2, "patch_size": 2}, momentum=0.996)
        >>> model.view_loss(torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)).shape
        torch.Size([])
    """

    def __init__(self, backbone: str, **options: Any) -> None:
        super().__init__(backbone, **options)
        self.criterion = NegativeCosineSimilarity()

    def make_projector(self, input_dim: int, hidden_dim: int, output_dim: int, layers: int) -> nn.Module:
        widths = [input_dim, *[hidden_dim] * (layers - 1)]
        hidden = [(a, b, nn.BatchNorm1d(b), nn.ReLU()) for a, b in pairwise(widths)]
        return ProjectionHead([*hidden, (widths[-1], output_dim, None, None)])

    def make_predictor(self, hidden_dim: int, output_dim: int) -> nn.Module:
        return BYOLPredictionHead(output_dim, hidden_dim, output_dim)

    def pair_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return 2.0 + 2.0 * self.criterion(prediction, target)
