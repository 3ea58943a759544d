"""Subspaces of the parameters that train: rounds that share some, and their maps, of which only a few lie in memory at once."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from featherlight.plugins.projections import PROJECTIONS, Projection
from featherlight.plugins.quantization import most, pack, quantised, unpack
from featherlight.plugins.seeds import derive

PREFIX = "intrinsic"
_SUM = re.compile(rf"{PREFIX}\.(\d+)\.\d+@\d+")
GAINS = {"length": 0.5, "projection": 1.0, "unbiased": 0.0}
"""Gains by name, as powers of d/D."""
ENTRY = 72
"""Bytes that a message takes to say an entry's name, type, shape and place, about."""


@dataclass
class Span:
    """Rounds that share K subspaces of d dimensions and the parameters that train.

    Args:
        number: counted from 0; names: of the parameters; size: D, how many numbers they have.
        position: θ₀ + Σ_k A_k·Σ_k, flat, float32 or wider; on one machine θ₀, or nothing where the parameters say it as exactly.
        sums: Σ, (K, d), float64; once the span is over float32, and only of those among the K that anybody may still be sent.
        rows: once the span is over, which of the K ``sums`` has.
        velocity: what momentum made of past rounds, (K, d), float64; without momentum nothing.
        changed: the last round, before the one under way, in which each of the K changed; −1: none.
        unsent: what quantised steps have left over of Σ, (K, d), float64; where steps are not quantised nothing.
        steps: [which of the K, round] of the quantised steps that are kept; codes: their contents, uint8, (steps, bytes).
        dropped: the last round of each of the K whose step is kept no more; −1: none.
    """

    number: int
    names: list[str]
    size: int
    position: Tensor
    sums: Tensor
    velocity: Tensor
    changed: list[int] = field(default_factory=list)
    unsent: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    steps: list[list[int]] = field(default_factory=list)
    codes: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.uint8))
    dropped: list[int] = field(default_factory=list)
    rows: list[int] | None = None

    @classmethod
    def begun(cls, number: int, names: list[str], size: int, position: Tensor, sums: tuple[int, int], momentum: bool, steps: bool) -> Span:
        """One of whose sums, (K, d) as told, nothing has changed yet, with ``momentum``, and quantised ``steps``, or without."""
        zeros, never = torch.zeros(sums, dtype=torch.float64, device=position.device), [-1] * sums[0]
        velocity, unsent = (zeros.clone() if wanted else zeros[:0].clone() for wanted in (momentum, steps))
        return cls(number, names, size, position, zeros, velocity, never, unsent, dropped=list(never) if steps else [])

    def quantise(self, which: int, step: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """The step that Σ takes in place of ``step``, float64, (d,), and how it travels; what is left over goes to the next one."""
        whole = step + self.unsent[which]
        scale, numbers = quantised(whole, bits)
        taken = numbers * scale.double()
        self.unsent[which] = whole - taken
        return taken, torch.cat([scale.view(1).view(torch.uint8), pack(numbers + most(bits), bits)])

    def keep(self, which: int, round: int, code: Tensor, bits: int) -> None:
        """Note a quantised step; so many are kept as have together fewer bits a number than Σ in float32."""
        self.codes = torch.cat([self.codes.view(-1, len(code)) if len(self.codes) else code[None, :][:0], code[None, :]])
        self.steps.append([which, round])
        own = [place for place, (of, _) in enumerate(self.steps) if of == which]
        if len(own) * bits >= 32:
            self.dropped[which] = self.steps.pop(own[0])[1]
            self.codes = torch.cat([self.codes[: own[0]], self.codes[own[0] + 1 :]])

    def since(self, which: int, round: int) -> dict[int, Tensor] | None:
        """The steps that Σ of ``which`` took after ``round``, by their rounds; None where some of them are kept no more."""
        if not self.dropped or self.dropped[which] > round:
            return None
        return {of: code for (place, of), code in zip(self.steps, self.codes) if place == which and of > round}

    def finish(self) -> None:
        """Let go what only rounds of the span itself need: what clients that were away may still be sent is left."""
        nothing = torch.zeros(0, dtype=torch.float64)
        self.position, self.velocity, self.unsent = self.position.new_zeros(0), nothing, nothing.clone()
        whole = {name for name, value in self.owed(())[1].items() if len(value)}
        self.rows = [which for which, changed in enumerate(self.changed) if f"{PREFIX}.{self.number}.{which}@{changed}" in whole]
        self.sums = self.sums[self.rows].float()

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

    def _sum(self, which: int) -> Tensor:
        """Σ of ``which``, float32, (d,); empty where the span is over and steps are sent in its place."""
        if self.rows is None:
            return self.sums[which].float()
        return self.sums[self.rows.index(which)] if which in self.rows else self.sums.new_zeros(0)

    def owed(self, kept: Collection[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The Σ_k that are not 0, float32, by names of their own, and what is sent in their place to a client that has ``kept``:
        themselves, or an empty one beside the steps from what the client has to them."""
        sums: dict[str, Tensor] = {}
        sent: dict[str, Tensor] = {}
        for which, changed in enumerate(self.changed):
            if changed < 0:
                continue
            part = f"{PREFIX}.{self.number}.{which}"
            name = f"{part}@{changed}"
            sums[name] = sent[name] = own = self._sum(which)
            if name in kept or not self.dropped:
                continue
            has = max((int(had.rpartition("@")[2]) for had in kept if had.startswith(f"{part}@")), default=-1)
            steps = self.since(which, has)
            if steps is not None and (not len(own) or sum(len(code) + ENTRY for code in steps.values()) < 4 * len(own)):
                sent[name] = sums[name].new_zeros(0)
                sent |= {f"{part}+{round}": code for round, code in steps.items()}
        return sums, sent


@dataclass
class Past:
    """Spans that are kept no more, the first ``count`` of all, since whoever lacks them is sent the model.

    Args:
        names: of the parameters that trained in them; newest: the last of them that had parameters which none before it had.
        final: what those are known to have who have had the last of them that moved anything, by :meth:`Span.owed`.
    """

    count: int = 0
    names: list[str] = field(default_factory=list)
    newest: int = 0
    final: list[str] = field(default_factory=list)

    @property
    def marker(self) -> str:
        """What stands for all of them in messages."""
        return f"{PREFIX}.past@{self.count}"

    def lacking(self, kept: Collection[str]) -> bool:
        """Whether a client that has ``kept`` lacks some of it: it was not there since."""
        if not self.count or self.marker in kept or (self.final and all(name in kept for name in self.final)):
            return False
        numbers = (found[1] for name in kept if (found := _SUM.fullmatch(name)))
        return not any(int(number) >= self.count for number in numbers)

    def newest_with(self, spans: Sequence[Span]) -> int:
        """The first of all spans, ``spans`` being those since, that has all parameters that any had: who knows its start knows theirs."""
        seen, newest = set(self.names), self.newest
        for span in spans:
            newest = newest if seen.issuperset(span.names) else span.number
            seen.update(span.names)
        return newest

    def take(self, spans: list[Span], model: int) -> None:
        """Of ``spans``, which are over, let those go after which as much came as the ``model`` has, in bytes."""
        since = 0
        for place in reversed(range(len(spans))):
            if since >= model:
                gone = spans[: place + 1]
                del spans[: place + 1]
                self.newest, self.count = self.newest_with(gone), gone[-1].number + 1
                self.names += [name for name in dict.fromkeys(name for span in gone for name in span.names) if name not in set(self.names)]
                self.final = next((final for span in reversed(gone) if (final := [*span.owed(())[0]])), self.final)
                return
            since += nbytes(spans[place].owed(())[1].values())


def nbytes(values: Iterable[Tensor]) -> int:
    """Bytes of all of them."""
    return sum(value.numel() * value.element_size() for value in values)


def check_gain(gain: float | str) -> None:
    """Refuse a gain that is none.

    Raises:
        ValueError: it is.
    """
    if isinstance(gain, str) and gain not in GAINS:
        raise ValueError(f"gain={gain!r} is not known; use {', '.join(map(repr, GAINS))} or a number")
    if not isinstance(gain, str) and (isinstance(gain, bool) or not isinstance(gain, int | float) or not 0 < gain < float("inf")):
        raise ValueError(f"gain={gain!r}: give a number above 0, or {', '.join(map(repr, GAINS))}")


def gain_of(gain: float | str, dim: int, size: int) -> float:
    """γ for d = ``dim`` of D = ``size``."""
    return (dim / size) ** GAINS[gain] if isinstance(gain, str) else gain


def told(past: Past, spans: Sequence[Span]) -> dict[str, Any]:
    """Which parameters each span trains, and all before them, as plain data."""
    sets = list(dict.fromkeys(tuple(span.names) for span in spans))
    return {"past": past.names, "count": past.count, "names": sets, "spans": [sets.index(tuple(span.names)) for span in spans]}


def heard(told: Mapping[str, Any], sizes: Mapping[str, int], dim: int, device: torch.device) -> tuple[Past, list[Span]]:
    """From :func:`told`: spans of whose sums nothing is known yet, and what was before them."""
    nothing = torch.zeros(0, dim, dtype=torch.float64, device=device)
    names = [list(told["names"][of]) for of in told["spans"]]
    spans = enumerate(names, told["count"])
    return Past(told["count"], list(told["past"])), [
        Span(number, own, sum(sizes[name] for name in own), nothing, nothing, nothing) for number, own in spans
    ]


def step_bytes(dim: int, bits: int) -> int:
    """Bytes of a quantised step: a scale, and ``dim`` numbers."""
    return 4 + -(-dim // 8) * bits


def step_of(code: Tensor, dim: int, bits: int) -> Tensor:
    """A step, float64, (d,), from what travelled."""
    scale = code[:4].clone().view(torch.float32).double()
    return (unpack(code[4:], bits, dim) - most(bits)) * scale


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
