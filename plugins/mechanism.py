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
    """

    clip: float
    noise_multiplier: float
    delta: float
    known_cohorts: bool = False
