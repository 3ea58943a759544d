"""MOON: a client's representations are pulled to the received model's and away from those of its own last model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from featherlight.plugins.base import Change, Clock, Message, Plugin, Visit
from featherlight.plugins.received import check_strength, copy_of
from featherlight.plugins.representation_alignment import TEMPERATURE, check_temperature
from featherlight.plugins.representations import Representations, each_view
from featherlight.plugins.step_cost import count_samples


class MOON(Plugin):
    """Add, for z the local model's representation of a view, g the received model's and p that of the client's model at the end of its last
    turn,

        weight · mean −log( exp(cos(z, g)/τ) / (exp(cos(z, g)/τ) + exp(cos(z, p)/τ)) )

    averaged over samples and views (MOON, arXiv 2103.16257). In a client's first turn there is no p, and no term.

    A client remembers, between its turns, the weights that it trained among those of the submodules in ``through``; they never travel.
    In a turn it holds them and the received ones beside the model, and computes two forward passes more for every view. Of p only what
    trains now is the client's own: what was frozen since is as the server has it, and what the client did not have in its last turn is as
    received now (ours). The authors' code evaluates both in evaluation mode; here batch norm uses the batch's statistics, as in z.

    For federations only; needs clients that train the same parameters.

    Args:
        weight: μ in the paper, which takes 5 for CIFAR-10 and 1 for CIFAR-100; 0 is as without the method.
        temperature: τ (0.5 in the paper).
        through: as for :class:`~featherlight.plugins.RepresentationAlignment`; for a classifier, its backbone.

    Raises:
        ValueError: an argument out of its range; on attach, no such submodule.
    """

    same_for_all = True

    def __init__(
        self, weight: float = 1.0, temperature: float = TEMPERATURE, through: str | Sequence[str] = ("backbone", "projector")
    ) -> None:
        check_strength("weight", weight)
        check_temperature(temperature)
        self.weight = weight
        self.temperature = temperature
        self.through = through

    def attach(self, model: nn.Module) -> None:
        self._seen = Representations(model, self.through)
        self._memory: Message = {}
        self._forget()

    def _forget(self) -> None:
        self._received: dict[str, nn.Parameter] = {}
        self._previous: dict[str, nn.Parameter] = {}

    def advance(self, clock: Clock) -> Change:
        if self.weight:
            self._seen.hook()
        return Change()

    def recall(self, memory: Message, visit: Visit) -> None:
        self._memory = memory

    def receive(self, visit: Visit) -> None:
        memory, self._memory = self._memory, {}
        self._forget()
        now = self._seen.weights()
        if self.weight and not now.keys().isdisjoint(memory):
            self._received = {name: copy_of(value) for name, value in now.items()}
            self._previous = {name: copy_of(memory[name]) for name in now if name in memory}

    def copies(self) -> Sequence[Tensor]:
        return (*self._received.values(), *self._previous.values())

    def before_forward(self, clock: Clock) -> None:
        if self._previous:
            self._seen.begin()

    def extra_loss(self, model: nn.Module, batch: Any) -> Tensor | None:
        if not self._previous:
            return None
        size = count_samples(batch)
        passes = self._seen.local(), self._seen.other(self._received), self._seen.other(self._received | self._previous)
        terms = [model_contrast(z, g, p, self.temperature) for z, g, p in zip(*(each_view(size, views) for views in passes))]
        return self.weight * torch.stack(terms).mean()

    def after_step(self, clock: Clock) -> None:
        self._seen.end()

    def remember(self, visit: Visit) -> Message:
        return {name: value.detach() for name, value in self._seen.weights().items()} if self.weight else {}

    def settle(self, server: nn.Module, clock: Clock) -> None:
        self._forget()  # the next to train receives and recalls anew

    def detach(self) -> None:
        self._seen.remove()


def model_contrast(z: Tensor, received: Tensor, previous: Tensor, temperature: float) -> Tensor:
    """−log of the share of ``received`` in the similarity of ``z`` to both, averaged: a scalar. All are ``(N, D)``.

    Example:
        >>> z = torch.eye(2)
        >>> round(model_contrast(z, z, z, 0.5).item(), 4)  # log 2: nothing tells one from the other
        0.6931
    """
    similarity = torch.stack([cosine_similarity(z, received), cosine_similarity(z, previous)], dim=1)
    return cross_entropy(similarity / temperature, torch.zeros(len(z), dtype=torch.long, device=z.device))
