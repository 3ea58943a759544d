"""Intrinsic gradient compression: what trains moves in a random subspace, so that d numbers travel in place of D (arXiv 2112.02656)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from featherlight.plugins.base import Clock, Message, Plugin, Visit
from featherlight.plugins.projections import PROJECTIONS, Projection
from featherlight.plugins.seeds import derive
from featherlight.plugins.targets import find_targets

PREFIX = "intrinsic"


@dataclass
class _Span:
    """Rounds that share subspaces and the parameters that train.

    Args:
        number: counted from 0; names: of the parameters; size: D, how many numbers they have; position: θ₀ + Σ_k A_k·Σ_k, flat, float32 or
            wider (where nothing travels, nothing); sums: Σ, (K, d), float64; changed: the last round, before the one under way, in
            which each of the K may have changed; −1: none.
    """

    number: int
    names: list[str]
    size: int
    position: Tensor
    sums: Tensor
    changed: list[int] = field(default_factory=list)


class IntrinsicProjection(Plugin):
    """Parameters θ are θ₀ + Σ_k A_k·Σ_k with random A_k (D, d) that all draw from a seed: a client sends Aᵀ·(its change), d numbers,
    and is sent the Σ_k that it does not hold yet. Static with the defaults; ``subspaces`` K > 1: K-subspace; ``periods_per_span``:
    time-varying.

    Which learning rate: the part of a step that lies in the subspace is √(d/D) as long as the step. With ``gain="projection"`` the model
    moves by that part, so the full model's rate η is the lowest of use and η·D/d the highest (with ``gain="unbiased"``: η·d/D and η);
    in ``space="gradient"`` the local steps are whole ones and want η itself, and the gain alone says how far their change carries.
    Tune over decades: where training is stable, larger is better.

    The server's step must be the plain average. What is no parameter (running statistics) travels as it is. Under a Trainer, every
    optimizer step is projected, whatever the optimizer, so that the model trains in a subspace of d dimensions (arXiv 1804.08838).

    Args:
        dim: d, numbers that a client sends.
        subspaces: K; each client of a round draws one of them (``draw="client"``), or all the same one (``draw="round"``).
        periods_per_span: rounds after which new subspaces are drawn; None: never.
        projection: ``"fastfood"`` (O(D log D)) or ``"sparse_signs"`` (O(D)).
        space: ``"gradient"``: clients train freely and project their change once; ``"subspace"``: every step is projected.
        gain: what a projected change is multiplied by: ``"projection"``: d/D, as if A's columns were orthonormal, never longer than the
            change itself; ``"unbiased"``: 1, E[A·Aᵀ] = I, D/d times as long; or a number between.
        draw: who draws among K > 1 subspaces.
        known_start: clients have the first round's model (drawn from a seed, or pre-trained); otherwise a client's first visit sends it.

    Raises:
        ValueError: sizes out of range; in a federation, a server step other than the average.
    """

    same_for_all = True
    ordinary_server = False  # its weights are θ₀ + A·Σ, and nothing else would reach clients

    def __init__(
        self,
        dim: int = 65536,
        subspaces: int = 1,
        periods_per_span: int | None = None,
        projection: Literal["fastfood", "sparse_signs"] = "fastfood",
        space: Literal["gradient", "subspace"] = "gradient",
        gain: float | Literal["projection", "unbiased"] = "projection",
        draw: Literal["client", "round"] = "client",
        known_start: bool = True,
    ) -> None:
        for name, value in (("dim", dim), ("subspaces", subspaces), ("periods_per_span", periods_per_span)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: give 1 or more")
        for name, given, allowed in (
            ("projection", projection, tuple(PROJECTIONS)),
            ("space", space, ("gradient", "subspace")),
            ("draw", draw, ("client", "round")),
        ):
            if given not in allowed:
                raise ValueError(f"{name}={given!r} is not known; use {' or '.join(map(repr, allowed))}")
        if isinstance(gain, str) and gain not in ("projection", "unbiased"):
            raise ValueError(f"gain={gain!r} is not known; use 'projection', 'unbiased' or a number")
        if not isinstance(gain, str) and not gain > 0:
            raise ValueError(f"gain={gain}: give a number above 0")
        self.dim = dim
        self.subspaces = subspaces
        self.periods_per_span = periods_per_span
        self.projection = projection
        self.space = space
        self.gain = gain
        self.draw = draw
        self.known_start = known_start
        self._alone = False
        self._forget()

    def _forget(self) -> None:
        """As if nothing had been trained yet."""
        self._spans: list[_Span] = []
        self._round = -1
        self._maps: dict[tuple[int, int], Projection] = {}
        self._seed = 0
        self._before: Tensor | None = None
        self._visit = Visit(0)

    def in_place(self) -> IntrinsicProjection:
        """Work on one machine, where nothing travels: every step is projected.

        Raises:
            ValueError: more than one subspace, of which one machine would use one.
        """
        if self.subspaces > 1:
            raise ValueError(f"subspaces={self.subspaces}: on one machine there is one client, which draws one; use periods_per_span")
        self._alone = True
        return self

    # -- on the model being trained -------------------------------------------------------------------------------
    def attach(self, model: nn.Module) -> None:
        self._forget()
        self._model = model
        self._skip = tuple(f"{path}." for path in find_targets(model))

    def visit(self, visit: Visit) -> None:
        self._visit = visit
        if self._each_step:
            self._begin_round(visit)
            self._map(self._spans[-1].number, self._which(visit))  # before the steps, whose memory is measured

    def after_backward(self, clock: Clock) -> None:
        """An optimizer step comes next: where the parameters are now is where it starts from."""
        if self._each_step and self._before is None:  # the first of several optimizers
            self._before = self._now()

    def after_step(self, clock: Clock) -> None:
        """What the optimizer changed becomes its part in the subspace."""
        if self._before is None:
            return
        flat, self._before = self._before, None
        operator = self._map(self._spans[-1].number, self._which(self._visit))
        with torch.no_grad():
            for name, before in self._split(flat).items():  # the change takes the place of what was before: no third vector
                value = self._model.get_parameter(name)
                change = value - before
                value.copy_(before)
                before.copy_(change)
            z = operator.project_(flat) * self._gain(flat.numel())
            for name, inside in self._split(operator.lift(z, out=flat)).items():
                self._model.get_parameter(name).add_(inside)

    # -- federated: down ------------------------------------------------------------------------------------------
    def encode_down(self, message: Message, visit: Visit, kept: Collection[str] = ()) -> Message:
        self._begin_round(visit)
        vectors: Message = {}
        for span in self._spans:
            for which in range(self.subspaces):
                if span.changed[which] >= 0:
                    vectors[f"{PREFIX}.{span.number}.{which}@{span.changed[which]}"] = span.sums[which].float()
        missing = [name for name in vectors if name not in kept]
        now = set(self._spans[-1].names)
        resting = {name for span in self._spans[:-1] for name in span.names} - now  # where their spans' vectors left them
        size = self._spans[-1].size + sum(message[name].numel() for name in resting if name in message)
        stranger = not self.known_start and not any(name.startswith(f"{PREFIX}.") for name in kept)
        if stranger or len(missing) * self.dim >= size:
            held_now = {f"{PREFIX}.start@0": next(iter(message.values())).new_zeros(0)}
            return message | held_now | {name: vector.new_zeros(0) for name, vector in vectors.items()}
        start = {f"{PREFIX}.start@0": next(iter(message.values())).new_zeros(0)}
        return {name: value for name, value in message.items() if name not in now | resting} | start | vectors

    def decode_down(self, message: Message, visit: Visit) -> Message:
        rest = {name: value for name, value in message.items() if not name.startswith(f"{PREFIX}.")}
        if not message.keys().isdisjoint(self._spans[-1].names):
            return rest
        return rest | self._split(self._spans[-1].position)

    # -- federated: up --------------------------------------------------------------------------------------------
    def encode(self, message: Message, visit: Visit) -> Message:
        self._begin_round(visit)
        span = self._spans[-1]
        parameters = dict(self._model.named_parameters())
        others = {name: value for name, value in message.items() if name not in span.names}
        strangers = [name for name in others if name in parameters or name not in self._model.state_dict(keep_vars=True)]
        if strangers:
            raise ValueError(
                f"{strangers[0]} is not a parameter of the server's model that trains in this round: clients with modules of their own, "
                "smaller ones, have no subspace in common; leave one of the two methods out"
            )
        values = {name: message.get(name, parameters[name].new_zeros(()).expand(parameters[name].shape)) for name in span.names}
        first = next(iter(values.values()))
        if isinstance(first, FakeTensor):  # a prediction asks for the shape alone; hundreds of products without data take minutes
            return {f"{PREFIX}.z": first.new_zeros(self.dim), **others}
        change = self._flat(values)
        z = self._map(span.number, self._which(visit)).project_(change) * self._gain(change.numel())
        return {f"{PREFIX}.z": z, **others}

    def decode(self, message: Message, visit: Visit) -> Mapping[str, Any]:
        if self.subspaces == 1 or f"{PREFIX}.z" not in message:
            return message
        z = message[f"{PREFIX}.z"]
        placed = z.new_zeros(self.subspaces, self.dim)
        placed[self._which(visit)] = z
        return {**message, f"{PREFIX}.z": placed}

    def lift(self, total: Mapping[str, Any], clock: Clock) -> Mapping[str, Any]:
        total = dict(total)
        mean = total.pop(f"{PREFIX}.z", None)
        if mean is None:
            return total
        span = self._spans[-1]
        mean = mean.view(self.subspaces, self.dim)
        span.sums += mean
        moved = torch.empty_like(span.position)
        for which in range(self.subspaces):
            if bool(mean[which].any()):  # somebody drew it
                span.position += self._map(span.number, which).lift(mean[which].to(moved.dtype), out=moved)
        changes = self._split(moved.copy_(span.position))
        for name, change in changes.items():
            change -= self._model.get_parameter(name).detach()
        return {**total, **changes}

    def settle(self, server: nn.Module, clock: Clock) -> None:
        for name, value in self._split(self._spans[-1].position).items() if self._spans else ():
            now = self._model.get_parameter(name).detach()
            rounding = 4 * torch.finfo(now.dtype).eps * float(value.abs().max())
            if not torch.allclose(now, value.to(now.dtype), rtol=0, atol=rounding):
                raise ValueError("IntrinsicProjection needs the plain average as the server's step: use Average(), lr=1")

    # -- state ----------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        return {"round": self._round, "seed": self._seed, "spans": [dict(vars(span)) for span in self._spans]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._round, self._seed = state["round"], state["seed"]
        device = next(self._model.parameters()).device
        self._spans = [
            _Span(
                **{
                    **span,
                    "position": span["position"].to(device, copy=True),
                    "sums": span["sums"].to(device, copy=True),
                    "names": list(span["names"]),
                    "changed": list(span["changed"]),
                }
            )
            for span in state["spans"]
        ]
        self._maps = {}

    # -- helpers --------------------------------------------------------------------------------------------------
    @property
    def _each_step(self) -> bool:
        return self._alone or self.space == "subspace"

    def _covered(self) -> dict[str, Tensor]:
        """The parameters that train now, by name, whether or not the client at hand leaves some of them out."""
        return {
            name: value
            for name, value in self._model.named_parameters()
            if value.requires_grad and not name.startswith(self._skip or ("\0",))
        }

    def _now(self) -> Tensor:
        """Their values, flat."""
        return self._flat({name: self._model.get_parameter(name).detach() for name in self._spans[-1].names})

    def _begin_round(self, visit: Visit) -> None:
        """A new span where it is time for one, or where other parameters train now."""
        if self._round == visit.round and self._spans:
            return
        before, self._round, self._seed = self._round, visit.round, visit.seed
        live = self._covered()
        if self._spans:
            drawn = range(self.subspaces) if self.draw == "client" else [self._which(Visit(before, 0, visit.seed))]
            for which in drawn:
                self._spans[-1].changed[which] = before
            due = self.periods_per_span is not None and visit.round // self.periods_per_span > before // self.periods_per_span
            if self._spans[-1].names == list(live) and not due:
                return
        size = sum(value.numel() for value in live.values())
        if self.dim > size:
            raise ValueError(f"dim={self.dim}: {size} parameters train in this stage; give that many or fewer")
        values = [value.detach().flatten() for value in live.values()]
        position = values[0].new_zeros(0) if self._alone else torch.cat(values)
        if position.element_size() < 4:  # what many rounds add would be lost in rounding
            position = position.float()
        sums = torch.zeros(self.subspaces, self.dim, dtype=torch.float64, device=position.device)
        for span in self._spans:  # only their sums are needed any more, by those who were away
            span.position = position.new_zeros(0)
        self._spans.append(_Span(len(self._spans), list(live), size, position, sums, [-1] * self.subspaces))
        self._maps = {}

    def _map(self, span: int, which: int) -> Projection:
        if (span, which) not in self._maps:
            size = self._spans[-1].size
            self._maps[span, which] = PROJECTIONS[self.projection](size, self.dim, derive(self._seed, PREFIX, span, which))
        return self._maps[span, which]

    def _which(self, visit: Visit) -> int:
        """The subspace that a client uses."""
        if self.subspaces == 1:
            return 0
        parts = (visit.round, visit.client) if self.draw == "client" else (visit.round,)
        return Random(derive(visit.seed, *parts, PREFIX)).randrange(self.subspaces)

    def _gain(self, size: int) -> float:
        return {"projection": self.dim / size, "unbiased": 1.0}[self.gain] if isinstance(self.gain, str) else self.gain

    def _flat(self, entries: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([entries[name].flatten() for name in self._spans[-1].names])

    def _split(self, flat: Tensor) -> Message:
        names = self._spans[-1].names
        shapes = [self._model.get_parameter(name).shape for name in names]
        parts = flat.split([shape.numel() for shape in shapes])
        return {name: part.view(shape) for name, part, shape in zip(names, parts, shapes)}
