"""Why an update is not used: one line for a person, and one of a few words to count by."""

from __future__ import annotations

from typing import Literal, get_args

Reason = Literal["not_finite", "norm", "shape", "dtype", "names", "stale", "duplicate", "unreadable", "no_reply", "other"]
"""A number that is not finite or too large to add; a norm beyond what is allowed; an entry of another shape, or dtype, or that does not
belong there or is missing; an update of another round; a second one of the same client; bytes of which nothing can be made; a client that
does not answer."""

REASONS: tuple[Reason, ...] = get_args(Reason)


class Rejection(ValueError):
    """What came of a client cannot be used.

    Args:
        reason: to count by; text: what was given and what is allowed.
    """

    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.reason: Reason = reason
