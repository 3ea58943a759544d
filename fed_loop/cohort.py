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
