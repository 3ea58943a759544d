"""Quantization of what travels: a few bits for each number in place of 32 (QSGD, arXiv 1610.02132; here with one scale per tensor)."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from featherlight.plugins.base import Message, Plugin, Visit
from featherlight.plugins.present import held
from featherlight.plugins.seeds import generator

SCALES = "quantization.scales"
CODED = re.compile(r"(?P<name>[^:]+):(?P<bits>[2-8])(?::(?P<shape>[0-9x]*))?(?:@\d+\.\d+)?")
"""Names of entries: bits, the shape where numbers are packed, and the visit that they were made for on the way down."""


class Quantization(Plugin):
    """Every floating tensor becomes whole multiples of a scale of its own: x ≈ s·q, s = max|x| / (2^(bits−1) − 1), so that 0 stays 0.

    What is no parameter (running statistics, counts) travels as it is: an error in a variance could make it negative. A tensor that is
    not finite comes out as NaN throughout, by which the federation rejects the update. It goes last among codecs:
    what a projection or a selection before it made is quantised.

    Args:
        bits: of a number, 2 to 8, the sign included; below 8, eight numbers are packed into ``bits`` bytes.
        rounding: ``"stochastic"``: up or down at random so that E[s·q] = x, drawn from (seed, round, client); ``"nearest"``: the error is
            at most s/2.
        down: quantise what clients are sent, too: parameters that train in the round, anew for every visit. What is frozen is
            sent once, whole. The server's own weights are never rounded.

    Raises:
        ValueError: bits out of range; ``down`` beside a plugin that makes other entries of the model's before they are sent.

    Example:
        >>> message = {"w": torch.tensor([-127.0, 3.2, 0.0, 64.0])}
        >>> codec = Quantization(rounding="nearest")
        >>> {name: value.dtype for name, value in codec.encode(message, Visit(0)).items()}
        {'w:8': torch.int8, 'quantization.scales': torch.float32}
        >>> codec.decode(codec.encode(message, Visit(0)), Visit(0))["w"]
        tensor([-127.,    3.,    0.,   64.])
    """

    at_once = True

    def __init__(self, bits: int = 8, rounding: Literal["stochastic", "nearest"] = "stochastic", down: bool = False) -> None:
        if not 2 <= bits <= 8:
            raise ValueError(
                f"bits={bits}: give 2 to 8; of a single bit the sign would be all, and 32 are what travels without this plugin"
            )
        if rounding not in ("stochastic", "nearest"):
            raise ValueError(f"rounding={rounding!r} is not known; use 'stochastic' or 'nearest'")
        self.bits = bits
        self.rounding = rounding
        self.down = down
        self._buffers: frozenset[str] = frozenset()

    def attach(self, model: nn.Module) -> None:
        self._model = model
        self._buffers = frozenset(name for name, _ in model.named_buffers())

    # -- up -------------------------------------------------------------------------------------------------------
    def encode(self, message: Message, visit: Visit) -> Message:
        if SCALES in message:
            raise ValueError("Quantization stands twice among the plugins: leave one of them out")
        return self._coded(message, [name for name in message if name not in self._buffers], visit, "up")

    def decode(self, message: Message, visit: Visit) -> Mapping[str, Any]:
        return _decoded(message)

    # -- down -----------------------------------------------------------------------------------------------------
    def encode_down(self, message: Message, visit: Visit, kept: Collection[str] = ()) -> Message:
        if not self.down:
            return message
        entries = self._model.state_dict(keep_vars=True)
        made = next((name for name in message if name not in entries), None)
        if made is not None:
            raise ValueError(
                f"down=True quantises parameters of the server's model, and another plugin sends {made} in place of some: "
                "leave down out; what clients send is quantised all the same"
            )
        training = [name for name, value in held(self._model).items() if name in message and value.requires_grad]
        # a name of this visit's own: made for it alone, never to be found among what a client kept
        return self._coded(message, training, visit, "down", f"@{visit.round}.{visit.client}")

    def decode_down(self, message: Message, visit: Visit) -> Message:
        return _decoded(message) if self.down else message

    # -- the code -------------------------------------------------------------------------------------------------
    def _coded(self, message: Message, names: Collection[str], visit: Visit, way: str, mark: str = "") -> Message:
        coded = dict(message)
        scales = []
        random = generator(visit.seed, visit.round, visit.client, "quantization", way)
        for name in sorted(names):
            if not message[name].is_floating_point():
                continue
            value = coded.pop(name)
            scale, whole = quantised(value.detach(), self.bits, random if self.rounding == "stochastic" else None)
            scales.append(scale)
            if self.bits == 8:
                coded[f"{name}:8{mark}"] = whole.to(torch.int8)
            else:
                shape = "x".join(map(str, value.shape))
                coded[f"{name}:{self.bits}:{shape}{mark}"] = pack((whole + most(self.bits)).to(torch.uint8), self.bits)
        return {**coded, f"{SCALES}{mark}": torch.stack(scales)} if scales else coded


def _decoded(message: Message) -> Message:
    """What :class:`Quantization` made, undone; float32."""
    scales: Tensor | None = None
    coded: dict[str, Tensor] = {}
    decoded: Message = {}
    for name, value in message.items():
        if name.partition("@")[0] == SCALES:
            scales = value
        elif (found := CODED.fullmatch(name)) is None:
            decoded[name] = value
        elif found["shape"] is None:
            coded[found["name"]] = value
        else:
            shape = [int(size) for size in found["shape"].split("x") if size]
            bits = int(found["bits"])
            coded[found["name"]] = (unpack(value, bits, math.prod(shape)) - most(bits)).view(shape)
    if len(coded) != (0 if scales is None else len(scales)):
        raise ValueError(f"{len(coded)} quantized entries came with {0 if scales is None else len(scales)} scales")
    for place, (name, whole) in enumerate(sorted(coded.items())):
        decoded[name] = whole * scales[place]  # type: ignore[index]
    return decoded


def quantised(value: Tensor, bits: int, random: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """s, float32, and the whole numbers q of ``bits`` bits, of the value's type, with x ≈ s·q.

    Args:
        random: where to round up or down at random from; None: to the nearest.
    """
    value = value if value.dtype == torch.float64 else value.float()
    largest = value.abs().amax() if value.numel() else value.new_zeros(())
    scale = (largest / most(bits)).float()
    exact = value / torch.where(scale == 0, torch.ones_like(scale), scale).to(value.dtype)
    whole = exact.round() if random is None else (exact + torch.rand(value.shape, generator=random).to(value.device)).floor()
    return scale, whole.nan_to_num(0, 0, 0).clamp(-most(bits), most(bits))  # NaN: the scale says it


def most(bits: int) -> int:
    """The largest magnitude of a whole number of ``bits`` bits, the same on both sides of 0."""
    return 2 ** (bits - 1) - 1


def pack(values: Tensor, bits: int) -> Tensor:
    """Whole numbers in [0, 2^bits) as bytes: any shape, n of them, to uint8 of ⌈n/8⌉·bits.

    Example:
        >>> pack(torch.tensor([1, 0, 3, 2, 0, 0, 0, 1], dtype=torch.uint8), 2)
        tensor([177,  64], dtype=torch.uint8)
    """
    flat = values.flatten().long()
    eights = torch.cat([flat, flat.new_zeros(-len(flat) % 8)]).view(-1, 8)
    words = (eights << (bits * torch.arange(8, device=flat.device))).sum(1)
    return (words[:, None] >> (8 * torch.arange(bits, device=flat.device)) & 255).to(torch.uint8).flatten()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` of the whole numbers that :func:`pack` packed, int64, flat."""
    octets = packed.view(-1, bits).long() << (8 * torch.arange(bits, device=packed.device))
    eights = octets.sum(1)[:, None] >> (bits * torch.arange(8, device=packed.device)) & (2**bits - 1)
    return eights.flatten()[:count]
