"""The wire: named tensors as safetensors bytes. What is counted is the length of what was really serialised."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from featherlight.plugins.base import Message
from featherlight.plugins.rejection import Rejection

# The format's names of dtypes, in the order in which its writer lays tensors out, then by name.
_DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_RANKS = {dtype: rank for rank, dtype in enumerate(_DTYPES)}


def pack(message: Mapping[str, Tensor]) -> bytes:
    """Serialise named tensors (any shapes; dtypes as they are). Every byte is written once."""
    head, order = _layout(_kinds(message))
    flat = (message[name].detach().cpu().contiguous().view(-1).view(torch.uint8) for name in order if message[name].numel())
    return b"".join([head, *(value.numpy().data for value in flat)])


def unpack(payload: bytes, limit: int | None = None) -> Message:
    """Named tensors from bytes.

    Args:
        limit: refuse more bytes than this before anything is parsed.

    Raises:
        ValueError: the bytes are too many, or not a well-formed message.
    """
    if limit is not None and len(payload) > limit:
        raise Rejection("unreadable", f"a message of {len(payload)} bytes came where at most {limit} are allowed")
    try:
        return load(payload)
    except (SafetensorError, KeyError, ValueError, RuntimeError, AssertionError, OverflowError) as error:  # of dtypes torch has not, too
        raise Rejection("unreadable", f"a message of {len(payload)} bytes is not well-formed safetensors: {error}") from error


def packed_length(message: Mapping[str, Tensor]) -> int:
    """``len(pack(message))`` from shapes and dtypes alone, so that fake tensors can be priced."""
    return len(_layout(_kinds(message))[0]) + sum(value.numel() * value.element_size() for value in message.values())


_Kinds = tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]


def _kinds(message: Mapping[str, Tensor]) -> _Kinds:
    return tuple((name, value.dtype, tuple(value.shape)) for name, value in message.items())


@lru_cache(maxsize=256)  # turns of a run have few layouts
def _layout(kinds: _Kinds) -> tuple[bytes, tuple[str, ...]]:
    """What stands before the data (eight bytes of length, a JSON header padded to a multiple of eight), and in which order data follow."""
    header: dict[str, dict[str, Any]] = {}
    offset = 0
    for name, dtype, shape in sorted(kinds, key=lambda kind: (_RANKS[kind[1]], kind[0])):
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    length = -(-len(text) // 8) * 8
    return length.to_bytes(8, "little") + text.ljust(length), tuple(header)
