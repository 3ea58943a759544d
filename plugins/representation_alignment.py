"""Representation alignment: what a client's model makes of a view stays near what the received model makes of it (LW-FedSSL)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from featherlight.plugins.base import Change, Clock
from featherlight.plugins.received import Received, check_strength
from featherlight.plugins.representations import Representations, each_view
from featherlight.plugins.step_cost import count_samples

TEMPERATURE = 0.5
"""Of models that have none of their own: MOON's (arXiv 2103.16257)."""


class RepresentationAlignment(Received):
    """Add to the local loss, for z the model's representation of a view and g that of the model as it was received,

    - ``form="contrastive"``: weight · mean_i −log( exp(cos(z_i, g_i)/τ) / Σ_j exp(cos(z_i, g_j)/τ) ), j over the batch;
    - ``form="cosine"``: weight · mean_i (1 − cos(z_i, g_i)),

    averaged over views (LW-FedSSL, arXiv 2401.11647, versions 1 to 3: that the term is there, and pulls towards the received model; its
    weight and both forms are this project's, after MOON). The two differ in their weights alone: the same blocks are left out of both.
    Under a Trainer the model that an epoch began with takes the place of the received one.

    It fits any model of which submodules make the representation, each taking what the one before puts out. It holds a copy of the weights
    that train among those submodules', and computes a forward pass more for every view, from behind the frozen blocks. Batch norm uses the
    batch's statistics in that pass, as target branches do, and dropout is off (ours). Nothing more travels.

    Args:
        weight: of the term; 0 is as without the method.
        temperature: τ of the contrastive form; by default the model's own attribute ``temperature``, or 0.5.
        form: ``"contrastive"`` or ``"cosine"``.
        through: paths of the submodules that make a representation, in the order in which a view goes through them.

    Raises:
        ValueError: an argument out of its range; on attach, no such submodule; in a step, submodules that do not follow one another.
    """

    def __init__(
        self,
        weight: float = 1.0,
        temperature: float | None = None,
        form: Literal["contrastive", "cosine"] = "contrastive",
        through: str | Sequence[str] = ("backbone", "projector"),
    ) -> None:
        check_strength("weight", weight)
        check_temperature(temperature)
        if form not in ("contrastive", "cosine"):
            raise ValueError(f"form={form!r} is not known; use 'contrastive' or 'cosine'")
        self.weight = weight
        self.temperature = temperature
        self.form = form
        self.through = through

    def attach(self, model: nn.Module) -> None:
        super().attach(model)
        self._seen = Representations(model, self.through)
        own = getattr(model, "temperature", None)
        usable = isinstance(own, float | int) and not isinstance(own, bool) and own > 0
        self._temperature = self.temperature if self.temperature is not None else own if usable else TEMPERATURE

    def advance(self, clock: Clock) -> Change:
        if self.compares():
            self._seen.hook()
        return super().advance(clock)

    def compares(self) -> bool:
        return self.weight > 0

    def compared(self) -> dict[str, nn.Parameter]:
        return self._seen.weights()

    def before_forward(self, clock: Clock) -> None:
        if self.compares():
            self._seen.begin()

    def extra_loss(self, model: nn.Module, batch: Any) -> Tensor | None:
        if not self.compares():
            return None
        if not self._received:
            named = ", ".join(self._seen.through)
            raise ValueError(f"nothing to align with: none of {named} trains, or the host does not call receive() as a turn begins")
        size = count_samples(batch)
        ours = each_view(size, self._seen.local())
        theirs = each_view(size, self._seen.other(self._received))
        terms = [alignment(z, g, self._temperature if self.form == "contrastive" else None) for z, g in zip(ours, theirs)]
        return self.weight * torch.stack(terms).mean()

    def after_step(self, clock: Clock) -> None:
        self._seen.end()

    def detach(self) -> None:
        self._seen.remove()


def alignment(z: Tensor, g: Tensor, temperature: float | None) -> Tensor:
    """A scalar: how far representations are from those they are pulled to, contrastive, or without a ``temperature`` by cosine.

    Args:
        z: ``(N, D)``, of N samples.
        g: ``(N, D)``, of the same samples.

    Example:
        >>> z = torch.eye(2)
        >>> alignment(z, z, None).item(), round(alignment(z, z, 1.0).item(), 4)  # −log(e / (e + 1))
        (0.0, 0.3133)
    """
    if temperature is None:
        return (1 - cosine_similarity(z, g)).mean()
    similarity = normalize(z, dim=1) @ normalize(g, dim=1).T
    return cross_entropy(similarity / temperature, torch.arange(len(z), device=z.device))


def check_temperature(temperature: float | None) -> None:
    """Refuse what similarities cannot be divided by.

    Raises:
        ValueError: not above 0.
    """
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature={temperature}: give a number above 0")
