"""The Walsh–Hadamard transform as products with small matrices: H of p·q rows is H_p ⊗ H_q, so 2²⁴ numbers take five or six passes, not 24.

:func:`walsh_hadamard` is the transform; :func:`passes` is what it is made of, for callers that work on blocks which fit a cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

FACTOR = 5
"""H of up to 2**FACTOR rows is one matrix product: on a CPU 16 and 32 rows take half the time of 64 for each bit."""


def walsh_hadamard(x: Tensor) -> Tensor:
    """The unnormalised Walsh–Hadamard transform H·x along the last axis, of 2ⁿ numbers; H·H = 2ⁿ·I.

    Args:
        x: (…, 2ⁿ), floating point; kept as it is.

    Raises:
        ValueError: the last axis is no power of two.

    Example:
        >>> walsh_hadamard(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        tensor([10., -2., -4.,  0.])
    """
    length = x.shape[-1]
    if length < 1 or length != 1 << (length.bit_length() - 1):
        raise ValueError(f"a Walsh-Hadamard transform takes 2**n numbers; got {length}: pad with zeros")
    return _Transform.apply(x)


def passes(x: Tensor, spare: Tensor, given: int | None = None, wanted: int | None = None) -> tuple[Tensor, Tensor]:
    """H along the middle axis of ``x`` (outer, 2ⁿ, inner), in ``x`` or in ``spare``: the one that holds the result, and the other.

    Args:
        x, spare: contiguous, of one shape.
        given: with outer = 1: all rows of the middle axis from this one on are zero.
        wanted: with outer = 1: rows from this one on need not be right.
    """
    with full_precision():
        return _passes(x, spare, given, wanted)


@contextmanager
def full_precision() -> Iterator[None]:
    """Products in the numbers' own precision, whatever is allowed elsewhere (TF32, bfloat16): all machines must have the same A. Made
    around many products: changing the setting takes as long as a small one."""
    try:
        allowed = torch.get_float32_matmul_precision()
    except RuntimeError:  # the user has set it in the way that torch 2.9 brought, beside which the older one is refused
        backends: Any = torch.backends
        kinds = [backends.cuda.matmul, backends.mkldnn.matmul]
        before = [kind.fp32_precision for kind in kinds]
        for kind in kinds:
            kind.fp32_precision = "ieee"
        try:
            yield
        finally:
            for kind, precision in zip(kinds, before):
                kind.fp32_precision = precision
        return
    if allowed != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if allowed != "highest":
            torch.set_float32_matmul_precision(allowed)


def _passes(x: Tensor, spare: Tensor, given: int | None, wanted: int | None) -> tuple[Tensor, Tensor]:
    outer, length, inner = x.shape
    steps, stride = [], inner
    for size in _factors(length):
        steps.append((size, stride))
        stride *= size
    for size, stride in steps[::-1] if given is not None else steps:  # the outermost factor leaves out most, at either end
        matrix = _HADAMARD[size].to(x, copy=True)  # one that a meter of live memory sees come and go
        if stride == 1:
            torch.mm(x.view(-1, size), matrix, out=spare.view(-1, size))
        elif outer == 1 and size * stride == length * inner:
            below = length // size
            first = size if given is None else -(-given // below)
            last = size if wanted is None else -(-wanted // below)
            torch.mm(matrix[:last, :first], x.view(size, -1)[:first], out=spare.view(size, -1)[:last])
        else:
            blocks = x.view(-1, size, stride)
            torch.bmm(matrix.expand(len(blocks), size, size), blocks, out=spare.view(-1, size, stride))
        x, spare = spare, x
    return x, spare


class _Transform(torch.autograd.Function):
    """Products written to given memory have no gradients of their own; H is symmetric, so it is its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        work = x.clone(memory_format=torch.contiguous_format).view(-1, x.shape[-1], 1)
        return passes(work, torch.empty_like(work))[0].view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return walsh_hadamard(grads[0])


def _factors(length: int) -> list[int]:
    bits = length.bit_length() - 1
    count = max(1, -(-bits // FACTOR))
    return [1 << (bits // count + (index < bits % count)) for index in range(count)]


def _hadamard(bits: int) -> Tensor:
    """H, (2**bits, 2**bits)."""
    matrix = torch.ones(1, 1)
    for _ in range(bits):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


_HADAMARD = {1 << bits: _hadamard(bits) for bits in range(FACTOR + 1)}
