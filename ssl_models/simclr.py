"""SimCLR (arXiv 2002.05709): two views of an image attract, all other views in the batch repel."""

from __future__ import annotations

from typing import Any

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules.heads import SimCLRProjectionHead
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from featherlight.ssl_models.ssl import SelfSupervised


class SimCLR(SelfSupervised):
    """SimCLR: ``-log softmax`` of the similarity of two views of one image among all views of the batch.

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
        self.temperature = temperature
        self.gather_distributed = gather_distributed
        self.criterion = NTXentLoss(temperature, gather_distributed=gather_distributed)

    def make_projector(self, input_dim: int, hidden_dim: int, output_dim: int, layers: int) -> nn.Module:
        return SimCLRProjectionHead(input_dim, hidden_dim, output_dim, num_layers=layers)

    def view_loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        # One pass over both views: batch norm sees all 2N samples, as in the paper.
        z0, z1 = self.projector(self.features(torch.cat([x0, x1]))).chunk(2)
        return self.criterion(z0, z1) if self.gather_distributed else nt_xent(z0, z1, self.temperature)


def nt_xent(z0: Tensor, z1: Tensor, temperature: float) -> Tensor:
    """lightly's ``NTXentLoss`` on one process, without its boolean indexing: a scalar.

    Indexing by a mask has a shape that depends on values, so such a loss can be neither priced without data nor compiled whole.

    Args:
        z0: ``(N, D)``, one view of each image.
        z1: ``(N, D)``, the other.
    """
    z = normalize(torch.cat([z0, z1]), dim=1)
    similarity = (z @ z.T / temperature).fill_diagonal_(float("-inf"))
    other_view = torch.arange(len(z), device=z.device).roll(len(z0))
    return cross_entropy(similarity, other_view)
