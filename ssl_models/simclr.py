"""SimCLR (arXiv 2002.05709): two views of an image attract, all other views in the batch repel."""

from __future__ import annotations

from typing import Any

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules.heads import SimCLRProjectionHead
from torch import Tensor, nn

from featherlight.ssl_models.ssl import SelfSupervised


class SimCLR(SelfSupervised):
    """SimCLR: ``-log softmax`` of the similarity of two views of one image among all views of the batch, by lightly.

    Args:
        backbone: name of the backbone, as :func:`featherlight.ssl_models.make_backbone` takes it.
        temperature: divides the similarities (0.5 is the paper's for CIFAR-10).
        gather_distributed: take the negatives of all DDP processes. Leave it off in a federation.

    Example:
        >>> model = SimCLR("vit", image_size=8, backbone_options={"depth": 2, "patch_size": 2}, lr=3e-4)
        >>> views = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
        >>> model.view_loss(*views).shape
        torch.Size([])
    """

    def __init__(self, backbone: str, temperature: float = 0.5, gather_distributed: bool = False, **options: Any) -> None:
        super().__init__(backbone, **options)
        self.criterion = NTXentLoss(temperature, gather_distributed=gather_distributed)

    def make_projector(self, input_dim: int, hidden_dim: int, output_dim: int, layers: int) -> nn.Module:
        return SimCLRProjectionHead(input_dim, hidden_dim, output_dim, num_layers=layers)

    def view_loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        # One pass over both views: batch norm sees all 2N samples, as in the paper.
        z0, z1 = self.projector(self.features(torch.cat([x0, x1]))).chunk(2)
        return self.criterion(z0, z1)
