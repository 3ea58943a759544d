"""The wire: named tensors as safetensors bytes. What is counted is the length of what was really serialised."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from featherlight.plugins.base import Message
from featherlight.plugins.rejection import Rejection

Payload = bytes | bytearray
"""A message as bytes. Of a bytearray, what is read shares its memory."""

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
_NAMED = {name: dtype for dtype, name in _DTYPES.items()}
_LONGEST_HEADER = 10**8  # the format's own limit
_LONGEST_KNOWN = 2**18  # headers that are remembered
_ODD = (ValueError, KeyError, TypeError, RuntimeError, RecursionError, OverflowError)

_Kinds = tuple[tuple[str, torch.dtype, torch.Size], ...]


def in_wire_order(message: Mapping[str, Tensor]) -> list[str]:
    """Names in the order in which a message has them."""
    return sorted(message, key=lambda name: (_RANKS[message[name].dtype], name))


def pack(message: Mapping[str, Tensor]) -> bytes:
    """Serialise named tensors (any shapes; dtypes as they are)."""
    if any(value.dtype not in _DTYPES for value in message.values()):
        return save({name: value.detach().contiguous() for name, value in message.items()})  # the library knows more
    return b"".join(_parts(message))


def pack_here(message: Mapping[str, Tensor]) -> bytearray:
    """As :func:`pack`, for a message that is read where it was written: :func:`unpack` then copies nothing."""
    if any(value.dtype not in _DTYPES for value in message.values()):
        return bytearray(pack(message))
    return bytearray().join(_parts(message))


def _parts(message: Mapping[str, Tensor]) -> Iterable[Any]:
    head, order = _layout(tuple((name, value.dtype, value.shape) for name, value in message.items()))
    flat = (message[name].detach().cpu().contiguous().view(-1).view(torch.uint8) for name in order if message[name].numel())
    return [head, *(value.numpy().data for value in flat)]


def unpack(payload: Payload, limit: int | None = None) -> Message:
    """Named tensors from bytes; those of a ``bytearray`` share its memory.

    Args:
        limit: refuse more bytes than this before anything is parsed.

    Raises:
        ValueError: the bytes are too many, or not a well-formed message.
    """
    if limit is not None and len(payload) > limit:
        raise Rejection("unreadable", f"a message of {len(payload)} bytes came where at most {limit} are allowed")
    try:
        return _read(payload)
    except _NotOurs:  # the library knows more dtypes
        pass
    except _ODD as error:
        raise Rejection("unreadable", f"a message of {len(payload)} bytes is not well-formed safetensors: {error}") from error
    try:
        return load(bytes(payload))
    except (*_ODD, AssertionError, SafetensorError) as error:  # of dtypes torch has not, too
        raise Rejection("unreadable", f"a message of {len(payload)} bytes is not well-formed safetensors: {error}") from error


def _read(payload: Payload) -> Message:
    if len(payload) < 8:
        raise ValueError("it has no length")
    start = 8 + int.from_bytes(payload[:8], "little")
    if start > min(len(payload), _LONGEST_HEADER):
        raise ValueError("its header is longer than it or than the format allows")
    text = bytes(payload[8:start])
    entries = (_known if len(text) <= _LONGEST_KNOWN else _entries)(text, len(payload) - start)
    if start == len(payload):
        return {name: torch.empty(shape, dtype=dtype) for name, dtype, shape, _, _ in entries}
    whole = torch.frombuffer(payload if isinstance(payload, bytearray) else bytearray(payload), dtype=torch.uint8)
    message: Message = {}
    for name, dtype, shape, first, last in entries:
        value = whole[start + first : start + last]
        if (start + first) % dtype.itemsize:  # a writer of no padding
            value = value.clone()
        message[name] = value.view(dtype).view(shape)
    return message


def packed_length(message: Mapping[str, Tensor]) -> int:
    """``len(pack(message))`` from shapes and dtypes alone, so that fake tensors can be priced."""
    head, _ = _layout(tuple((name, value.dtype, value.shape) for name, value in message.items()))
    return len(head) + sum(value.numel() * value.element_size() for value in message.values())


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


class _Entry(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    first: int
    last: int


def _entries(text: bytes, size: int) -> tuple[_Entry, ...]:
    """What a header says of ``size`` bytes of data, in the data's order.

    Raises:
        ValueError, KeyError, TypeError: it does not describe them: each byte is one entry's, and each entry has as many as it needs.
    """
    header = json.loads(text.decode(), object_pairs_hook=_once)
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    header.pop("__metadata__", None)
    entries = [_entry(name, described) for name, described in header.items()]
    entries.sort(key=lambda entry: (entry.first, entry.last))
    at = 0
    for entry in entries:
        if entry.first != at:
            raise ValueError(f'entry "{entry.name}" begins at {entry.first}, where {at} is due')
        at = entry.last
    if at != size:
        raise ValueError(f"its header describes {at} bytes of data, and {size} are there")
    return tuple(entries)


def _entry(name: str, described: Mapping[str, Any]) -> _Entry:
    if isinstance(described["dtype"], str) and described["dtype"] not in _NAMED:
        raise _NotOurs
    name.encode()  # half a character has no bytes
    dtype, shape, (first, last) = _NAMED[described["dtype"]], described["shape"], described["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (first, last, *shape)):
        raise ValueError(f'entry "{name}" has a shape or place that is no whole number')
    if last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f'entry "{name}" has {last - first} bytes, which is not what its shape takes')
    return _Entry(name, dtype, tuple(shape), first, last)


_known = lru_cache(maxsize=32)(_entries)


class _NotOurs(Exception):
    """A dtype beyond :data:`_DTYPES`."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no name is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its header has a name twice")
    return found
