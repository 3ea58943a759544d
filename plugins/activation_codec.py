"""Activations as few bits: a scale for each tensor, whole numbers of 2 to 8 bits packed into bytes, or floats as they are."""

from __future__ import annotations

from math import lcm, prod

import torch
from torch import Tensor

from featherlight.plugins.base import Message

WHOLE = 32
"""Bits that mean: float32 as it is."""
BOUND = 2.0**22
"""Largest magnitude of an activation, as of a weight in a federation's mean: a server part trained on larger ones would not stay below."""


class ActivationCodec:
    """Quantises one tensor of activations symmetrically: ``q = clamp(round(x / s))``, ``x ≈ s · q``.

    Signed, ``s = max|x| / (2ᵇ⁻¹ − 1)`` and q in [−2ᵇ⁻¹, 2ᵇ⁻¹ − 1], as EcoFed does at 8 bits (arXiv 2304.05495); behind a ReLU half of these
    values never occur, and unsigned, ``s = max x / (2ᵇ − 1)``, has twice the resolution. A tensor of zeros has scale 1.

    Args:
        bits: 2 to 8, or 32 for float32 as it is.
        signed: whether values below 0 are allowed for.

    Raises:
        ValueError: another number of bits.

    Example:
        >>> codec = ActivationCodec(bits=4, signed=False)
        >>> message = codec.encode(torch.tensor([[0.0, 1.0, 7.0, 15.0]]))
        >>> message["codes"], message["scale"]  # 15 = 1111₂ and 7 = 0111₂ share a byte
        (tensor([[ 16, 247]], dtype=torch.uint8), tensor(1.))
        >>> codec.decode(message, (1, 4))
        tensor([[ 0.,  1.,  7., 15.]])
    """

    def __init__(self, bits: int = 8, signed: bool = True) -> None:
        if bits not in (*range(2, 9), WHOLE):
            raise ValueError(f"bits={bits}: give 2 to 8, or {WHOLE} for float32 as it is")
        self.bits, self.signed = bits, signed

    def encode(self, x: Tensor) -> Message:
        """``(N, …)`` → ``codes``, ``(N, bytes of a row)`` (int8 where signed at 8 bits, else uint8) and ``scale``, float32 of shape ()."""
        x = x.detach().float()
        if self.bits == WHOLE:
            return {"codes": x}
        low, high = self._range
        scale = (x.abs().amax() if x.numel() else x.new_zeros(())) / high
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        q = (x / scale).round_().clamp_(low, high).flatten(1)
        if self.bits == 8:
            return {"codes": q.to(torch.int8 if self.signed else torch.uint8), "scale": scale}
        return {"codes": _packed(q.sub_(low).to(torch.uint8), self.bits), "scale": scale}

    def decode(self, message: Message, shape: tuple[int, ...]) -> Tensor:
        """What :meth:`encode` made of a tensor of ``shape``, as float32."""
        codes = message["codes"]
        if self.bits == WHOLE:
            return codes.reshape(shape)
        if self.bits < 8:
            codes = _unpacked(codes, self.bits, prod(shape[1:])).float() + self._range[0]
        return (codes.float() * message["scale"]).reshape(shape)

    def check(self, x: Tensor) -> None:
        """Refuse what must not be sent.

        Raises:
            ValueError: NaN, infinity or a magnitude beyond :data:`BOUND` in ``x``.
        """
        _check_magnitude(x)

    def check_sign(self, x: Tensor) -> None:
        """Refuse a setting that ``x`` does not fit: such activations come from the model and the cut, not from one device's data.

        Raises:
            ValueError: values below 0 where the codec is unsigned.
        """
        if not self.signed and bool((x < 0).any()):
            raise ValueError(
                f"signed=False, and there are activations below 0 at the cut (down to {float(x.detach().min()):.3g}), "
                "which it has no codes for: set signed=True, or cut right behind a ReLU"
            )

    def check_received(self, message: Message, shape: tuple[int, ...]) -> None:
        """Refuse what cannot have come from :meth:`encode` of a tensor of ``shape`` that :meth:`check` lets through.

        Raises:
            ValueError: an entry is missing, of another type or shape, not finite, or absurdly large; a scale that is not above 0.
        """
        like = self.like(shape)
        for name, wanted in like.items():
            value = message.get(name)
            if value is None or value.shape != wanted.shape or value.dtype != wanted.dtype:
                came = "nothing" if value is None else f"{value.dtype} of shape {tuple(value.shape)}"
                raise ValueError(f"{name} of activations should be {wanted.dtype} of shape {tuple(wanted.shape)}; {came} came")
        if self.bits == WHOLE:
            _check_magnitude(message["codes"])
            return
        _check_magnitude(message["scale"] * self._range[1] * 0.999)  # of the largest code; rounding may have carried it past the bound
        if not bool(message["scale"] > 0):
            raise ValueError(f"the scale of activations is {float(message['scale'])}, and should be above 0")

    def magnitude(self, message: Message) -> float:
        """Of the largest activation that :meth:`encode` made ``message`` of."""
        if self.bits == WHOLE:
            return float(message["codes"].abs().max()) if message["codes"].numel() else 0.0
        return float(message["scale"]) * self._range[1]

    def like(self, shape: tuple[int, ...]) -> Message:
        """Shapes and types of what :meth:`encode` makes of a tensor of ``shape``, without data."""
        with torch.device("meta"):
            if self.bits == WHOLE:
                return {"codes": torch.empty(shape)}
            row = -(-prod(shape[1:]) * self.bits // 8)
            whole = _in_bytes(self.bits)
            row = -(-row // whole) * whole
            dtype = torch.int8 if self.bits == 8 and self.signed else torch.uint8
            return {"codes": torch.empty(shape[0], row, dtype=dtype), "scale": torch.empty(())}

    @property
    def _range(self) -> tuple[int, int]:
        return (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1) if self.signed else (0, 2**self.bits - 1)


def _check_magnitude(x: Tensor) -> None:
    largest = x.detach().abs().max() if x.numel() else torch.zeros(())
    if not bool(torch.isfinite(largest)):  # a NaN is the largest
        raise ValueError("activations are not finite")
    if bool(largest > BOUND):
        raise ValueError(f"activations of a magnitude of {float(largest):.3g} are beyond {BOUND:.0f}")


def _in_bytes(bits: int) -> int:
    """Bytes of the smallest group of numbers of ``bits`` bits that fills bytes: 3 for 6 bits, four of which they are."""
    return lcm(bits, 8) // 8


def _packed(q: Tensor, bits: int) -> Tensor:
    """uint8 ``(N, D)`` below 2ᵇ → uint8 ``(N, bytes)``; the lowest bits of a group come first, and zeros fill up the last group."""
    size = _in_bytes(bits)
    each = size * 8 // bits
    q = torch.nn.functional.pad(q, (0, -q.shape[1] % each)).unflatten(1, (-1, each))
    word = torch.zeros(q.shape[:2], dtype=torch.int64, device=q.device)
    for place in range(each):
        word |= q[..., place].long() << place * bits
    return torch.stack([(word >> 8 * byte & 255).to(torch.uint8) for byte in range(size)], 2).flatten(1)


def _unpacked(packed: Tensor, bits: int, width: int) -> Tensor:
    """The opposite of :func:`_packed`: uint8 ``(N, width)``."""
    size = _in_bytes(bits)
    packed = packed.unflatten(1, (-1, size))
    word = torch.zeros(packed.shape[:2], dtype=torch.int64, device=packed.device)
    for byte in range(size):
        word |= packed[..., byte].long() << 8 * byte
    each = size * 8 // bits
    q = torch.stack([(word >> place * bits & 2**bits - 1).to(torch.uint8) for place in range(each)], 2)
    return q.flatten(1)[:, :width]
