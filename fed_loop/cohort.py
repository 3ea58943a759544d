"""Who takes part in a round, and which process trains whom."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, inf
from random import Random
from typing import TYPE_CHECKING

from featherlight.plugins.seeds import derive

if TYPE_CHECKING:
    from featherlight.fed_loop.federation import Federation

SPREAD = 0.5
"""Of the logarithm of how long a turn takes: one standard deviation is a factor of 1.6."""


def asked(settings: Federation, num_clients: int, round: int) -> list[int]:
    """Who is asked to take part in a round, ascending: ``over_select`` times the cohort, rounded up, or as many as there are; with
    ``sampling="poisson"`` each client by itself, ``cohort`` of them on average, perhaps nobody."""
    if settings.sampling == "poisson" and settings.cohort is not None:
        sample(num_clients, settings.cohort, settings.seed, round)
        random = Random(derive(settings.seed, round, "cohort"))
        return [client for client in range(num_clients) if random.random() * num_clients < settings.cohort]
    size = settings.cohort if settings.cohort is None else max(settings.cohort, ceil(settings.cohort * settings.over_select - 1e-9))
    if size is not None and settings.over_select > 1:
        size = min(size, max(num_clients, settings.cohort or 0))
    return sample(num_clients, size, settings.seed, round)


def absent(settings: Federation, cohort: Sequence[int], round: int) -> dict[int, float]:
    """Who of those ``asked`` does not count, and how far in its turn, from 0 to 1, each of them gets: those that drop out, and those that
    are still under way when the round ends."""
    gone = dropouts(cohort, settings.dropout, settings.seed, round)
    stay = [client for client in cohort if client not in gone]
    return gone | late(stay, settings.cohort if settings.over_select > 1 else None, settings.deadline, settings.seed, round)


def sample(num_clients: int, size: int | None, seed: int, round: int) -> list[int]:
    """The clients of one round, ascending: ``size`` of ``num_clients`` without replacement, or all.

    Raises:
        ValueError: more clients asked for than there are.
    """
    if size is None or size == num_clients:
        return list(range(num_clients))
    if not 1 <= size <= num_clients:
        raise ValueError(f"cohort={size}, but there are {num_clients} clients; give 1 to {num_clients}, or leave it out for all")
    return sorted(Random(derive(seed, round, "cohort")).sample(range(num_clients), size))


def dropouts(cohort: Sequence[int], share: float, seed: int, round: int) -> dict[int, float]:
    """The clients of a round's ``cohort`` that drop out, and how far in its turn, from 0 to 1, each of them gets:
    ``share · clients`` of them, rounded up or down by seed and round so that over many rounds it is as many, but never all.

    Example:
        >>> [len(dropouts([3, 8], 0.2, seed=0, round=round)) for round in range(10)], len(dropouts([4], 0.9, seed=0, round=0))
        ([0, 0, 0, 0, 1, 0, 1, 0, 0, 1], 0)
    """
    if not share:
        return {}
    whole, part = divmod(share * len(cohort), 1)
    more = Random(derive(seed, round, "dropouts")).random() < part
    count = min(int(whole) + more, len(cohort) - 1)
    random = Random(derive(seed, round, "dropout"))
    return {client: random.random() for client in sorted(random.sample(list(cohort), count))}


def late(clients: Sequence[int], count: int | None, deadline: float | None, seed: int, round: int) -> dict[int, float]:
    """Those of ``clients`` that return too late, and how far they are when the round ends: once ``count`` are back, or, if that is earlier,
    at ``deadline``, in units of the median turn; but not before the first one.

    How long a turn takes is drawn anew for each client and round, e^(0.5·N(0, 1)) of the median, whatever it trains: who is late says then
    nothing of a client's data or number of samples, and the mean over the others is as good an estimate of the mean over all as that over a
    smaller cohort.

    Example:
        >>> sorted(late(range(6), 4, None, seed=0, round=0)), sorted(late(range(6), None, 1.0, seed=0, round=0))
        ([], [])
    """
    if count is None and deadline is None:
        return {}
    random = Random(derive(seed, round, "pace"))
    takes = {client: random.lognormvariate(0.0, SPREAD) for client in sorted(clients)}
    back = sorted(takes.values())
    end = max(back[0], min(back[min(count or len(back), len(back)) - 1], inf if deadline is None else deadline))
    return {client: end / time for client, time in takes.items() if time > end}


def steps_done(progress: float, steps: int) -> int:
    """Steps that a client takes before it drops out: 1 to all of them, each number equally likely."""
    return 1 + int(progress * steps)


def balance(clients: Sequence[int], sizes: Sequence[int], processes: int) -> list[list[int]]:
    """Spread clients over processes: largest first, each to the process with least to do so far.

    Args:
        sizes: samples of every client of the federation, by client number.

    Example:
        >>> balance([0, 1, 2, 3], [50, 10, 20, 30], 2)
        [[0, 1], [2, 3]]
    """
    shares: list[list[int]] = [[] for _ in range(processes)]
    loads = [0] * processes
    for client in sorted(clients, key=lambda client: (-sizes[client], client)):
        least = loads.index(min(loads))
        shares[least].append(client)
        loads[least] += sizes[client]
    return [sorted(share) for share in shares]
