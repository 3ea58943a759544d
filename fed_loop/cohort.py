"""Who takes part in a round, and which process trains whom."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from featherlight.plugins.seeds import derive


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
