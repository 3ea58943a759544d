"""Random linear maps A (D, d) with E[A·Aᵀ] = I that are made from a seed and never stored: lift d numbers to D, project D to d.

Dense A has D·d entries, 8 TB at D = 124 M and d = 16,384; these cost O(D log D) or O(D) time and a fraction of D of memory. Every
machine and device draws the same A: whole numbers from one CPU generator for each seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import torch
from torch import Tensor

from featherlight.plugins.hadamard import full_precision, passes, walsh_hadamard
from featherlight.plugins.seeds import derive, generator

PANEL = 2**18
"""Numbers that Fastfood transforms at a time: what stays in a CPU core's cache."""
BLOCK = 2**22
"""Numbers of the sparse signs that share an offset."""
TILE = 2**17
"""Numbers of a block that are handled at a time."""


class Projection:
    """A (D, d), E[A·Aᵀ] = I.

    Half precision is worked on in float32, and rounded once.

    Args:
        size: D; dim: d, at most D; seed: what A is drawn from, equal on all machines.

    Raises:
        ValueError: d below 1 or above D; later, a vector of another length.
    """

    def __init__(self, size: int, dim: int, seed: int) -> None:
        if not 1 <= dim <= size:
            raise ValueError(f"dim={dim}: a subspace of {size} parameters has from 1 to {size} dimensions")
        self.size, self.dim, self.seed = size, dim, seed

    def lift(self, z: Tensor, out: Tensor | None = None) -> Tensor:
        """A·z: (d,) to (D,); into ``out`` where given, which has no gradient then."""
        self._check(z, self.dim)
        if out is None:
            return _Lift.apply(z, self)
        self._check(out, self.size)
        in_place = out.dtype == _working(out.dtype) and out.is_contiguous()
        work = out if in_place else torch.empty(self.size, dtype=_working(out.dtype), device=out.device)
        with full_precision():
            self._lift(z.detach().to(work), work)
        return out if in_place else out.copy_(work)

    def project(self, g: Tensor) -> Tensor:
        """Aᵀ·g: (D,) to (d,)."""
        return _Project.apply(self._check(g, self.size), self)

    def project_(self, g: Tensor) -> Tensor:
        """As :meth:`project`, with the memory of ``g`` to work in, and without a gradient: what is in it afterwards is of no use."""
        work = self._check(g, self.size).detach().to(_working(g.dtype)).contiguous()
        with full_precision():
            return self._project(work, True).to(g.dtype)

    @property
    def nbytes(self) -> int:
        """Memory of what was drawn, bytes."""
        return sum(value.numel() * value.element_size() for value in vars(self).values() if isinstance(value, Tensor))

    def _lift(self, z: Tensor, out: Tensor) -> None:
        raise NotImplementedError(f"{type(self).__name__} must say how it lifts")

    def _project(self, g: Tensor, use_up: bool) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must say how it projects")

    def _check(self, x: Tensor, length: int) -> Tensor:
        if x.shape != (length,):
            raise ValueError(f"expected a vector of {length} numbers, got shape {tuple(x.shape)}")
        return x


