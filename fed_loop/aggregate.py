"""Adding up what clients sent, exactly: sums of integers come out the same in any order and on any number of processes.

A value times its weight becomes two 64-bit integers, a coarse and a fine part, in units of 2⁻³⁰ and 2⁻⁷⁶. Integers add exactly in any
order, which floats do not; it is also what secure aggregation needs. A value of one client alone comes back bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from featherlight.plugins.rejection import Rejection

if TYPE_CHECKING:
    from featherlight.fed_loop.processes import Processes

COARSE = 2.0**30
FINE = 2.0**46
BOUND = 2.0**22
"""Largest magnitude of a value: above it the coarse part would lose bits."""
MOST_CLIENTS = 2**16
"""Largest cohort: the fine parts of more could overflow."""

Entries = Mapping[str, Tensor | tuple[Tensor, Tensor]]
"""One client's: name → value, or (value, weight of each element: 0 where the client held nothing)."""

Means = dict[str, Tensor | tuple[Tensor, Tensor]]
"""Over clients: name → float64 of every entry somebody held; ``(value, held)`` with a mask where only some elements were held."""


class Aggregate(Protocol):
    """What makes one of a round's updates."""

    def add(self, update: Entries, weight: float) -> None:
        """One client's, or ValueError, and then nothing of it."""

    def collect(self, processes: Processes) -> None:
        """Over processes."""

    def result(self) -> Means:
        """Of all that was added."""


class Mean:
    """The weighted mean of named tensors over clients, kept as exact sums.

    Args:
        like: name → tensor whose shape the entries have.
        dense_weights: whether an entry's weight may differ from element to element.

    Example:
        >>> mean = Mean({"w": torch.zeros(2)})
        >>> mean.add({"w": torch.tensor([1.0, 2.0])}, 0.25)
        >>> mean.add({"w": torch.tensor([5.0, 2.0])}, 0.75)
        >>> mean.result()["w"]
        tensor([4., 2.], dtype=torch.float64)
    """

    def __init__(self, like: Mapping[str, Tensor], dense_weights: bool = False) -> None:
        self._shapes = {name: value.shape for name, value in like.items()}
        sizes = [shape.numel() for shape in self._shapes.values()]
        weight_sizes = sizes if dense_weights else [1] * len(sizes)
        device = next(iter(like.values())).device if like else torch.device("cpu")
        self._sums = torch.zeros(2, sum(sizes), dtype=torch.int64, device=device)
        self._weights = torch.zeros(sum(weight_sizes), dtype=torch.int64, device=device)
        self._at = dict(zip(self._shapes, _slices(sizes)))
        self._weight_at = dict(zip(self._shapes, _slices(weight_sizes)))

    def add(self, update: Entries, weight: float) -> None:
        """Add one client's entries.

        Args:
            update: name → value, or (value, weight of each element: 0 where the client held nothing).
            weight: of this client, so scaled that the cohort's weights add up to at most 1.

        Raises:
            ValueError: a name or shape that does not belong here, a value that is not finite or beyond :data:`BOUND`;
                nothing of the update has been added then.
        """
        check_update(update, self._shapes)
        for name, entry in update.items():
            value, own = entry if isinstance(entry, tuple) else (entry, None)
            # rounded before it multiplies the value: a sum divided by its weights is then a mean, however small they are
            units = torch.as_tensor(weight if own is None else own.double().flatten() * weight, dtype=torch.float64) * COARSE
            units = units.round().to(self._sums.device)
            scaled = value.double().flatten() * units
            coarse = scaled.round()
            where = self._at[name]
            self._sums[0, where] += coarse.long()
            self._sums[1, where] += ((scaled - coarse) * FINE).round_().long()
            self._weights[self._weight_at[name]] += units.long()

    def reduce(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Add up over processes."""
        self._sums = all_reduce(self._sums)
        self._weights = all_reduce(self._weights)

    def collect(self, processes: Processes) -> None:
        """Add up over ``processes``."""
        self.reduce(processes.all_reduce)

    def result(self) -> Means:
        """name → mean, float64, of every entry somebody held; ``(mean, held)`` with a mask where only some elements were held."""
        means: Means = {}
        for name, shape in self._shapes.items():
            weights = self._weights[self._weight_at[name]].double() / COARSE
            if not bool((weights > 0).any()):
                continue
            coarse, fine = self._sums[:, self._at[name]].double()
            total = coarse / COARSE + fine / (COARSE * FINE)
            mean = (total / weights.where(weights > 0, 1.0)).reshape(shape)
            means[name] = mean if bool((weights > 0).all()) else (mean, (weights > 0).reshape(shape))
        return means


def check_update(update: Entries, shapes: Mapping[str, torch.Size]) -> None:
    """Refuse what does not belong into a round's sum.

    Raises:
        Rejection: a name that is not in ``shapes``, another shape, an element's weight below 0, or what :func:`check_magnitude` refuses.
    """
    for name, entry in update.items():
        value = entry[0] if isinstance(entry, tuple) else entry
        if name not in shapes:
            raise Rejection("names", f'entry "{name}" is not among the {len(shapes)} that train in this round')
        if value.shape != shapes[name]:
            raise Rejection("shape", f'entry "{name}" has shape {tuple(value.shape)}, expected {tuple(shapes[name])}')
        if isinstance(entry, tuple):
            own = entry[1]
            if own.shape != value.shape or not bool((own >= 0).all()):  # false for NaN too
                raise Rejection("other", f'entry "{name}" needs a weight of 0 or more for each element of shape {tuple(value.shape)}')
            check_magnitude(f'the weight of entry "{name}"', own)
            check_magnitude(f'entry "{name}" times its weight', value.double() * own)
        check_magnitude(f'entry "{name}"', value)


def check_magnitude(what: str, value: Tensor) -> None:
    """Refuse what cannot be added up.

    Raises:
        Rejection: some of ``value`` is not finite, or of magnitude :data:`BOUND` or more.
    """
    largest = value.detach().double().abs().max() if value.numel() else torch.zeros(())
    if not bool(largest < BOUND):  # false for NaN too
        raise Rejection("not_finite", f"{what} is not finite or beyond {BOUND:.0f} (largest magnitude {float(largest)})")


def _slices(sizes: list[int]) -> list[slice]:
    slices, start = [], 0
    for size in sizes:
        slices.append(slice(start, start + size))
        start += size
    return slices
