"""Randomness by purpose: every draw has a seed of its own, derived from what it is for, so that no draw disturbs another.

Adding a draw, skipping a client or spreading clients over processes then leaves every other random number as it was.
"""

from __future__ import annotations

import hashlib

import torch


def derive(*parts: int | str) -> int:
    """A seed in [0, 2**63) that depends on every part and on their order.

    Example:
        >>> derive(0, 3, "cohort") == derive(0, 3, "cohort"), derive(0, 3, "cohort") == derive(0, 4, "cohort")
        (True, False)
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by :func:`derive`, so that every machine and device draws the same numbers."""
    return torch.Generator().manual_seed(derive(*parts))


def seed_model(seed: int, device: torch.device) -> None:
    """Seed what a model's own dropout draws from on ``device``. (``torch.manual_seed`` does so for every kind of device that there might
    be, and notes for each that has not been used yet where it was asked: a hundred times as long.)"""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)
