"""Adding up what clients sent, exactly: sums of integers come out the same in any order and on any number of processes.

A value times its weight becomes two 64-bit integers, a coarse and a fine part, in units of 2⁻³⁰ and 2⁻⁷⁶. Integers add exactly in any
order, which floats do not; it is also what secure aggregation needs. A value of one client alone comes back bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from featherlight.plugins.rejection import Rejection

if TYPE_CHECKING:
    from featherlight.fed_loop.processes import Processes

COARSE = 2.0**30
FINE = 2.0**46
BOUND = 2.0**22
"""Largest magnitude of a value: above it the coarse part would lose bits."""
PIECE = 2**15
"""Elements added at a time on a CPU."""
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


_Piece = tuple[slice, list[tuple[str, slice]]]
"""A range of the sums, and what adds to it: names, and which part of each."""


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
        largest = max(sizes, default=0)
        self._piece = max(1, min(PIECE, sum(sizes)) if device.type == "cpu" else largest)
        self._buffers = [torch.empty(self._piece, dtype=dtype, device=device) for dtype in (torch.float64, torch.float64, torch.int64)]
        self._cuts: dict[tuple[str, ...], list[_Piece]] = {}
        self._at = dict(zip(self._shapes, _slices(sizes)))
        self._weight_at = dict(zip(self._shapes, _slices(weight_sizes)))

    @classmethod
    def over(cls, like: Mapping[str, Tensor], dense_weights: bool = False) -> Mean:
        """What adds up one round, as robust aggregates have it."""
        return cls(like, dense_weights)

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
        units = float(round(weight * COARSE))  # rounded before it multiplies values: a sum divided by its weights is then a mean
        entries = [(name, entry) for name in self._at if (entry := update.get(name)) is not None]
        plain = {name: entry.detach().reshape(-1) for name, entry in entries if not isinstance(entry, tuple)}
        for where, parts in self._pieces(tuple(plain)):
            self._add(where, [plain[name][part] for name, part in parts], units)
        for where in _joined([self._weight_at[name] for name in plain]):
            self._weights[where] += int(units)
        for name, entry in entries:
            if isinstance(entry, tuple):
                value, own = (part.detach().reshape(-1) for part in entry)
                self._add_weighted(name, value, own, weight)

    def _add_weighted(self, name: str, value: Tensor, own: Tensor, weight: float) -> None:
        """Where each element has a weight of its own."""
        for where, ((_, part),) in self._pieces((name,)):
            units = (own[part].double() * weight).mul_(COARSE).round_().to(self._sums.device)
            self._add(where, [value[part]], units)
            self._weights[where] += units.long()

    def _add(self, where: slice, values: Sequence[Tensor], units: float | Tensor) -> None:
        """Add ``values``, (n₁,), (n₂,), …, one behind the other, times ``units``, through buffers that stay in the processor's cache."""
        scaled, coarse, whole = (buffer[: where.stop - where.start] for buffer in self._buffers)
        at = 0
        for value in values:
            scaled[at : at + len(value)].copy_(value)
            at += len(value)
        torch.round(scaled.mul_(units), out=coarse)
        self._sums[0, where] += whole.copy_(coarse)
        self._sums[1, where] += whole.copy_(scaled.sub_(coarse).mul_(FINE).round_())

    def _pieces(self, names: tuple[str, ...]) -> list[_Piece]:
        """Neighbouring entries together, long ones in parts."""
        if names not in self._cuts:
            pieces: list[_Piece] = []
            for name in names:
                start, stop = self._at[name].start, self._at[name].stop
                first = start
                while first < stop:
                    last = pieces[-1][0] if pieces else slice(0, 0)
                    room = self._piece - (last.stop - last.start) if pieces and last.stop == first else 0
                    end = min(stop, first + (room or self._piece))
                    part = name, slice(first - start, end - start)
                    if room:
                        pieces[-1] = slice(last.start, end), [*pieces[-1][1], part]
                    else:
                        pieces.append((slice(first, end), [part]))
                    first = end
            self._cuts[names] = pieces
        return self._cuts[names]

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
    if _all_below_bound(update.values()):
        return
    for name, entry in update.items():  # which of them?
        value = entry[0] if isinstance(entry, tuple) else entry
        if isinstance(entry, tuple):
            own = entry[1]
            if own.shape != value.shape or not bool((own >= 0).all()):  # false for NaN too
                raise Rejection("other", f'entry "{name}" needs a weight of 0 or more for each element of shape {tuple(value.shape)}')
            check_magnitude(f'the weight of entry "{name}"', own)
            check_magnitude(f'entry "{name}" times its weight', value.double() * own)
        check_magnitude(f'entry "{name}"', value)


def _all_below_bound(entries: Iterable[Any]) -> bool:
    """Whether nothing is the matter with plain entries of one dtype, at one look; false where that cannot be said."""
    values = [entry for entry in entries if not isinstance(entry, Tensor) or entry.numel()]
    if not all(isinstance(value, Tensor) and value.is_floating_point() for value in values) or len({value.dtype for value in values}) > 1:
        return False
    if not values:
        return True
    extremes = torch.stack([extreme for value in values for extreme in value.detach().aminmax()]).tolist()
    return all(-BOUND < extreme < BOUND for extreme in extremes)  # false for NaN too


def check_magnitude(what: str, value: Tensor) -> None:
    """Refuse what cannot be added up.

    Raises:
        Rejection: some of ``value`` is not finite, or of magnitude :data:`BOUND` or more.
    """
    if not value.numel():
        return
    value = value.detach() if value.is_floating_point() else value.detach().double()
    least, most = torch.stack(value.aminmax()).tolist()
    if not (least > -BOUND and most < BOUND):  # false for NaN too
        raise Rejection("not_finite", f"{what} is not finite or beyond {BOUND:.0f} (largest magnitude {max(abs(least), abs(most))})")


def _slices(sizes: list[int]) -> list[slice]:
    slices, start = [], 0
    for size in sizes:
        slices.append(slice(start, start + size))
        start += size
    return slices


def _joined(slices: Sequence[slice]) -> list[slice]:
    """Neighbours as one."""
    joined: list[slice] = []
    for part in slices:
        if joined and joined[-1].stop == part.start:
            joined[-1] = slice(joined[-1].start, part.stop)
        else:
            joined.append(part)
    return joined
