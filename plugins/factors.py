"""A layer's weight as a product of two thin ones, and back: what PriSM samples from (arXiv 2208.13141).

A weight as a matrix W (O, K), K = I·k² of a convolution, is U diag(σ) Vᵀ; its factors are u = U√σ and v = √σVᵀ, so that W = u·v.
Column i of u and row i of v are *principal kernel* i, the most important first.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class Factors(NamedTuple):
    """A weight's factors.

    Args:
        u: (O, R); v: (R, K), R = min(O, K); values: the singular values σ, float64, (R,), falling.
    """

    u: Tensor
    v: Tensor
    values: Tensor


def factorise(weight: Tensor, name: str = "") -> Factors:
    """The factors of ``weight`` (O, …), in its own dtype.

    Worked out from the eigenvectors U of W·Wᵀ (of Wᵀ·W where that is smaller) in float64, 5 to 10 times as fast as an SVD of a wide matrix.
    Whatever precision small σ lose by squaring, ``u @ v`` is W·(an orthogonal projection on everything): W to rounding.

    Args:
        name: the layer's path, for the error.

    Raises:
        ValueError: the weight is not finite.

    Example:
        >>> weight = torch.arange(6.0).reshape(2, 3, 1, 1)
        >>> torch.allclose(product(factorise(weight)), weight.flatten(1), atol=1e-6)
        True
    """
    matrix = weight.detach().flatten(1).double()
    wide = matrix.shape[0] <= matrix.shape[1]
    short = matrix if wide else matrix.T
    has_values = matrix.device.type != "meta" and not isinstance(matrix, FakeTensor)  # in a prediction there are none
    if has_values and not matrix.isfinite().all():
        raise ValueError(f'the weight of layer "{name}" is not finite: training diverged; lower the learning rate')
    squares, vectors = torch.linalg.eigh(short @ short.T)
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
    values = squares.sqrt()
    # below, σ is rounding: a floor on what divides keeps such a kernel's v from being noise blown up
    floor = (values[0] * torch.finfo(torch.float32).eps).clamp(min=torch.finfo(torch.float32).tiny)
    roots = values.maximum(floor).sqrt()
    near, far = vectors * roots, (vectors / roots).T @ short
    u, v = (near, far) if wide else (far.T, near.T)
    return Factors(u.to(weight.dtype).contiguous(), v.to(weight.dtype).contiguous(), values)


def product(factors: Factors) -> Tensor:
    """u·v: the weight as a matrix (O, K)."""
    return factors.u @ factors.v


def factorise_all(weights: Mapping[str, Tensor]) -> dict[str, Factors]:
    """:func:`factorise` of each."""
    return {name: factorise(weight, name) for name, weight in weights.items()}


def concentrate(weight: Tensor, share: float, rest: float = 0.1, name: str = "") -> Tensor:
    """``weight`` (O, …) with its kernels beyond the first ⌈``share``·R⌉ scaled by ``rest``, as long as it was (Frobenius)."""
    u, v, values = factorise(weight, name)
    scale = torch.full_like(values, rest)
    scale[: ceil(round(share * len(values), 9))] = 1.0
    made = (u * scale.to(u)) @ v
    return (made * (weight.detach().norm() / made.norm().clamp(min=torch.finfo(made.dtype).tiny))).view_as(weight)


def importance(values: Tensor, power: float) -> Tensor:
    """p_i = σ_i^k / Σ_j σ_j^k, float64, (R,); all alike where every σ is 0.

    Args:
        values: σ, (R,); power: k.
    """
    logs = power * values.double().clamp(min=torch.finfo(torch.float64).tiny).log()
    return logs.softmax(0)


def draw(probabilities: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """``size`` different indices, one after the other, each in proportion to ``probabilities`` among those left; ascending, int64.

    The ``size`` largest of log p_i − log(−log uᵢ), u uniform, are distributed so (arXiv 1903.06059); where fewer than ``size``
    have p > 0, others make up the number.
    """
    noise = torch.rand(len(probabilities), generator=generator, dtype=torch.float64).clamp(min=1e-300)
    keys = probabilities.clamp(min=1e-300).log() - (-noise.log()).clamp(min=1e-300).log()
    return keys.topk(size).indices.sort().values


def decay(u: Tensor, v: Tensor, weight_decay: float) -> tuple[Tensor, Tensor]:
    """The gradients of weight_decay/2 · ‖u·v‖²: wd·(u·v)·vᵀ and wd·uᵀ·(u·v), by the small products v·vᵀ and uᵀ·u.

    Args:
        u: (n, r); v: (r, K).
    """
    return weight_decay * (u @ (v @ v.T)), weight_decay * ((u.T @ u) @ v)
