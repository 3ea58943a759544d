"""What makes a round's result private: all that an accountant must know of it."""

from __future__ import annotations

from typing import NamedTuple


class Mechanism(NamedTuple):
    """Gaussian noise on a sum to which each client adds one vector of bounded length.

    Args:
        clip: C, the largest Euclidean norm of what one client adds.
        noise_multiplier: σ: the noise on the sum has standard deviation σ·C in each of its numbers.
        delta: δ at which ε is told.
        known_cohorts: whether others may know who took part in which round.
        shares: where clients add the noise, how many of them add all of it; None: the server adds it.
    """

    clip: float
    noise_multiplier: float
    delta: float
    known_cohorts: bool = False
    shares: int | None = None

    def lacking(self, counted: int) -> float:
        """The part of the noise's variance, up to 1, that is left to the server to add, of a sum with ``counted`` clients."""
        return 1.0 if not self.shares else max(0.0, 1 - counted / self.shares)
