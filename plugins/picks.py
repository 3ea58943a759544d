"""What one client holds of one layer, and where that belongs in the whole."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from featherlight.plugins.base import Visit
from featherlight.plugins.seeds import generator


class Pick(NamedTuple):
    """What one client holds of one layer: ``kernels`` (r,) of R, ``rows`` (n,) of O; ascending indices, int64; None: all rows."""

    kernels: Tensor
    rows: Tensor | None


def draw_rows(visit: Visit, path: str, outputs: int, size: int) -> Tensor:
    """Server and client draw the same, so that rows need not be sent."""
    return torch.randperm(outputs, generator=generator(visit.seed, visit.round, visit.client, "rows", path))[:size].sort().values


def place(part: Tensor, shape: tuple[int, ...], *indices: Tensor | None) -> tuple[Tensor, Tensor]:
    """``part`` in zeros of ``shape``, where ``indices`` (one for each leading axis; None: all of it) say; and where that is, as weights."""
    whole, weight = part.new_zeros(shape), part.new_zeros(shape)
    places = [torch.arange(size, device=part.device) if index is None else index for index, size in zip(indices, shape)]
    grid = torch.meshgrid(*places, indexing="ij")
    whole[grid] = part
    weight[grid] = 1.0
    return whole, weight
