"""MoCo v3 (arXiv 2104.02057): find, from one view, the momentum copy's projection of the other among the batch's, or a queue's."""

from __future__ import annotations

from typing import Any

import torch
from lightly.models.modules.heads import MoCoProjectionHead
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from featherlight.ssl_models.momentum import MomentumSSL


class MoCoV3(MomentumSSL):
    """MoCo v3: ``ℓ(q0, k1) + ℓ(q1, k0)`` with ℓ the InfoNCE loss of :func:`info_nce`.

    Args:
        backbone: name of the backbone, as :func:`featherlight.ssl_models.make_backbone` takes it.
        temperature: divides the similarities (0.05 in LW-FedSSL, arXiv 2401.11647).
        scale_by_2tau: multiply the loss by twice the temperature, as MoCo v3's own code does and LW-FedSSL does not.
        queue_size: keys of former batches that are the negatives in place of the batch's own, as in MoCo (arXiv 1911.05722); 0 for none.
            At first they are random directions. A federation can have it where one server part trains on all clients' batches, which is
            MocoSFL's feature memory (Li et al., ICLR 2023), or where there is one client; under DDP it holds the first process's keys.

    Raises:
        ValueError: a temperature that is not positive, or a queue of negative size.

    Example:
        >>> model = MoCoV3("vit", image_size=8, backbone_options={"depth": 2, "patch_size": 2}, momentum=0.99)
        >>> model.view_loss(torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)).shape
        torch.Size([])
    """

    def __init__(self, backbone: str, temperature: float = 0.05, scale_by_2tau: bool = False, queue_size: int = 0, **options: Any) -> None:
        if temperature <= 0.0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if queue_size < 0:
            raise ValueError(f"queue_size={queue_size}: give how many keys are kept, or 0 for the batch's own alone")
        super().__init__(backbone, **options)
        self.temperature = temperature
        self.scale = 2.0 * temperature if scale_by_2tau else 1.0
        self.queue: Tensor | None
        keys = normalize(torch.randn(queue_size, self.hparams["output_dim"]), dim=1) if queue_size else None
        self.register_buffer("queue", keys)
        self.queues = ("queue",) if queue_size else ()
        """Buffers that every training step pushes to, by path: whoever averages models must leave them to one trainer."""

    def make_projector(self, input_dim: int, hidden_dim: int, output_dim: int, layers: int) -> nn.Module:
        return MoCoProjectionHead(input_dim, hidden_dim, output_dim, num_layers=layers, batch_norm=True)

    def make_predictor(self, hidden_dim: int, output_dim: int) -> nn.Module:
        return MoCoProjectionHead(output_dim, hidden_dim, output_dim, num_layers=2, batch_norm=True)

    def pair_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        negatives = None if self.queue is None else self.queue.clone()  # keep() overwrites it before the backward pass
        return self.scale * info_nce(prediction, target, self.temperature, negatives)

    def keep(self, targets: Tensor) -> None:
        """Push them to the queue; the oldest keys go. Rows move, so that no position must be read back from the device."""
        if self.queue is not None:
            self.queue.copy_(torch.cat([normalize(targets, dim=1), self.queue])[: len(self.queue)])


def info_nce(queries: Tensor, keys: Tensor, temperature: float, negatives: Tensor | None = None) -> Tensor:
    """``−log softmax`` of the similarity of query i and key i among query i and all keys, averaged: a scalar.

    Not lightly's ``NTXentLoss(queries, keys)``, which adds the terms of queries against queries, keys against keys and keys
    against queries.

    Args:
        queries: ``(N, D)``.
        keys: ``(N, D)``; the key of query i is row i, the others are its negatives.
        negatives: ``(K, D)``, of length 1: the negatives in place of those.
    """
    queries, keys = normalize(queries, dim=1), normalize(keys, dim=1)
    if negatives is not None:
        similarity = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ negatives.T], 1)
        return cross_entropy(similarity / temperature, torch.zeros(len(queries), dtype=torch.int64, device=queries.device))
    similarity = queries @ keys.T
    return cross_entropy(similarity / temperature, torch.arange(len(queries), device=queries.device))
