"""Adding up what clients sent, exactly: sums come out the same in any order and on any number of processes.

Values times weights are added as :mod:`~featherlight.fed_loop.exact_sums` does it, in units of 2⁻⁷⁶. Such sums are also what secure
aggregation needs. A value of one client alone comes back bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from featherlight.fed_loop.exact_sums import BOUND, COARSE, FINE, PANEL, ExactSums
from featherlight.fed_loop.wire import in_wire_order
from featherlight.plugins.rejection import Rejection

if TYPE_CHECKING:
    from featherlight.fed_loop.processes import Processes

MOST_CLIENTS = 2**16
"""Largest cohort."""

Entries = Mapping[str, Tensor | tuple[Tensor, Tensor]]
"""One client's: name → value, or (value, weight of each element: 0 where the client held nothing)."""

Means = dict[str, Tensor | tuple[Tensor, Tensor]]
"""Over clients: name → float64 of every entry somebody held; ``(mean, held)`` with a mask where only some elements were held."""


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
        order = in_wire_order(like)  # neighbours in a message are neighbours here
        sizes = [self._shapes[name].numel() for name in order]
        device = next(iter(like.values())).device if like else torch.device("cpu")
        self._sums = ExactSums(sum(sizes), device)
        self._at = dict(zip(order, _slices(sizes)))
        self._units = dict.fromkeys(order, 0)  # weights of entries, times 2³⁰
        self._each = torch.zeros(sum(sizes) if dense_weights else 0, dtype=torch.int64, device=device)  # of elements, beside those

    @classmethod
    def over(cls, like: Mapping[str, Tensor], dense_weights: bool = False) -> Mean:
        """What adds up one round, as robust aggregates have it."""
        return cls(like, dense_weights)

    def add(self, update: Entries, weight: float) -> None:
        """Add one client's entries.

        Args:
            update: name → value, or (value, weight of each element: 0 where the client held nothing).
            weight: of this client, so scaled that the cohort's weights add up to at most 1; multiples of 2⁻³⁰ are exact, others are
                rounded to such. With few bits in it (1/8, 3/8, 5/8) adding is faster.

        Raises:
            ValueError: a name or shape that does not belong here, a value that is not finite or beyond :data:`BOUND`;
                nothing of the update has been added then.
        """
        check_belongs(update, self._shapes)
        plain = {name: entry.detach() for name in self._at if isinstance(entry := update.get(name), Tensor)}
        if len(plain) < len(update):
            check_magnitudes(update)
        units = round(weight * COARSE)  # rounded before it multiplies values: a sum divided by its weights is then a mean
        runs = self._runs(plain)
        for place, (start, values) in enumerate(runs):
            if not self._sums.add(start, values, units):
                for earlier, added in runs[:place]:
                    self._sums.add(earlier, added, -units)
                check_magnitudes(update)  # says which
        for name in plain:
            self._units[name] += units
        for name, entry in update.items():
            if isinstance(entry, tuple):
                value, own = (part.detach().reshape(-1) for part in entry)
                each = (own.double() * weight).mul_(COARSE).round_().to(self._each.device)
                self._sums.add_each(self._at[name].start, value, each)
                self._each[self._at[name]] += each.long()

    def _runs(self, plain: Mapping[str, Tensor]) -> list[tuple[int, Tensor]]:
        """Entries as vectors, ``(first of the sums, (n,))``: neighbours as one, without a copy where they are so in memory, too."""
        runs: list[tuple[int, list[Tensor]]] = []
        stop, size, end = -1, 0, -1
        for name, value in plain.items():
            where, count, at = self._at[name], value.numel(), value.data_ptr()
            if not count:
                continue
            last = runs[-1][1] if runs else []
            together = where.start == stop and last[-1].dtype == value.dtype
            if together and at == end and value.is_contiguous() and _same_memory(last[-1], value):
                last[-1] = last[-1].as_strided((len(last[-1]) + count,), (1,))
            elif together and size + count <= PANEL:
                last.append(value.reshape(-1))
            else:
                runs.append((where.start, [value.reshape(-1)]))
                size = 0
            stop, size, end = where.stop, size + count, at + count * value.element_size() if value.is_contiguous() else -1
        joined = ((start, parts[0] if len(parts) == 1 else torch.cat(parts)) for start, parts in runs)
        device = self._each.device
        return [(start, (value if value.is_floating_point() else value.double()).to(device)) for start, value in joined]

    def reduce(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Add up over processes; ``all_reduce`` is called with 64-bit integers."""
        self._sums.reduce(all_reduce)
        if len(self._each):
            self._each = all_reduce(self._each)
        units = all_reduce(torch.tensor(list(self._units.values()), dtype=torch.int64, device=self._each.device))
        self._units = dict(zip(self._units, units.tolist()))

    def whole(self) -> Tensor:
        """All that was added, as whole numbers, (n,), int64: their sum over means, modulo 2⁶⁴, is that of what was added to them."""
        parts: list[Tensor] = []
        self.reduce(lambda own: parts.append(own.reshape(-1)) or own)  # type: ignore[func-returns-value]
        return torch.cat(parts).cpu()

    def add_whole(self, numbers: Tensor) -> None:
        """Add what :meth:`whole` gave of others, summed.

        Raises:
            ValueError: it is no sum of updates; nothing has been added then.
        """
        sums, weights = numbers[: 2 * self._sums.size].view(2, -1), numbers[2 * self._sums.size :]
        most = int(2 * BOUND * COARSE), int(MOST_CLIENTS * FINE)  # not floats: torch would compare in float32
        within = all(bool(((part >= -bound) & (part <= bound)).all()) for part, bound in zip(sums, most))
        if not within or not bool(((weights >= 0) & (weights <= int(COARSE) + MOST_CLIENTS)).all()):
            raise Rejection("other", "the round's sum is none of updates: somebody added something else, or masks did not cancel")
        rest = numbers

        def added(own: Tensor) -> Tensor:
            nonlocal rest
            part, rest = rest[: own.numel()], rest[own.numel() :]
            return own + part.view_as(own).to(own.device)

        self.reduce(added)

    def collect(self, processes: Processes) -> None:
        """Add up over ``processes``."""
        if processes.size > 1:
            self.reduce(processes.all_reduce)

    def result(self) -> Means:
        """name → mean, float64, of every entry somebody held; ``(mean, held)`` with a mask where only some elements were held.

        The means are made of the sums in place: asked once, it is done.
        """
        totals = self._sums.totals()
        if len(self._each):
            return self._means_by_element(totals)
        for units, names in groupby(self._at, key=self._units.__getitem__):  # neighbours mostly came from the same clients
            for where in _joined([self._at[name] for name in names]) if units > 0 else ():
                totals[where].div_(units / COARSE)
        return {name: totals[self._at[name]].reshape(shape) for name, shape in self._shapes.items() if self._units[name] > 0}

    def _means_by_element(self, totals: Tensor) -> Means:
        means: Means = {}
        for name, shape in self._shapes.items():
            weights = (self._each[self._at[name]] + self._units[name]).double() / COARSE
            if not bool((weights > 0).any()):
                continue
            mean = (totals[self._at[name]] / weights.where(weights > 0, 1.0)).reshape(shape)
            means[name] = mean if bool((weights > 0).all()) else (mean, (weights > 0).reshape(shape))
        return means


def weigh(sizes: Sequence[int], clients: Sequence[int]) -> dict[int, float]:
    """Weights in proportion to numbers of samples, with few bits: whole numbers over a power of two that is no less than their sum.

    Example:
        >>> weigh([100, 50, 50], [7, 8, 9])
        {7: 0.5, 8: 0.25, 9: 0.25}
    """
    unit = math.gcd(*sizes)
    whole = 2 ** (sum(sizes) // unit - 1).bit_length() if unit else 1
    return {client: size // unit / whole if unit else 0.0 for client, size in zip(clients, sizes, strict=True)}


def check_update(update: Entries, shapes: Mapping[str, torch.Size]) -> None:
    """Refuse what does not belong into a round's sum.

    Raises:
        Rejection: a name that is not in ``shapes``, another shape, an element's weight below 0, or what :func:`check_magnitude` refuses.
    """
    check_belongs(update, shapes)
    check_magnitudes(update)


def check_belongs(update: Entries, shapes: Mapping[str, torch.Size]) -> None:
    """Refuse entries that the round's sum has not.

    Raises:
        Rejection: a name that is not in ``shapes``, or another shape.
    """
    for name, entry in update.items():
        value = entry[0] if isinstance(entry, tuple) else entry
        if name not in shapes:
            raise Rejection("names", f'entry "{name}" is not among the {len(shapes)} that train in this round')
        if value.shape != shapes[name]:
            raise Rejection("shape", f'entry "{name}" has shape {tuple(value.shape)}, expected {tuple(shapes[name])}')


def check_magnitudes(update: Entries) -> None:
    """Refuse values that cannot be added up.

    Raises:
        Rejection: an element's weight below 0, or what :func:`check_magnitude` refuses.
    """
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


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


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
