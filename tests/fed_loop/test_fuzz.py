"""Hostile bytes: whatever comes, it is a message or one ValueError, and takes no more memory than its length allows.

``FEATHERLIGHT_FUZZ=100000 pytest tests/fed_loop/test_fuzz.py`` tries so many of each; the suite tries few.
"""

import functools
import json
import math
import os
import struct
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from featherlight.fed_loop import Federation
from featherlight.fed_loop.away import Belongings, Reply
from featherlight.fed_loop.divided_batch import StoredBatches
from featherlight.fed_loop.report import Report
from featherlight.fed_loop.run import Run
from featherlight.fed_loop.serving import Serving
from featherlight.fed_loop.turn import Turn
from featherlight.fed_loop.wire import pack, unpack
from featherlight.plugins import Chain, Clock, FetchSGD, IntrinsicProjection, PrismSampling, Quantization, TopK, Visit
from featherlight.plugins.activation_codec import ActivationCodec
from featherlight.plugins.rejection import REASONS

EXAMPLES = int(os.environ.get("FEATHERLIGHT_FUZZ", "0"))
HEALTH = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def tries(few):
    return settings(max_examples=EXAMPLES or few, deadline=None, suppress_health_check=HEALTH)


DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "U16",
    "U32",
    "U64",
    "BOOL",
    "C64",
    "F4",
    "F6_E2M3",
    "F8_E4M3",
    "F8_E8M0",
    "",
]
NUMBERS = st.integers(0, 12) | st.sampled_from([-1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 0.5, True, None, "3"])
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(DTYPES) | st.none(),
        "shape": st.lists(NUMBERS, max_size=4) | st.none(),
        "data_offsets": st.lists(NUMBERS, max_size=3),
        "more": NUMBERS,
    },
)
HEADERS = st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), ENTRIES | NUMBERS, max_size=4) | st.recursive(
    NUMBERS, lambda inner: st.lists(inner, max_size=2), max_leaves=20
)


