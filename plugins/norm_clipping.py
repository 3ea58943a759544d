"""Norm clipping: no client's change of the model is longer than a bound (arXiv 1911.07963)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from featherlight.plugins.base import Message, Plugin, Visit
from featherlight.plugins.rejection import Rejection


class NormClipping(Plugin):
    """A client scales what it sends to a Euclidean norm of at most C: Δ ← Δ · min(1, C / ‖Δ‖₂), over all floating entries but running
    statistics and counts, which travel as they are. The server does it once more with what it reads, since a client need not have, and
    rejects what is ``tolerance`` times longer than C (rounding to a few bits makes an honest update somewhat longer, too).

    It bounds what one client can do to the mean: its share of the samples times C. Its place in the list says of what: it goes
    behind what projects (``IntrinsicProjection``, ``FetchSGD``: the norm is then that of the coordinates, or of the sketch), and in front
    of ``Quantization``. For federations only.

    Args:
        max_norm: C.
        tolerance: how many times C an update's norm may be before it is rejected rather than scaled.

    Raises:
        ValueError: arguments out of range.

    Example:
        >>> clip = NormClipping(max_norm=1.0)
        >>> clip.attach(nn.Linear(2, 1))
        >>> clip.encode({"weight": torch.tensor([[3.0, 4.0]])}, Visit(0))["weight"]
        tensor([[0.6000, 0.8000]])
    """

    bounds = True
    keeps_norm = True

    def __init__(self, max_norm: float, tolerance: float = 10.0) -> None:
        if not 0 < max_norm < float("inf"):
            raise ValueError(f"max_norm={max_norm}: give a norm above 0")
        if not 1 <= tolerance <= float("inf"):
            raise ValueError(f"tolerance={tolerance}: give 1 or more")
        self.max_norm = max_norm
        self.tolerance = tolerance

    def attach(self, model: nn.Module) -> None:
        self._statistics = frozenset(name for name, _ in model.named_buffers())

    def encode(self, message: Message, visit: Visit) -> Message:
        return self._scaled(message, self._norm(message))

    def decode(self, message: Message, visit: Visit) -> Mapping[str, Any]:
        """At most ``max_norm`` long.

        Raises:
            Rejection: ``tolerance`` times longer.
        """
        norm = self._norm(message)
        if self.tolerance * self.max_norm < norm < float("inf"):
            raise Rejection("norm", f"its norm is {norm:.3g}, and max_norm={self.max_norm:g} with tolerance={self.tolerance:g}")
        return self._scaled(message, norm)

    def _norm(self, message: Message) -> float:
        """Not finite where an entry is not, and then nothing is scaled: whoever adds up rejects it."""
        norms = [torch.linalg.vector_norm(value.double()) for value in self._counted(message).values()]
        return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0

    def _scaled(self, message: Message, norm: float) -> Message:
        if not self.max_norm < norm < float("inf"):
            return message
        return message | {name: value * (self.max_norm / norm) for name, value in self._counted(message).items()}

    def _counted(self, message: Message) -> dict[str, Tensor]:
        return {name: value for name, value in message.items() if value.is_floating_point() and name not in self._statistics}
