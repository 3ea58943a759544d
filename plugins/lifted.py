"""What a client that lives elsewhere makes of its messages: the model that it had, moved by what the sums of subspaces have moved since.

It knows nothing of the server but names, shapes and the seed. What it has between its turns lies among its entries, under names of its
own: the sums that its model contains (empty where their span is over), and that model, where it trained another in its last turn.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from featherlight.plugins.base import Message
from featherlight.plugins.subspaces import PREFIX, Maps, Past, Span, step_of

BASE = f"{PREFIX}.base."
_SUM = re.compile(rf"{PREFIX}\.(\d+)\.(\d+)@(\d+)")
_STEP = re.compile(rf"{PREFIX}\.(\d+)\.(\d+)\+(\d+)")

Sums = dict[tuple[int, int], tuple[int, Tensor]]
"""By span and subspace: the round in which it last changed, and Σ, (d,), float64, or nothing."""


def lifted(message: Message, before: Message, past: Past, spans: Sequence[Span], maps: Maps, seed: int, bits: int) -> Message:
    """All entries that the client has now: the model's, parameters in float32 or wider, and its own.

    Args:
        message: as it travelled, entries that are no parameters of ``spans`` included.
        before: what this function gave last, or the model as every client makes it.
        past: what was before ``spans``; spans: up to the one under way, with ``number``, ``names``, ``size``, and where to compute.
        bits: of a number of a step.
    """
    names = dict.fromkeys([*past.names, *(name for span in spans for name in span.names)])
    by_number = {span.number: span for span in spans}
    model = {name: value for name, value in message.items() if name in names}
    rest = {name: value for name, value in message.items() if not name.startswith(f"{PREFIX}.") and name not in names}
    alone = bool(model) and not any(name.startswith(f"{PREFIX}.") for name in message)
    sums = _sums(before)
    had = {name: _wide(before[name]) for name in names}  # what came alone, or with the model, and does not come again, is among it
    base = had if model and not alone else {name: _wide(before.get(BASE + name, before[name])) for name in names}
    if not alone:  # else the model is for this turn, and the client keeps the one that its sums go with
        came = _came(message, sums, spans[-1].sums.shape[1], bits)
        if model:
            base |= {name: value.to(base[name]) for name, value in (model | _absent(message, names)).items()}
        else:
            for (number, which), (_, sum) in came.items():
                _, last = sums.get((number, which), (0, sum[:0]))
                span = by_number[number]
                moved = (sum - last if len(last) else sum).to(span.sums.device, torch.float32)
                _move(base, span, maps.get(span.size, seed, number, which).lift(moved))
        newest = spans[-1].number
        sums = {
            place: (round, sum if place[0] == newest else sum[:0])
            for place, (round, sum) in (sums | came).items()
            if place[0] >= past.count
        }
    entries = had | model if alone else base
    own = {f"{PREFIX}.{number}.{which}@{round}": sum for (number, which), (round, sum) in sums.items()}
    own |= {BASE + name: value for name, value in base.items() if alone}
    return rest | entries | own


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.element_size() < 4 else value


def _sums(entries: Message) -> Sums:
    found = ((_SUM.fullmatch(name), value) for name, value in entries.items())
    return {(int(match[1]), int(match[2])): (int(match[3]), value.double()) for match, value in found if match}


def _came(message: Message, had: Sums, dim: int, bits: int) -> Sums:
    """The sums that ``message`` makes others than the client ``had``; of their steps, those that it has taken already count no more."""
    steps: dict[tuple[int, int], dict[int, Tensor]] = {}
    for match, code in ((_STEP.fullmatch(name), value) for name, value in message.items()):
        if match:
            steps.setdefault((int(match[1]), int(match[2])), {})[int(match[3])] = code
    came: Sums = {}
    for place, (round, sum) in _sums(message).items():
        last, own = had.get(place, (-1, sum[:0]))
        if round == last:
            continue
        if place in steps:
            sum = own if len(own) else sum.new_zeros(dim)
            for of in sorted(of for of in steps[place] if of > last):
                sum = sum + step_of(steps[place][of], dim, bits)
        came[place] = round, sum
    return came


def _absent(message: Message, names: Collection[str]) -> Message:
    """Entries of blocks that this turn leaves out, from names of their own."""
    parts = ((name.removeprefix(f"{PREFIX}.").rpartition("@")[0], value) for name, value in message.items() if not _SUM.fullmatch(name))
    return {name: value for name, value in parts if name in names}


def _move(base: Message, span: Span, flat: Tensor) -> None:
    for name, part in zip(span.names, flat.split([base[name].numel() for name in span.names])):
        base[name] = base[name] + part.view_as(base[name]).to(base[name])