def valid():
    return pack({"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(3), "codes": torch.zeros(5, dtype=torch.uint8)})


@st.composite
def payloads(draw, base=valid):
    """Noise; a header that says anything; or a message of ours, cut, lengthened, overwritten."""
    kind = draw(st.sampled_from(["noise", "header", "ours", "ours"]))
    if kind == "noise":
        return draw(st.binary(max_size=200))
    if kind == "header":
        text = json.dumps(draw(HEADERS)).encode()
        length = draw(st.just(len(text)) | NUMBERS.filter(lambda number: isinstance(number, int) and 0 <= number < 2**64))
        return struct.pack("<Q", int(length)) + text + draw(st.binary(max_size=64))
    payload = bytearray(base())
    for _ in range(draw(st.integers(1, 4))):
        where, noise = draw(st.integers(0, len(payload))), draw(st.binary(max_size=24))
        payload[where : where + draw(st.integers(0, 24))] = noise
    return bytes(payload)


@tries(150)
@given(payloads())
def test_bytes_are_a_message_or_a_value_error_and_take_no_more_than_their_length(payload):
    tracemalloc.start()
    try:
        back = unpack(payload, limit=4096)
    except ValueError:
        back = {}
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2**17 + 4 * len(payload)
    assert sum(value.numel() * value.element_size() for value in back.values()) <= len(payload)


def test_a_header_however_deep_or_wide():
    for text in (b"[" * 10_000, b'{"a":' * 10_000, json.dumps({str(n): {} for n in range(2000)}).encode(), b'{"a":1,"a":2}'):
        with pytest.raises(ValueError, match="not well-formed safetensors"):
            unpack(struct.pack("<Q", len(text)) + text)


@tries(100)
@given(st.text(max_size=60) | st.recursive(NUMBERS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)).map(json.dumps))
def test_a_reply_s_header(text):
    with pytest.raises(ValueError, match="its reply's header cannot be read"):
        Reply.of(text, b"")


@tries(100)
@given(st.dictionaries(st.sampled_from([*Turn(1).to_json()]), NUMBERS | st.lists(NUMBERS, max_size=2), min_size=1), NUMBERS)
def test_a_reply_s_fields(fields, round):
    """Of any that is read, what is counted with is of its type."""
    header = json.dumps({"turn": {**Turn(1).to_json(), **fields}, "lost": False, "round": round})
    try:
        reply = Reply.of(header, b"")
    except ValueError:
        return
    assert type(reply.turn.client) is int
    assert type(reply.turn.steps) is int
    assert isinstance(reply.turn.rejected, str)
    assert reply.turn.reason in REASONS
    assert isinstance(reply.turn.counts, bool)
    math.isfinite(reply.turn.loss)


@tries(60)
@given(payloads(lambda: Belongings(kept={"w": torch.ones(2)}, versions={"w": 3}, memories={1: {"m": torch.ones(1)}}).packed()))
def test_belongings(payload):
    try:
        own = Belongings.unpacked(payload)
    except ValueError:
        return
    assert own.kept.keys() == own.versions.keys()


# -- messages that are well-formed, and not what a client sends --------------------------------------------------------------
METHODS = {
    "averaging": list,
    "principal kernels": lambda: [PrismSampling(0.5, layers=["blocks.*.linear"])],
    "8 bits": lambda: [Quantization()],
    "3 bits": lambda: [Quantization(3)],
    "top-k, 4 bits": lambda: [TopK(20), Quantization(4)],
    "sketches": lambda: [FetchSGD(40, 3, 10)],
    "intrinsic": lambda: [IntrinsicProjection(20, subspaces=2)],
}


class Largest(TorchDispatchMode):
    """The largest tensor that is made, in bytes."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = (leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
        self.bytes = max(self.bytes, *(value.untyped_storage().nbytes() for value in made), 0)
        return out


@functools.cache
def server(method):
    """The server's half of one visit, and what an honest client sends in it."""
    from tests.fed_loop.conftest import Net, Points

    settings = Federation(1, accelerator="cpu", progress=False)
    run = Run(settings, Net(), Points([8, 8]), Chain(METHODS[method]()), [], Report(settings))
    run.begin()
    run._advance(Clock(0, 0))
    visit = Visit(0, 1, 0)
    trainee = run.trainees.of(visit)
    plan = trainee.plan(visit)
    entries = {name: torch.full_like(value, 2) for name, value in plan.sent.items()}
    honest = trainee.chain.encode(entries, visit) if run.chain.by_differences else entries
    return Serving(run.trainees), trainee, plan, visit, {name: value.contiguous() for name, value in honest.items()}


NAMES = [
    "w:8",
    "w:3:8",
    "w:2:99999999999x99999",
    "w:2:",
    "quantization.scales",
    "topk.indices",
    "topk.values",
    "fetchsgd.sketch",
    "intrinsic.z",
]
VALUES = st.sampled_from(
    [torch.zeros(0), torch.tensor(-1), torch.full((20,), 2**31 - 1), torch.full((3, 40), torch.inf), torch.ones(7, dtype=torch.uint8)]
)


@pytest.mark.parametrize("method", METHODS)
def test_messages_are_read_or_rejected_with_a_reason(method):
    serving, trainee, plan, visit, honest = server(method)
    turn = Turn(1)
    assert serving.read(pack(honest), 2**20, trainee, plan, visit, turn)
    assert not turn.rejected

    def odd(draw):
        message = dict(honest)
        for _ in range(draw(st.integers(1, 4))):
            name = draw(st.sampled_from(sorted(honest)) | st.sampled_from(NAMES) | st.text(max_size=8))
            what = draw(st.sampled_from(["gone", "other", "cast", "cut", "grown"]))
            value = message.pop(name, torch.ones(4))
            if what == "other":
                message[name] = draw(VALUES)
            elif what == "cast":
                message[name] = value.to(draw(st.sampled_from([torch.float64, torch.int8, torch.bool, torch.complex64, torch.float8_e5m2])))
            elif what == "cut":
                message[name] = value.flatten()[:-1].clone()
            elif what == "grown":
                message[name] = torch.stack([value, value])
        return message

    def name_of(message):
        return pack({name: value.clone() for name, value in message.items() if name != "__metadata__"})  # one value may be there twice

    @tries(25)
    @given(st.composite(odd)().map(name_of) | payloads(lambda: pack(honest)))
    def check(payload):
        turn = Turn(1)
        with Largest() as largest:
            serving.read(payload, 2**20, trainee, plan, visit, turn)
        assert turn.reason in REASONS
        model = sum(value.numel() * 8 for value in plan.sent.values())
        assert largest.bytes <= 64 * (model + len(payload))

    check()


def test_a_message_of_activations_names_no_more_draws_than_it_has():
    """A name alone asked for a list of as many steps as it liked."""
    message = {
        "images": torch.tensor([[6]]),
        "activations": torch.tensor([[8]]),
        "single": torch.tensor(1),
        f"{10**12}.0.0.codes": torch.zeros(4, 8, dtype=torch.uint8),
    }
    with pytest.raises(ValueError, match="names draw 1000000000000, and has 1 batches"):
        StoredBatches(message, ActivationCodec(8))
    message[f"-{10**12}.0.0.codes"] = message.pop(f"{10**12}.0.0.codes")
    with pytest.raises(ValueError, match="a message of activations"):
        StoredBatches(message, ActivationCodec(8))
