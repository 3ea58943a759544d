"""Sums of values times weights that are exact, so that they come out the same in any order and on any number of processes.

A value times its weight counts in units of 2⁻⁷⁶, rounded to them once where it has bits below. Each range of a sum is kept in one float64
per element for as long as that provably loses nothing: every product is a multiple of a step, and all of them together are below 2⁵² steps.
What does not fit there goes into two float64s that hold integers, a coarse part in units of 2⁻³⁰ and a fine one in units of 2⁻⁷⁶.
Additions of integers below 2⁵³ lose nothing either. Which of the two a value went into does not change the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

COARSE = 2.0**30
FINE = 2.0**46
BOUND = 2.0**22
"""Largest magnitude of a value: above it the coarse part would lose bits."""
PANEL = 2**16
"""Elements of a range on a CPU: it and what is computed of it stay in the processor's cache."""
MOST_CARRIED = 128
"""Additions after which fine parts, of at most 2⁴⁵ each, are brought below 2⁴⁵ again."""


class _Span(NamedTuple):
    """What is known of a range of sums: magnitudes add up to ``bound`` at most, and all of them are multiples of ``step``."""

    bound: float
    step: float


class ExactSums:
    """Weighted sums, all zero at first.

    Args:
        size: how many.
        device: where.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._size, self._device = size, device
        self._panel = min(PANEL, size) if device.type == "cpu" else size
        self._panel = max(1, self._panel)
        self._short = torch.empty(size, dtype=torch.float64, device=device)
        self._spans: dict[int, _Span] = {}  # of ranges that have something in the short form
        self._long: Tensor | None = None  # (2, size)
        self._adds: dict[int, int] = {}  # of ranges that have something in the long form: how often since fine parts were carried
        self._buffers: dict[tuple[int, torch.dtype], Tensor] = {}

    @property
    def size(self) -> int:
        """How many there are."""
        return self._size

    # -- ranges -----------------------------------------------------------------------------------------------------
    def _pieces(self, start: int, size: int) -> list[tuple[int, int, int]]:
        """``(number, first, last)`` of each range that ``size`` sums from ``start`` on have a share in."""
        stop, panel = start + size, self._panel
        return [
            (number, max(start, number * panel), min(stop, (number + 1) * panel))
            for number in range(start // panel, -(-stop // panel) if size else start // panel)
        ]

    def _within(self, number: int) -> slice:
        return slice(number * self._panel, min(self._size, (number + 1) * self._panel))

    def _buffer(self, place: int, dtype: torch.dtype) -> Tensor:
        if (place, dtype) not in self._buffers:
            self._buffers[place, dtype] = torch.empty(self._panel, dtype=dtype, device=self._device)
        return self._buffers[place, dtype]

    # -- adding -----------------------------------------------------------------------------------------------------
    def add(self, start: int, values: Tensor, units: int) -> bool:
        """Add ``values`` times ``units``·2⁻³⁰ from ``start`` on, or nothing of them.

        Args:
            values: ``(n,)``, of a floating dtype.
            units: of all that is ever added to a sum together at most 2³⁰; below 0 to take away what was added.

        Returns:
            Whether all magnitudes are finite and below :data:`BOUND`; where not, nothing has been added.
        """
        weight = units / COARSE
        zeros = (units & -units).bit_length() - 1
        eps = torch.finfo(values.dtype).eps
        plain = 2 - math.frexp(eps)[1] + units.bit_length() - zeros <= 53  # bits of a value and of a weight
        step = math.ldexp(eps, zeros - 30)
        magnitudes = self._buffer(0, values.dtype)
        for number, first, last in self._pieces(start, len(values)):
            part = values[first - start : last - start]
            least, most = (extreme.item() for extreme in torch.abs(part, out=magnitudes[: last - first]).aminmax())
            if not most < BOUND:  # true for NaN, too
                self.add(start, values[: first - start], -units)  # sums lose nothing, so what was added can be taken away
                return False
            if most == 0 or units == 0:
                continue
            if plain and least > 0 and self._has_room(number, math.ldexp(step, math.frexp(least)[1] - 1), most * abs(weight)):
                self._short[first:last].add_(part, alpha=weight)
            else:
                self._add_long(number, slice(first, last), part, float(units))
        return True

    def _has_room(self, number: int, step: float, bound: float) -> bool:
        """Whether products that are multiples of ``step`` and at most ``bound`` can go into a range's short form; then they are noted."""
        span = self._spans.get(number)
        if span is not None:
            step, bound = min(step, span.step), bound + span.bound
        if step < 1 / (COARSE * FINE) or bound > step * 2.0**52:
            return False
        if span is None:
            self._short[self._within(number)].zero_()
        self._spans[number] = _Span(bound, step)
        return True

    def add_each(self, start: int, values: Tensor, units: Tensor) -> None:
        """Add ``values``, ``(n,)``, each times its own of ``units``, ``(n,)`` whole numbers, times 2⁻³⁰."""
        for number, first, last in self._pieces(start, len(values)):
            part = slice(first - start, last - start)
            self._add_long(number, slice(first, last), values[part], units[part])

    def _add_long(self, number: int, where: slice, values: Tensor, units: float | Tensor) -> None:
        size = where.stop - where.start
        scaled, coarse = (self._buffer(place, torch.float64)[:size] for place in (1, 2))
        torch.round(scaled.copy_(values).mul_(units), out=coarse)
        long = self._long_form()
        long[0, where].add_(coarse)
        long[1, where].add_(scaled.sub_(coarse).mul_(FINE).round_())
        self._adds[number] = self._adds.get(number, 0) + 1
        if self._adds[number] >= MOST_CARRIED:
            self._carry(number)

    def _long_form(self) -> Tensor:
        if self._long is None:  # pages of numpy's zeros take no memory before something is written
            zeros = torch.from_numpy(np.zeros((2, self._size)))
            self._long = zeros if self._device.type == "cpu" else zeros.to(self._device)
        return self._long

    def _carry(self, number: int) -> None:
        """Bring a range's fine parts to at most half a coarse unit: of one sum there is then one form."""
        coarse, fine = self._long_form()[:, self._within(number)]
        carried = (fine / FINE).round_()
        coarse.add_(carried)
        fine.sub_(carried.mul_(FINE))
        self._adds[number] = 1

    # -- what comes out ---------------------------------------------------------------------------------------------
    def _lengthen(self, number: int) -> None:
        """Move a range's short form into its long one."""
        if self._spans.pop(number, None) is None:
            return
        where = self._within(number)
        units = self._short[where] * COARSE
        coarse = units.round()
        long = self._long_form()
        long[0, where].add_(coarse)
        long[1, where].add_(units.sub_(coarse).mul_(FINE))
        self._adds[number] = self._adds.get(number, 0) + 1

    def reduce(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Add up over processes, as 64-bit integers."""
        count = -(-self._size // self._panel)
        for number in range(count):
            self._lengthen(number)
        parts = all_reduce(self._long_form().long())
        carried = (parts[1] + 2**45) >> 46
        self._long = torch.stack([parts[0] + carried, parts[1] - (carried << 46)]).double()
        self._adds = dict.fromkeys(range(count), 1)

    def totals(self) -> Tensor:
        """The sums, ``(size,)``, each rounded once to float64. To be read before anything more is added."""
        for number in range(-(-self._size // self._panel)):
            where = self._within(number)
            if number in self._adds:
                self._lengthen(number)
                self._carry(number)
                coarse, fine = self._long_form()[:, where]
                torch.add(coarse / COARSE, fine, alpha=1 / (COARSE * FINE), out=self._short[where])
            elif number not in self._spans:
                self._short[where].zero_()
        return self._short
