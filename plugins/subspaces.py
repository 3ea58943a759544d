"""Subspaces of the parameters that train: rounds that share some, and their maps, of which only a few lie in memory at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from featherlight.plugins.projections import PROJECTIONS, Projection
from featherlight.plugins.seeds import derive

PREFIX = "intrinsic"


@dataclass
class Span:
    """Rounds that share K subspaces of d dimensions and the parameters that train.

    Args:
        number: counted from 0; names: of the parameters; size: D, how many numbers they have.
        position: θ₀ + Σ_k A_k·Σ_k, flat, float32 or wider; on one machine θ₀, or nothing where the parameters say it as exactly.
        sums: Σ, (K, d), float64.
        velocity: what momentum made of past rounds, (K, d), float64; without momentum nothing.
        changed: the last round, before the one under way, in which each of the K changed; −1: none.
    """

    number: int
    names: list[str]
    size: int
    position: Tensor
    sums: Tensor
    velocity: Tensor
    changed: list[int] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        """Plain data and tensors."""
        return dict(vars(self))

    @classmethod
    def of(cls, state: Mapping[str, Any], device: torch.device) -> Span:
        """From :meth:`state`, in memory of its own."""
        own: dict[str, Any] = {}
        for name in (entry.name for entry in fields(cls)):
            value = state[name]
            own[name] = value.to(device, copy=True) if isinstance(value, Tensor) else list(value) if isinstance(value, list) else value
        return cls(**own)


class Maps:
    """The maps A of one span, made when asked for. Those used last are kept, one or as many as 2·D bytes hold, half a vector of float32.

    Args:
        kind: of :data:`~featherlight.plugins.projections.PROJECTIONS`; dim: d.
    """

    def __init__(self, kind: str, dim: int) -> None:
        self._kind, self._dim = kind, dim
        self._kept: dict[tuple[int, int], Projection] = {}

    def clear(self) -> None:
        """Forget them all."""
        self._kept = {}

    def get(self, size: int, seed: int, span: int, which: int) -> Projection:
        """A of subspace ``which`` of a span, (D = ``size``, d)."""
        found = self._kept.pop((span, which), None)
        if found is None:
            while self._kept and (len(self._kept) + 1) * next(iter(self._kept.values())).nbytes > 2 * size:
                del self._kept[next(iter(self._kept))]  # before the new one is made
            found = PROJECTIONS[self._kind](size, self._dim, derive(seed, PREFIX, span, which))
        self._kept[span, which] = found
        return found

    @property
    def nbytes(self) -> int:
        """Memory of those that are kept, bytes."""
        return sum(kept.nbytes for kept in self._kept.values())
