"""Random linear maps A (D, d) with E[A·Aᵀ] = I that are made from a seed and never stored: lift d numbers to D, project D to d.

Dense A has D·d entries, 8 TB at D = 124 M and d = 16,384; these cost O(D log D) or O(D) time and a few vectors of memory. Every
machine and device draws the same A, from one CPU generator for each seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import torch
from torch import Tensor

from featherlight.plugins.seeds import derive, generator

FACTOR = 6
"""A Walsh–Hadamard transform runs as matrix products with H of up to 2**FACTOR rows; 32 to 128 are alike on a CPU."""
BLOCK = 2**18
"""Numbers handled at a time where a map works block by block: what stays in a CPU's cache."""


def walsh_hadamard(x: Tensor) -> Tensor:
    """The unnormalised Walsh–Hadamard transform H·x along the last axis, of 2ⁿ numbers; H·H = 2ⁿ·I.

    H of p·q rows is H_p ⊗ H_q, so a transform of 2²⁴ is four products with 64 × 64 matrices, each one pass over memory, in place of 24.

    Args:
        x: (…, 2ⁿ), floating point; kept as it is.

    Raises:
        ValueError: the last axis is no power of two.

    Example:
        >>> walsh_hadamard(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        tensor([10., -2., -4.,  0.])
    """
    length = x.shape[-1]
    bits = length.bit_length() - 1
    if length < 1 or length != 1 << bits:
        raise ValueError(f"a Walsh-Hadamard transform takes 2**n numbers; got {length}: pad with zeros")
    passes = max(1, -(-bits // FACTOR))
    out, inner = x, 1
    for index in range(passes):
        size = 1 << (bits // passes + (index < bits % passes))
        matrix = _HADAMARD[size].to(x)
        if inner == 1:
            out = out.reshape(-1, size) @ matrix
        else:
            out = torch.matmul(matrix, out.reshape(-1, size, inner))
        inner *= size
    return out.reshape(x.shape)


class Projection:
    """A (D, d), E[A·Aᵀ] = I.

    Args:
        size: D; dim: d, at most D; seed: what A is drawn from, equal on all machines.

    Raises:
        ValueError: d below 1 or above D.
    """

    def __init__(self, size: int, dim: int, seed: int) -> None:
        if not 1 <= dim <= size:
            raise ValueError(f"dim={dim}: a subspace of {size} parameters has from 1 to {size} dimensions")
        self.size, self.dim, self.seed = size, dim, seed

    def lift(self, z: Tensor) -> Tensor:
        """A·z: (d,) to (D,)."""
        raise NotImplementedError(f"{type(self).__name__} must say how it lifts")

    def project(self, g: Tensor) -> Tensor:
        """Aᵀ·g: (D,) to (d,)."""
        raise NotImplementedError(f"{type(self).__name__} must say how it projects")

    def _check(self, x: Tensor, length: int) -> Tensor:
        if x.shape != (length,):
            raise ValueError(f"expected a vector of {length} numbers, got shape {tuple(x.shape)}")
        return x


class Fastfood(Projection):
    """A·z = √(D/d)·(H G Π H B pad(z))[:D] / (√(L·ΣG²)·√(D/L)), L = 2^⌈log₂ D⌉, over all parameters at once (arXiv 1408.3060, 1804.08838).

    H: unnormalised Walsh–Hadamard; B: signs; Π: a permutation (of the rows and columns of a near-square of L numbers); G: standard
    normal, kept while the object lives. Time O(D log D).
    """

    def __init__(self, size: int, dim: int, seed: int) -> None:
        super().__init__(size, dim, seed)
        bits = max(1, (size - 1).bit_length())
        self.length = 1 << bits
        random = generator(seed, "fastfood", size, dim)
        self._signs = torch.randint(0, 2, (dim,), generator=random).mul_(2).sub_(1).to(torch.int8)
        self._rows = torch.randperm(1 << (bits // 2), generator=random)
        self._columns = torch.randperm(1 << (bits - bits // 2), generator=random)
        self._normal = torch.randn(self.length, generator=random)
        # √(D/d) / (√(L·ΣG²)·√(D/L)): D cancels. A tensor, since inside a prediction tensors have no values
        self._scale = self._normal.double().square().sum().mul(dim).rsqrt()

    def lift(self, z: Tensor) -> Tensor:
        padded = z.new_zeros(self.length)
        padded[: self.dim] = self._check(z, self.dim) * self._signs.to(z)
        mixed = walsh_hadamard(padded).view(len(self._rows), -1)
        mixed = mixed[self._rows.to(z.device)][:, self._columns.to(z.device)].T.reshape(-1)
        return walsh_hadamard(mixed.mul_(self._normal.to(z)))[: self.size] * self._scale

    def project(self, g: Tensor) -> Tensor:
        padded = g.new_zeros(self.length)
        padded[: self.size] = self._check(g, self.size)
        mixed = walsh_hadamard(padded).mul_(self._normal.to(g)).view(len(self._columns), -1).T
        back = torch.empty_like(mixed, memory_format=torch.contiguous_format)
        back[self._rows.to(g.device)[:, None], self._columns.to(g.device)] = mixed
        return walsh_hadamard(back.view(-1))[: self.dim] * self._signs.to(g) * self._scale


class SparseSigns(Projection):
    """One entry of ±1 in every row: parameter i adds ±z at place i − o mod d, o drawn for each block. Time O(D), one pass over memory.

    Two rows meet in one place with independent signs, so E[A·Aᵀ] = I; what meets there does not come apart again, as in a count sketch
    with one row.
    """

    def lift(self, z: Tensor) -> Tensor:
        self._check(z, self.dim)
        out = z.new_empty(self.size)
        for start, stop, signs, offset in self._blocks():
            rolled = z.roll(offset).repeat(-(-(stop - start) // self.dim))[: stop - start]
            out[start:stop] = rolled * signs.to(z)
        return out

    def project(self, g: Tensor) -> Tensor:
        self._check(g, self.size)
        z = g.new_zeros(self.dim)
        for start, stop, signs, offset in self._blocks():
            part = g[start:stop] * signs.to(g)
            whole = len(part) // self.dim * self.dim
            total = part[:whole].view(-1, self.dim).sum(0)
            total[: len(part) - whole] += part[whole:]
            z += total.roll(-offset)
        return z

    def _blocks(self) -> Iterator[tuple[int, int, Tensor, int]]:
        """Of each block: where it starts and stops, its signs, its offset."""
        offsets = Random(derive(self.seed, "offsets", self.size, self.dim))
        random = generator(self.seed, "sparse signs", self.size, self.dim)
        step = max(BLOCK // self.dim, 1) * self.dim
        for start in range(0, self.size, step):
            stop = min(start + step, self.size)
            packed = torch.randint(0, 256, (-(-(stop - start) // 8),), generator=random, dtype=torch.uint8)
            yield start, stop, _SIGNS[packed.int()].view(-1)[: stop - start], offsets.randrange(self.dim)


_SIGNS = torch.tensor([[1.0 - 2.0 * ((byte >> bit) & 1) for bit in range(8)] for byte in range(256)])


def _hadamard(bits: int) -> Tensor:
    """H, (2**bits, 2**bits)."""
    matrix = torch.ones(1, 1)
    for _ in range(bits):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


_HADAMARD = {1 << bits: _hadamard(bits) for bits in range(FACTOR + 1)}


PROJECTIONS: dict[str, type[Projection]] = {"fastfood": Fastfood, "sparse_signs": SparseSigns}
