"""Client-level differential privacy: bounded updates, and noise on their sum (DP-FedAvg, arXiv 1710.06963)."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _NormBase

from featherlight.plugins.base import Clock, Message, Plugin, Visit
from featherlight.plugins.mechanism import Mechanism
from featherlight.plugins.rejection import Rejection
from featherlight.plugins.seeds import derive, generator
from featherlight.plugins.targets import find_targets

TOLERANCE = 10.0
"""So many times as long as honest clients' updates with their noise, an update is rejected."""
HAIR = 2.0**-40
"""A part of the bound that float64 stays below it: a norm of many numbers is rounded, too."""


class ClientPrivacy(Plugin):
    """A client scales all that it sends to a Euclidean norm of at most C, Δ ← Δ · min(1, C / ‖Δ‖₂); the server does it once more with what
    it reads, adds the updates up, each counting alike, adds N(0, (σ·C)²) to every number of the sum, once a round, and divides by the size
    that cohorts are to have, whoever came. Of each number that travels there is noise, whether or not somebody sent it this round.

    Behind what projects (``IntrinsicProjection``, ``FetchSGD``) noise falls on the numbers that are sent, d in place of D. The federation
    counts ε and tells it (``featherlight[privacy]``); what it tells of losses and of who was rejected is of clients and has no noise.
    For federations only: under a Trainer there is one client.

    Buffers do not travel: norms with running statistics are refused (``statistics``), and so is whatever else training changes in one.
    Noise is drawn in floating point: against who reads the last bits of weights (arXiv 2112.05307) it does not protect.

    Args:
        clip: C.
        noise_multiplier: σ; 0: none, and ε is infinite. ``featherlight.fed_loop.noise_for`` finds it for an ε.
        delta: δ: below 1 / clients.
        shares: n: clients add the noise, each N(0, (σ·C)² / n), so that the sum of n of them has it, as secure aggregation needs; where
            fewer come, the server adds what lacks. None: the server adds all of it.
        known_cohorts: count ε as if everybody knew who took part in which round. (They do where they know the run's seed.)
        statistics: of norms that keep running ones: ``"refuse"`` them; or have them ``"stay"`` with each client's turn, so that the
            server's are what they were, which is good for heads that nobody evaluates (SimCLR's projector).
        secret: noise is drawn not from the run's seed alone, which clients are told, but from 63 random bits of the server's, too, which
            are in checkpoints; that of ``shares`` from random bits of each turn, by which no run can be done again.

    Raises:
        ValueError: arguments out of range; a model with running statistics; a buffer that changes as a client trains.

    Example:
        >>> private = ClientPrivacy(clip=1.0, noise_multiplier=0.5)
        >>> private.attach(nn.Linear(2, 1))
        >>> private.encode({"weight": torch.tensor([[3.0, 4.0]])}, Visit(0))["weight"]
        tensor([[0.6000, 0.8000]])
    """

    alike = True
    bounds = True
    keeps_norm = True
    only_adds = "noise is for a sum of bounded updates"

    def __init__(
        self,
        clip: float,
        noise_multiplier: float,
        delta: float = 1e-5,
        shares: int | None = None,
        statistics: Literal["refuse", "stay"] = "refuse",
        known_cohorts: bool = False,
        secret: bool = False,
    ) -> None:
        if not 0 < clip < math.inf:
            raise ValueError(f"clip={clip}: give a norm above 0")
        if not 0 <= noise_multiplier < math.inf:
            raise ValueError(f"noise_multiplier={noise_multiplier}: give 0 or more")
        if not 0 < delta < 1:
            raise ValueError(f"delta={delta}: give a probability above 0 and below 1, best far below 1 / clients")
        if statistics not in ("refuse", "stay"):
            raise ValueError(f"statistics={statistics!r} is not known; use 'refuse' or 'stay'")
        if shares is not None and shares < 1:
            raise ValueError(f"shares={shares}: give how many clients' noises are enough, 1 or more, or leave it out")
        self.clip = clip
        self.noise_multiplier = noise_multiplier
        self.delta = delta
        self.shares = shares
        self.statistics = statistics
        self.known_cohorts = known_cohorts
        self.secret = secret

    def attach(self, model: nn.Module) -> None:
        self._buffers = frozenset(name for name, _ in model.named_buffers())
        skip = tuple(f"{path}." for path in find_targets(model)) or ("\0",)
        norms = [path for path, module in model.named_modules() if isinstance(module, _NormBase) and module.running_mean is not None]
        seen = [path for path in norms if not path.startswith(skip)]
        if seen and self.statistics == "refuse":
            raise ValueError(
                f'"{seen[0]}" keeps running statistics of clients\' data, which would travel without noise, and with it say nothing: use '
                'group norm (norm="group" in backbones of ssl_models), or statistics="stay" where nobody evaluates that part of the model'
            )
        self._changing = self._buffers - {f"{path}.{name}" for path in norms for name, _ in model.get_submodule(path).named_buffers()}
        self._secret = torch.zeros((), dtype=torch.int64, device=next(model.parameters()).device)
        self._seed, self._over, self._counted = 0, 1, 0

    def mechanism(self) -> Mechanism:
        return Mechanism(self.clip, self.noise_multiplier, self.delta, self.known_cohorts, self.shares)

    # -- a client ---------------------------------------------------------------------------------------------------
    def encode(self, message: Message, visit: Visit) -> Message:
        """At most ``clip`` long, without buffers.

        Raises:
            ValueError: a buffer changed.
        """
        self._seed = visit.seed
        for name in message.keys() & self._changing:
            if not isinstance(message[name], FakeTensor) and bool(message[name].any()):
                raise ValueError(
                    f'the buffer "{name}" changes as clients train, and would travel without noise: make the model without it, or have it '
                    "not be saved (persistent=False)"
                )
        sent = self._bounded({name: value for name, value in message.items() if name not in self._buffers})
        if not self.shares:
            return sent
        std = self.noise_multiplier * self.clip / math.sqrt(self.shares)
        drawn = int.from_bytes(os.urandom(7), "little") if self.secret else derive(visit.seed, visit.round, visit.client, "privacy")
        return {
            name: value + _noise(value, std, drawn, name).to(value) if value.is_floating_point() else value for name, value in sent.items()
        }

    # -- the server -------------------------------------------------------------------------------------------------
    def start(self) -> None:
        if self.secret:
            self._secret.fill_(int.from_bytes(os.urandom(8), "little") >> 1)

    def agree(self) -> list[Tensor]:
        return [self._secret] if self.secret else []

    def decode(self, message: Message, visit: Visit) -> Mapping[str, Any]:
        """At most ``clip`` long, whoever sent it; with ``shares``, where noise is in it already, not absurdly longer than that.

        Raises:
            Rejection: with ``shares``, :data:`TOLERANCE` times longer than bound and noise explain.
        """
        self._seed = visit.seed
        if not self.shares:
            return self._bounded(message)
        size = sum(value.numel() for value in message.values() if value.is_floating_point())
        noise = self.noise_multiplier * self.clip / math.sqrt(self.shares) * (math.sqrt(size) + 8)
        norm = float(_norm(message))
        if TOLERANCE * (self.clip + noise) < norm < math.inf:
            raise Rejection("norm", f"its norm is {norm:.3g}, and clip={self.clip:g} and its noise explain {self.clip + noise:.3g}")
        return message

    def summed(self, over: int, counted: int) -> None:
        self._over, self._counted = over, counted

    def lift(self, total: Mapping[str, Any], clock: Clock) -> Mapping[str, Any]:
        """The mean with noise; with ``shares``, with what clients that did not come have not added."""
        std = self.noise_multiplier * self.clip * math.sqrt(self.mechanism().lacking(self._counted)) / self._over
        drawn = derive(self._seed, int(self._secret), clock.period, "privacy")
        return {name: value + _noise(value, std, drawn, name).to(value) for name, value in total.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"secret": int(self._secret)} if self.secret else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._secret.fill_(state["secret"])

    # -- helpers ----------------------------------------------------------------------------------------------------
    def _bounded(self, message: Message) -> Message:
        """Scaled as a whole, a hair below the bound, so that rounding lifts nothing above it. What is not finite stays so, by which
        whoever adds up rejects it."""
        norm = _norm(message)
        scale = torch.where(norm.isfinite() & (norm > self.clip), self.clip / norm, 1.0)
        if not isinstance(scale, FakeTensor) and float(scale) == 1.0:
            return message
        return {
            name: (value.double() * (scale * (1 - max(torch.finfo(value.dtype).eps, HAIR)))).to(value.dtype)
            if value.is_floating_point()
            else value
            for name, value in message.items()
        }


def _norm(message: Message) -> Tensor:
    """Of all floating entries together."""
    norms = [torch.linalg.vector_norm(value.detach().double()) for value in message.values() if value.is_floating_point()]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), dtype=torch.float64)


def _noise(like: Tensor, std: float, seed: int, name: str) -> Tensor:
    """N(0, std²) of the shape of ``like``, float64, of its name's own."""
    if not std:
        return like.new_zeros(like.shape, dtype=torch.float64)
    return std * torch.randn(like.shape, generator=generator(seed, name), dtype=torch.float64)
