"""Which parts of a model clients train, hold frozen and do without, round by round: read off the plans that prediction prices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.optim import Optimizer

from featherlight.fed_loop.cohort import asked
from featherlight.fed_loop.federation import Federation
from featherlight.fed_loop.local_step import LocalStep
from featherlight.fed_loop.predict import precision_of, with_memory
from featherlight.fed_loop.trainees import Trainee, Trainees
from featherlight.plugins import Chain, Clock, Plugin, Visit, find_targets

MOST_ROUNDS, MOST_CLIENTS = 120, 8
"""Rounds, evenly spaced, and clients of each that are looked at: a picture shows no more."""


class Timeline(NamedTuple):
    """What clients do with each part of a model.

    Args:
        rounds: those looked at, ascending; parts: names, from the input up.
        trained, frozen: ``[part][round]``, the share of the round's clients, 0 to 1, that train something of the part, and that hold it
            and train nothing of it. The rest do without it.
    """

    rounds: list[int]
    parts: list[str]
    trained: list[list[float]]
    frozen: list[list[float]]


def timeline(
    settings: Federation, make_module: Callable[[], nn.Module], num_clients: int, plugins: Sequence[Plugin] = ()
) -> Timeline | None:
    """The parts of a model over a run's rounds, without training, and without memory for tensors.

    Args:
        make_module: builds the LightningModule; called where its tensors get no memory.
        plugins: attached to nothing.

    Returns:
        Nothing where rounds divide the model between devices and server.
    """
    with torch.device("meta"):
        module = precision_of(settings).convert_module(make_module())
    with FakeTensorMode(allow_non_fake_inputs=True):
        module, chain = with_memory(module), Chain(plugins)
        blank, targets = chain.anew(), find_targets(module)
        chain.attach(module)
        try:
            step = partial(LocalStep, precision=precision_of(settings), clip=settings.clip)
            own = Trainee(module, chain, targets, step, _as_it_is)
            return _over_rounds(settings, num_clients, own, Trainees(own, blank, step, _as_it_is))
        finally:
            chain.detach()


def _over_rounds(settings: Federation, num_clients: int, own: Trainee, trainees: Trainees) -> Timeline | None:
    part_of = parts_of(name for name, value in own.live.items() if isinstance(value, nn.Parameter))
    parts = list(dict.fromkeys(part_of.values()))
    found = Timeline(_spaced(settings.rounds), parts, [[] for _ in parts], [[] for _ in parts])
    for round in found.rounds:
        own.begin(Clock(round, 0))
        if own.chain.partition(Clock(round, 0)) is not None:
            return None
        cohort = asked(settings, num_clients, round)[:MOST_CLIENTS]
        trained, present = dict.fromkeys(parts, 0), dict.fromkeys(parts, 0)
        for client in cohort:
            visit = Visit(round, client, settings.seed)
            plan = trainees.of(visit).plan(visit)
            for names, counts in ((plan.sent, trained), (plan.received, present)):
                for part in {part_of[name] for name in names if name in part_of}:
                    counts[part] += 1
        for row, part in enumerate(parts):
            found.trained[row].append(trained[part] / max(len(cohort), 1))
            found.frozen[row].append(max(0, present[part] - trained[part]) / max(len(cohort), 1))
    return found


def parts_of(names: Iterable[str]) -> dict[str, str]:
    """Parameters' names → what a person calls that part: a module, or of the one with most entries its blocks.

    Example:
        >>> list(parts_of(["net.stem.w", "net.blocks.0.a.w", "net.blocks.1.a.w", "head.0.w"]).values())
        ['net.stem', 'net.blocks.0', 'net.blocks.1', 'head']
    """
    words = {name: name.split(".") for name in names}
    first = [own[0] for own in words.values()]
    largest = max(dict.fromkeys(first), key=first.count, default="")
    return {name: _block(own) if own[0] == largest else own[0] for name, own in words.items()}


def _block(words: Sequence[str]) -> str:
    """Up to the first number, or two words."""
    end = next((place + 1 for place, word in enumerate(words[:-1]) if word.isdigit()), min(2, len(words)))
    return ".".join(words[:end])


def _spaced(rounds: int) -> list[int]:
    if rounds <= MOST_ROUNDS:
        return list(range(rounds))
    return [place * (rounds - 1) // (MOST_ROUNDS - 1) for place in range(MOST_ROUNDS)]


def _as_it_is(module: nn.Module, optimizer: Optimizer) -> Optimizer:
    return optimizer
