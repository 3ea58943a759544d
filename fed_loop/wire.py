"""The wire: named tensors as safetensors bytes. What is counted is the length of what was really serialised."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
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


def in_wire_order(message: Mapping[str, Tensor]) -> list[str]:
    """Names in the order in which a message has them."""
    return sorted(message, key=lambda name: (_RANKS.get(message[name].dtype, len(_RANKS)), name))


def pack(message: Mapping[str, Tensor]) -> bytes:
    """Serialise named tensors (any shapes; dtypes as they are)."""
    return save({name: value.detach().contiguous() for name, value in message.items()})


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
    """``len(pack(message))`` from shapes and dtypes alone, so that fake tensors can be priced.

    Eight bytes of length, a JSON header padded to a multiple of eight, the data.
    """
    order = {dtype: rank for rank, dtype in enumerate(_DTYPES)}
    header: dict[str, dict[str, object]] = {}
    offset = 0
    for name, value in sorted(message.items(), key=lambda item: (order[item[1].dtype], item[0])):
        size = value.numel() * value.element_size()
        header[name] = {"dtype": _DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + offset