class _Lift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, projection: Projection) -> Tensor:
        ctx.projection = projection
        return projection.lift(z, z.new_empty(projection.size))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.projection.project(grads[0]), None


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, projection: Projection) -> Tensor:
        ctx.projection = projection
        work = g.to(_working(g.dtype)).contiguous()
        with full_precision():
            return projection._project(work, work is not g).to(g.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.projection.lift(grads[0]), None


class Fastfood(Projection):
    """A·z = √(D/d)·(H G Π H B pad(z))[:D] / (√(L·ΣG²)·√(D/L)), L = 2^⌈log₂ D⌉, over all parameters at once (arXiv 1408.3060, 1804.08838).

    H: unnormalised Walsh–Hadamard; B: signs; Π: a permutation of the rows and of the columns of a near-square of L numbers; G: standard
    normal, in whole multiples of 1/29, so that a number takes a byte. Time O(D log D), memory L bytes.

    Only d of the numbers that the first H is given are not zero, so its result repeats after 2^⌈log₂ d⌉ numbers, and that many are worked
    out. The last H is H ⊗ H: along the columns of the near-square, a panel of them at a time, and along its rows, of which only the first
    D numbers are wanted.
    """

    def __init__(self, size: int, dim: int, seed: int) -> None:
        super().__init__(size, dim, seed)
        bits = max(1, (size - 1).bit_length())
        self.length = 1 << bits
        rows, columns = 1 << bits // 2, 1 << (bits - bits // 2)
        width = min(columns, max(1, PANEL // rows))
        random = generator(seed, "fastfood", size, dim)
        self._signs = torch.randint(0, 2, (dim,), generator=random).mul_(2).sub_(1).to(torch.int8)
        self._row_order = torch.randperm(rows, generator=random)
        self._column_order = torch.randperm(columns, generator=random)
        self._normal = torch.empty(columns // width, rows, width, dtype=torch.int8)  # panel by panel
        squares = torch.zeros((), dtype=torch.int64)
        for panel in self._normal:
            panel.copy_(_normals(panel.numel(), random).view(panel.shape))
            whole = panel.int()
            squares += (whole * whole).sum()
        self._normal[0, 0, 0] += (squares == 0).to(torch.int8)  # two numbers are both 0 in one of some thousand draws: A would be infinite
        squares += squares == 0
        # √(D/d) / (√(L·ΣG²)·√(D/L)): D cancels. A tensor, since inside a prediction tensors have no values
        self._scale = squares.double().mul(dim).rsqrt()

    def _lift(self, z: Tensor, out: Tensor) -> None:
        table, kinds = self._spread(z), self._kinds().to(z.device)
        rows, tail = self._square(out)
        used, width = len(rows) + len(tail), self._normal.shape[2]
        panel, spare = self._scratch(z)
        for index, normal in enumerate(self._normal.to(z.device)):
            columns = slice(index * width, (index + 1) * width)
            torch.index_select(table[index], 0, kinds, out=panel)
            panel.mul_(spare.copy_(normal))  # a product of two types takes three times as long
            mixed = passes(panel[None], spare[None], wanted=used)[0][0]
            rows[:, columns] = mixed[: len(rows)]
            tail[:, columns] = mixed[len(rows) : used]
        self._along(rows)
        self._along(tail)
        out[rows.numel() :] = tail.view(-1)[: self.size - rows.numel()]

    def _project(self, g: Tensor, use_up: bool) -> Tensor:
        rows, tail = self._square(g if use_up else g.clone())
        tail.view(-1)[: self.size - rows.numel()] = g[rows.numel() :]
        self._along(rows)
        self._along(tail)
        used, width = len(rows) + len(tail), self._normal.shape[2]
        kinds = self._kinds().to(g.device)
        together = kinds.argsort(stable=True)  # rows of a kind, one after the other
        count = self._repeats()[0]
        sums = g.new_empty(len(self._normal), count, width)
        panel, spare = self._scratch(g)
        for index, normal in enumerate(self._normal.to(g.device)):
            columns = slice(index * width, (index + 1) * width)
            panel[: len(rows)] = rows[:, columns]
            panel[len(rows) : used] = tail[:, columns]
            panel[used:] = 0
            mixed, other = (each[0] for each in passes(panel[None], spare[None], given=used))
            mixed.mul_(other.copy_(normal))
            torch.index_select(mixed, 0, together, out=other)
            torch.sum(other.view(count, -1, width), 1, out=sums[index])
        return self._gather(sums)

    def _repeats(self) -> tuple[int, int]:
        """How many rows of the near-square differ after the first H, and after how many numbers its result repeats."""
        period = 1 << (self.dim - 1).bit_length()
        return max(1, period // len(self._column_order)), period

    def _kinds(self) -> Tensor:
        """Which of the rows that differ each row is, after the permutation."""
        return self._row_order % self._repeats()[0]

    def _spread(self, z: Tensor) -> Tensor:
        """Π H B pad(z), of all rows that differ, (panels, kinds, width)."""
        count, period = self._repeats()
        padded = z.new_zeros(period)
        padded[: self.dim] = z * self._signs.to(z) * self._scale.to(z)
        columns = len(self._column_order)
        table = walsh_hadamard(padded).repeat(max(1, columns // period)).view(count, columns)
        return table[:, self._column_order.to(z.device)].view(count, len(self._normal), -1).transpose(0, 1).contiguous()

    def _gather(self, sums: Tensor) -> Tensor:
        """The adjoint of :meth:`_spread`."""
        count, period = self._repeats()
        ordered = sums.transpose(0, 1).reshape(count, -1)
        table = torch.empty_like(ordered)
        table[:, self._column_order.to(sums.device)] = ordered
        return walsh_hadamard(table.view(-1, period).sum(0))[: self.dim] * self._signs.to(sums) * self._scale.to(sums)

    def _square(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """The first D numbers of the near-square as rows: a view of those that are whole, and room for one that is not."""
        columns = len(self._column_order)
        whole, rest = divmod(self.size, columns)
        return flat[: whole * columns].view(whole, columns), flat.new_zeros(int(rest > 0), columns)

    def _scratch(self, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = self._normal.shape[1:]
        return like.new_empty(shape), like.new_empty(shape)

    def _along(self, rows: Tensor) -> None:
        """H along every row, in place."""
        if not len(rows):
            return
        at_once = max(1, PANEL // rows.shape[1])
        spare = torch.empty_like(rows[:at_once, :, None])
        for chunk in rows.unsqueeze(-1).split(at_once):
            done, _ = passes(chunk, spare[: len(chunk)])
            if done is not chunk:
                chunk.copy_(done)


class SparseSigns(Projection):
    """One entry of ±1 in every row: parameter i = ρ·d + j adds r[ρ]·s[ρ + p]·z[p], p = j + o mod d. Time O(D), one pass over memory.

    Signs r and s and offsets o, one for each block, are drawn: D/d + d and D/d signs stand for D. Two parameters meet in one place only
    with different ρ, so E[A·Aᵀ] = I; pairs that meet in different places have independent products of signs two by two, so that
    the variance of A·Aᵀ is that of D independent signs. What meets does not come apart again, as in a count sketch with one row.
    """

    def __init__(self, size: int, dim: int, seed: int) -> None:
        super().__init__(size, dim, seed)
        rows = -(-size // dim)
        random = generator(seed, "sparse signs", size, dim)
        self._of_row = torch.randint(0, 2, (rows,), generator=random).mul_(2).sub_(1).to(torch.int8)
        self._of_place = torch.randint(0, 2, (rows + dim - 1,), generator=random).mul_(2).sub_(1).to(torch.int8)

    def _lift(self, z: Tensor, out: Tensor) -> None:
        for block, of_row, signs, places in self._blocks(out):
            step = max(1, TILE // len(block))
            for part, sign, value in zip(block.split(step, 1), signs.split(step, 1), z[places].split(step)):
                torch.mul(sign, value, out=part)
                part.mul_(of_row)

    def _project(self, g: Tensor, use_up: bool) -> Tensor:
        z, room = g.new_zeros(self.dim), g.new_empty(max(TILE, BLOCK // self.dim))
        for block, of_row, signs, places in self._blocks(g):
            step, weights = max(1, TILE // len(block)), of_row[:, 0]
            for part, sign, total in zip(block.split(step, 1), signs.split(step, 1), z[places].split(step)):
                signed = torch.mul(part, sign, out=room[: part.numel()].view(part.shape))
                total.addmv_(signed.T, weights)
        return z

    def _blocks(self, flat: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, slice]]:
        """Of (D,) as rows of d: columns of some rows; r, (rows, 1); s[ρ + p], as the columns; at which places p these are."""
        offsets = Random(derive(self.seed, "offsets", self.size, self.dim))
        of_row, of_place = self._of_row.to(flat)[:, None], self._of_place.to(flat).unfold(0, self.dim, 1)
        whole, rest = divmod(self.size, self.dim)
        at_once = max(1, BLOCK // self.dim)
        blocks = [(first, min(at_once, whole - first), self.dim) for first in range(0, whole, at_once)] + [(whole, 1, rest)] * (rest > 0)
        for first, count, length in blocks:
            offset, rows = offsets.randrange(self.dim), slice(first, first + count)
            block = flat[first * self.dim :][: count * length].view(count, length)
            turn = min(self.dim - offset, length)  # the column that is at place 0, if any
            for columns, places in ((slice(0, turn), slice(offset, offset + turn)), (slice(turn, length), slice(0, length - turn))):
                if columns.start < columns.stop:
                    yield block[:, columns], of_row[rows], of_place[rows, places], places


PROJECTIONS: dict[str, type[Projection]] = {"fastfood": Fastfood, "sparse_signs": SparseSigns}


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _normals(count: int, random: torch.Generator) -> Tensor:
    """int8 (count,), 29 to a standard deviation: quantiles of 16 random bits each, the same on every machine."""
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None, generator=random).view(torch.int16)[:count]
    return _QUANTILES.index_select(0, bits.int().bitwise_and_(0xFFFF))


_QUANTILES = torch.special.ndtri((torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16).mul_(29).round_().to(torch.int8)
