"""Intrinsic gradient compression: what trains moves in a random subspace, so that d numbers travel in place of D (arXiv 2112.02656)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from random import Random
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from featherlight.plugins.base import Change, Clock, Message, Plugin, Visit
from featherlight.plugins.lifted import lifted
from featherlight.plugins.present import held
from featherlight.plugins.projections import PROJECTIONS, Projection
from featherlight.plugins.seeds import derive
from featherlight.plugins.subspaces import PREFIX, Maps, Past, Span, check_gain, gain_of, heard, step_bytes, told
from featherlight.plugins.subspaces import nbytes as _bytes
from featherlight.plugins.targets import find_targets
from featherlight.plugins.trainable import check_stage, magnitude, refuse_more, trainable


class IntrinsicProjection(Plugin):
    """Parameters θ are θ₀ + Σ_k A_k·Σ_k with random A_k (D, d) that all draw from a seed: a client sends Aᵀ·(its change), d numbers,
    and is sent the Σ_k that it does not hold yet. Static with the defaults; ``subspaces`` K > 1: K-subspace; ``periods_per_span``:
    time-varying.

    Which gain and learning rate: a projected change is γ·√(D/d) as long as the change. The default γ = √(d/D) keeps its length, so begin
    with the full model's rate η. In ``space="subspace"`` and under a Trainer only the product γ·η matters to plain SGD; in
    ``space="gradient"`` local steps are whole ones and want η itself, and γ alone says how far their change carries. Tune γ over
    decades between d/D and 1: where training is stable, larger is better. ``python benchmarks/intrinsic_gain.py``, digits with d = 300 of
    55,210 at lr 0.3: 40.7 % with d/D, 85.5 % with √(d/D), diverged with 0.3; full model 93.6 %.

    The server's step must be the plain average; its momentum is this plugin's. What is no parameter (running statistics) travels as it
    is. The optimizer's weight decay draws towards 0, of which the part in the subspace is what moves: set it to 0 where θ₀ is worth
    keeping. Under a Trainer, every optimizer step is projected, whatever the optimizer, so that the model trains in a subspace of d
    dimensions (arXiv 1804.08838).

    Args:
        dim: d, numbers that a client sends.
        subspaces: K; each client of a round draws one of them (``draw="client"``), or all the same one (``draw="round"``).
        periods_per_span: rounds after which new subspaces are drawn; None: never.
        projection: ``"fastfood"`` (O(D log D)) or ``"sparse_signs"`` (O(D)).
        space: ``"gradient"``: clients train freely and project their change once; ``"subspace"``: every step is projected, and what is
            sent is the sum of what the steps made in the subspace, whatever else a plugin made of the parameters' changes.
        gain: γ, what a projected change is multiplied by: ``"length"``: √(d/D); ``"projection"``: d/D, as if A's columns were
            orthonormal, √(d/D) as long as the change; ``"unbiased"``: 1, E[A·Aᵀ] = I, √(D/d) times as long; or a number.
        draw: who draws among K > 1 subspaces.
        known_start: clients have the first round's model (drawn from a seed, or pre-trained); if not, a client's first visit sends it, and
            so does the first since others train.
        momentum: β of the server: v_k ← β·v_k + mean, Σ_k ← Σ_k + v_k for each k that was drawn. New subspaces begin with v = 0.
        serve: ``"changed"``: a client is sent the Σ_k that changed since it had them; ``"all"``: all K count as changed in every round,
            as in the paper's table.
        down_bits: of a number of the steps that Σ takes, 2 to 8, where clients are to be sent those: rounded to the nearest, what is left
            over added to the next step; a client for which Σ itself is less, names counted, gets that, in float32. 32: Σ always. For the
            way up, put a :class:`Quantization` behind this plugin.

    Raises:
        ValueError: sizes out of range; in a federation, a server step other than the average, or weights that something else moved.
    """

    same_for_all = True
    renames = keeps_norm = True
    only_adds = "clients send coordinates of which the sums mean something, each of them a part of every parameter"
    ordinary_server = False  # its weights are θ₀ + A·Σ, and nothing else would reach clients

    def __init__(
        self,
        dim: int = 65536,
        subspaces: int = 1,
        periods_per_span: int | None = None,
        projection: Literal["fastfood", "sparse_signs"] = "fastfood",
        space: Literal["gradient", "subspace"] = "gradient",
        gain: float | Literal["length", "projection", "unbiased"] = "length",
        draw: Literal["client", "round"] = "client",
        known_start: bool = True,
        momentum: float = 0.0,
        serve: Literal["changed", "all"] = "changed",
        down_bits: int = 32,
    ) -> None:
        for name, value in (("dim", dim), ("subspaces", subspaces), ("periods_per_span", periods_per_span)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise ValueError(f"{name}={value!r}: give a whole number")
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: give 1 or more")
        for name, given, allowed in (
            ("projection", projection, tuple(PROJECTIONS)),
            ("space", space, ("gradient", "subspace")),
            ("draw", draw, ("client", "round")),
            ("serve", serve, ("changed", "all")),
        ):
            if given not in allowed:
                raise ValueError(f"{name}={given!r} is not known; use {' or '.join(map(repr, allowed))}")
        check_gain(gain)
        if isinstance(momentum, str) or not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum!r}: give 0 <= momentum < 1")
        if down_bits != 32 and not (isinstance(down_bits, int) and 2 <= down_bits <= 8):
            raise ValueError(f"down_bits={down_bits!r}: give 2 to 8, or 32 for float32")
        if down_bits != 32 and serve == "all":
            raise ValueError(f"down_bits={down_bits} sends the steps that clients lack, and serve='all' everything: leave one of them out")
        self.dim = dim
        self.subspaces = subspaces
        self.periods_per_span = periods_per_span
        self.projection = projection
        self.space = space
        self.gain = gain
        self.draw = draw
        self.known_start = known_start
        self.momentum = momentum
        self.serve = serve
        self.down_bits = down_bits
        self._alone = False
        self._forget()

    def _forget(self) -> None:
        """As if nothing had been trained yet."""
        self._spans: list[Span] = []
        self._past = Past()
        self._round = -1
        self._drawn: set[int] = set()
        self._maps = Maps(self.projection, self.dim)
        self._seed = 0
        self._before: Tensor | None = None
        self._moved: Tensor | None = None
        self._visit = Visit(0)
        self._largest: dict[str, float] = {}  # magnitudes that the round's change was rounded at

    def in_place(self) -> IntrinsicProjection:
        """Work on one machine, where nothing travels: every step is projected.

        Raises:
            ValueError: more than one subspace, of which one machine would use one.
        """
        if self.subspaces > 1:
            raise ValueError(f"subspaces={self.subspaces}: on one machine there is one client, which draws one; use periods_per_span")
        self._alone = True
        return self

    @property
    def sends_parts(self) -> bool:
        return self.subspaces > 1 and self.draw == "client"

    # -- on the model being trained -------------------------------------------------------------------------------
    def attach(self, model: nn.Module) -> None:
        self._forget()
        self._model = model
        self._targets = find_targets(model)

    def advance(self, clock: Clock) -> Change:
        """What an optimizer remembers of steps in one subspace is void in the next."""
        due = self.periods_per_span is not None and clock.period > 0 and clock.period % self.periods_per_span == 0
        return Change(renewed=tuple(trainable(self._model, self._targets).values())) if due and clock.step == 0 else Change()

    def check(self, stage: int) -> None:
        check_stage("dim", self.dim, self._model, self._targets, stage)

    def visit(self, visit: Visit) -> None:
        self._visit, self._before = visit, None
        if self._each_step:
            self._begin_round(visit)
            span = self._spans[-1]
            self._map(span.number, self._which(visit))  # before the steps, whose memory is measured
            self._moved = span.sums[0] if self._alone else span.sums.new_zeros(self.dim)

    def after_backward(self, clock: Clock) -> None:
        """An optimizer step comes next: where the parameters are now is where it starts from."""
        if self._each_step and self._before is None:  # the first time, where an optimizer asks for gradients again and again
            before = self._flat({name: self._model.get_parameter(name).detach() for name in self._spans[-1].names})
            self._before = before.float() if before.element_size() < 4 else before

    def after_update(self, clock: Clock) -> None:
        """What the optimizer changed becomes its part in the subspace."""
        if self._before is None or self._moved is None:
            return
        flat, self._before, span = self._before, None, self._spans[-1]
        operator = self._map(span.number, self._which(self._visit))
        with torch.no_grad():
            for name, before in self._split(flat).items():  # the change takes the place of what was before: no third vector
                value = self._model.get_parameter(name)
                change = value - before
                value.copy_(before)
                before.copy_(change)
            z = operator.project_(flat) * gain_of(self.gain, self.dim, flat.numel())
            self._moved += z
            anchored = len(span.position) > 0
            operator.lift(self._moved.to(flat) if anchored else z, out=flat)
            if anchored:  # rounded once, however many steps there were
                flat += span.position
            for name, inside in self._split(flat).items():
                value = self._model.get_parameter(name)
                value.copy_(inside if anchored else inside.add_(value))

    # -- federated: down ------------------------------------------------------------------------------------------
    def encode_down(self, message: Message, visit: Visit, kept: Collection[str] = ()) -> Message:
        """Vectors that the client lacks, float32, or the model, where that is less or such old vectors are kept no more.

        With the model come the sums of the span under way, so that the client can go on from there with vectors; it is then marked as
        having those of earlier spans. Where those sums are more than the model, that comes alone, without a mark: the start and the vectors
        that the client had it still has, and goes on from when it is sent vectors again.
        """
        self._begin_round(visit)
        owed = [span.owed(kept) for span in self._spans]
        sums = {name: value for own, _ in owed for name, value in own.items()}
        vectors = {name: value for _, sent in owed for name, value in sent.items()}
        covered = set(self._past.names).union(*(span.names for span in self._spans))  # those of earlier spans are where vectors left them
        whole = {name: value for name, value in message.items() if name in covered}
        rest = {name: value for name, value in message.items() if name not in covered}
        nothing = next(iter(message.values())).new_zeros(0)
        start = {f"{PREFIX}.start@{self._newest}": nothing}
        earlier, now = (
            _bytes(value for _, sent in some for name, value in sent.items() if name not in kept) for some in (owed[:-1], owed[-1:])
        )
        model, latest = _bytes(whole.values()), owed[-1][0]
        past = {self._past.marker: nothing} if self._past.count else {}
        behind = (not self.known_start and next(iter(start)) not in kept) or self._past.lacking(kept) or earlier >= model
        if (_bytes(value for name, value in latest.items() if name not in kept) if behind else now) >= model:
            return message | {name: value for name, value in (start | past | sums).items() if name in kept}
        if behind:
            absent = whole.keys() - held(self._model).keys()  # of blocks that this visit leaves out, and a later one may not
            apart = {f"{PREFIX}.{name}@{visit.round}": whole[name] for name in message if name in absent}
            return message | start | past | apart | {name: value if name in latest else value.new_zeros(0) for name, value in sums.items()}
        return rest | start | past | vectors

    def decode_down(self, message: Message, visit: Visit) -> Message:
        """θ₀ + Σ_k A_k·Σ_k, for which a real client lifts what it was sent; a simulated one takes the server's, equal to rounding."""
        rest = {name: value for name, value in message.items() if not name.startswith(f"{PREFIX}.")}
        if not message.keys().isdisjoint(self._spans[-1].names):
            return rest
        return rest | self._split(self._spans[-1].position)

    def tell(self) -> dict[str, Any]:
        return told(self._past, self._spans)

    def hear(self, news: dict[str, Any], visit: Visit) -> None:
        sizes = {name: value.numel() for name, value in self._model.named_parameters()}
        self._past, self._spans = heard(news, sizes, self.dim, next(self._model.parameters()).device)
        self._round, self._seed = visit.round, visit.seed

    def rebuild(self, message: Message, before: Message, visit: Visit) -> Message:
        """θ₀ + Σ_k A_k·Σ_k, lifted: the server's weights, to rounding."""
        entries = lifted(message, before, self._past, self._spans, self._maps, self._seed, self.down_bits)
        self._spans[-1].position = self._flat(entries).to(self._spans[-1].sums.device)
        return entries

    # -- federated: up --------------------------------------------------------------------------------------------
    def encode(self, message: Message, visit: Visit) -> Message:
        self._begin_round(visit)
        span = self._spans[-1]
        if f"{PREFIX}.z" in message:
            raise ValueError("IntrinsicProjection stands twice among the plugins: leave one of them out")
        parameters = dict(self._model.named_parameters())
        others = {name: value for name, value in message.items() if name not in span.names}
        strangers = [name for name in others if name in parameters or name not in self._model.state_dict(keep_vars=True)]
        if strangers:
            raise ValueError(
                f"{strangers[0]} is not a parameter of the server's model that trains in this round: IntrinsicProjection goes before "
                "plugins that change what clients send, and beside none that gives them parameters of their own; leave one of them out"
            )
        values = {name: message.get(name, parameters[name].new_zeros(()).expand(parameters[name].shape)) for name in span.names}
        return {f"{PREFIX}.z": self._coordinates(values, visit), **others}

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
        self._drawn = set()
        if mean is None:
            return total
        span = self._spans[-1]
        for name, value in self._split(span.position).items():
            now = self._model.get_parameter(name).detach()
            if not torch.equal(now, value.to(now.dtype)):
                raise ValueError(
                    f"something moved {name} out of the subspace since the round began: leave it out beside IntrinsicProjection"
                )
        moved = torch.empty_like(span.position)
        for which, step in enumerate(mean.view(self.subspaces, self.dim)):
            if not bool(step.any()):  # nobody drew it
                continue
            self._drawn.add(which)
            if self.momentum:
                step = span.velocity[which].mul_(self.momentum).add_(step)
            if self.down_bits < 32:
                step, code = span.quantise(which, step, self.down_bits)
                span.keep(which, clock.period, code, self.down_bits)
            span.sums[which] += step
            span.position += self._map(span.number, which).lift(step.to(moved.dtype), out=moved)
        changes = self._split(moved.copy_(span.position))
        for name, change in changes.items():
            before = self._model.get_parameter(name).detach()
            self._largest[name] = magnitude(before)
            change -= before
        return {**total, **changes}

    def arrive(self, visits: Sequence[Visit], everywhere: bool = False) -> None:
        self._drawn = set(range(self.subspaces)) if everywhere else {self._which(visit) for visit in visits}

    def settle(self, server: nn.Module, clock: Clock) -> None:
        """The server's weights are θ₀ + Σ_k A_k·Σ_k, rounded once."""
        with torch.no_grad():
            for name, value in self._split(self._spans[-1].position).items() if self._spans else ():
                now = self._model.get_parameter(name)
                if not now.numel():
                    continue
                rounding = 4 * torch.finfo(now.dtype).eps * max(magnitude(value), self._largest.get(name, 0.0))
                if not float((value - now).abs_().max()) <= rounding:
                    raise ValueError("IntrinsicProjection needs the plain average as the server's step: use Average(), lr=1")
                now.copy_(value)
        self._largest = {}

    # -- state ----------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        spans = [span.state() for span in self._spans]
        return {"round": self._round, "seed": self._seed, "drawn": sorted(self._drawn), "spans": spans, "past": dict(vars(self._past))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._round, self._seed, self._drawn = state["round"], state["seed"], set(state["drawn"])
        device = next(self._model.parameters()).device
        self._spans = [Span.of(span, device) for span in state["spans"]]
        self._past = Past(**state["past"])
        self._maps.clear()

    # -- helpers --------------------------------------------------------------------------------------------------
    @property
    def _each_step(self) -> bool:
        return self._alone or self.space == "subspace"

    @property
    def _newest(self) -> int:
        """The first span that has all parameters that any had: who knows its start knows theirs."""
        return 0 if self.known_start else self._past.newest_with(self._spans)

    def _coordinates(self, values: Message, visit: Visit) -> Tensor:
        """What a client sends of its change, (d,)."""
        first = next(iter(values.values()))
        if self._each_step:
            return first.new_zeros(self.dim) if self._moved is None else self._moved.to(first.dtype, copy=True)
        if isinstance(first, FakeTensor) or not any(bool(value.any()) for value in values.values()):
            return first.new_zeros(self.dim)  # for its shape a prediction asks, to which products take minutes, and a round's beginning
        change = self._flat(values)
        return self._map(self._spans[-1].number, self._which(visit)).project_(change) * gain_of(self.gain, self.dim, change.numel())

    def _begin_round(self, visit: Visit) -> None:
        """A new span where it is time for one, or where other parameters train now."""
        if self._round == visit.round and self._spans:
            return
        before, self._round, self._seed = self._round, visit.round, visit.seed
        live = trainable(self._model, self._targets)
        if self._spans:
            last = self._spans[-1]
            for which in self._drawn if self.serve == "changed" else range(self.subspaces):
                last.changed[which] = before
                if self.down_bits < 32 and [which, before] not in last.steps:  # a prediction, which adds nothing up
                    last.keep(which, before, last.codes.new_zeros(step_bytes(self.dim, self.down_bits)), self.down_bits)
            self._drawn = set()
            due = self.periods_per_span is not None and visit.round // self.periods_per_span > before // self.periods_per_span
            if self._spans[-1].names == list(live) and not due:
                return
        size = sum(value.numel() for value in live.values())
        refuse_more("dim", self.dim, size)
        values = [value.detach().flatten() for value in live.values()]
        exact = all(value.element_size() >= 4 for value in values)
        position = values[0].new_zeros(0) if self._alone and exact else torch.cat(values)
        if position.element_size() < 4:  # what many rounds add would be lost in rounding
            position = position.float()
        number = self._spans[-1].number + 1 if self._spans else 0
        if self._spans:
            self._spans[-1].finish()
            names = set(self._past.names).union(*(span.names for span in self._spans))
            self._past.take(self._spans, _bytes(self._model.get_parameter(name) for name in names))
        sums, steps = (self.subspaces, self.dim), self.down_bits < 32
        self._spans.append(Span.begun(number, list(live), size, position, sums, self.momentum > 0, steps))
        self._maps.clear()

    def _map(self, span: int, which: int) -> Projection:
        return self._maps.get(self._spans[-1].size, self._seed, span, which)

    def _which(self, visit: Visit) -> int:
        """The subspace that a client uses."""
        if self.subspaces == 1:
            return 0
        parts = (visit.round, visit.client) if self.draw == "client" else (visit.round,)
        return Random(derive(visit.seed, *parts, PREFIX)).randrange(self.subspaces)

    def _flat(self, entries: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([entries[name].flatten() for name in self._spans[-1].names])

    def _split(self, flat: Tensor) -> Message:
        names = self._spans[-1].names
        shapes = [self._model.get_parameter(name).shape for name in names]
        parts = flat.split([shape.numel() for shape in shapes])
        return {name: part.view(shape) for name, part, shape in zip(names, parts, shapes)}
