"""The wire: what goes in comes out, and its length is known without serialising."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from featherlight.fed_loop.wire import pack, packed_length, unpack

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.uint64,
    torch.int64,
    torch.uint32,
    torch.int32,
    torch.uint16,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 3), max_size=3)
MESSAGES = st.dictionaries(
    NAMES | st.sampled_from(["backbone.blocks.0.attn.qkv.weight", "köpfe.0", '"', "\\", "\x7f", "\u2028", "😀.weight"]),
    st.tuples(SHAPES, st.sampled_from(DTYPES)),
    max_size=6,
)


def tensors(layout):
    random = torch.Generator().manual_seed(0)
    return {name: torch.randint(0, 2, shape, generator=random).to(dtype) for name, (shape, dtype) in layout.items()}


@settings(max_examples=100, deadline=None)
@given(MESSAGES)
def test_round_trip_and_length(layout):
    message = tensors(layout)
    payload = pack(message)
    assert payload == save(message)  # the library's own writer
    back = unpack(payload, limit=len(payload))
    assert back.keys() == message.keys()
    for name, value in message.items():
        assert back[name].dtype == value.dtype
        assert back[name].shape == value.shape
        assert torch.equal(back[name], value)
    assert packed_length(message) == len(payload)
    assert packed_length({name: value.to("meta") for name, value in message.items()}) == len(payload)


def test_length_by_hand():
    """8 bytes of length, the header padded to a multiple of 8, 4 · 6 + 2 · 1 bytes of data."""
    header = '{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"F16","shape":[],"data_offsets":[24,26]}}'
    length = 8 + (len(header) + 7) // 8 * 8 + 26
    assert packed_length({"b": torch.zeros((), dtype=torch.float16), "a": torch.zeros(2, 3)}) == length


def test_what_is_not_contiguous_or_needs_grad_travels():
    value = torch.arange(6.0).view(2, 3).T.requires_grad_()
    assert torch.equal(unpack(pack({"w": value}))["w"], value)


def _with_header(header, data=b""):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


MALFORMED = {
    "nothing": b"",
    "short": b"\x00" * 7,
    "header longer than the bytes": struct.pack("<Q", 2**40) + b"{}",
    "no JSON": struct.pack("<Q", 4) + b"oops",
    "not an object": _with_header([1]),
    "unknown dtype": _with_header({"w": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"0000"),
    "beyond the end": _with_header({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"0000"),
    "shape and bytes disagree": _with_header({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}, b"0000"),
    "negative shape": _with_header({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"0000"),
    "pickle": b"\x80\x04cos\nsystem\n(S'false'\ntR.",
}


@pytest.mark.parametrize("payload", MALFORMED.values(), ids=MALFORMED)
def test_malformed_bytes_are_refused(payload):
    with pytest.raises(ValueError, match="not well-formed safetensors"):
        unpack(payload)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40), st.integers(0, 200))
def test_damaged_bytes_are_a_message_or_a_value_error(noise, where):
    payload = bytearray(pack({"w": torch.ones(3), "b": torch.zeros(2, dtype=torch.int8)}))
    payload[where : where + len(noise)] = noise
    try:
        back = unpack(bytes(payload))
    except ValueError:
        return
    assert all(isinstance(value, torch.Tensor) for value in back.values())


def test_too_many_bytes_are_refused_before_they_are_parsed():
    with pytest.raises(ValueError, match="a message of 9 bytes came where at most 8 are allowed"):
        unpack(b"\xff" * 9, limit=8)
