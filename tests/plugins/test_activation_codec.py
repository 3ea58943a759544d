"""Activations in few bits: by hand, and packed as a plain string of bits says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherlight.plugins.activation_codec import WHOLE, ActivationCodec

ALL = [(bits, signed) for bits in range(2, 9) for signed in (True, False)]


def test_eight_bits_by_hand():
    x = torch.tensor([[-1.27, 0.504], [0.0, 0.997]])
    message = ActivationCodec(8).encode(x)
    assert message["codes"].dtype == torch.int8
    assert message["codes"].tolist() == [[-127, 50], [0, 100]]
    assert float(message["scale"]) == pytest.approx(0.01)
    message = ActivationCodec(8, signed=False).encode(x.abs() * 2)  # the largest is 2.54, now 255
    assert message["codes"].dtype == torch.uint8
    assert message["codes"].tolist() == [[255, 101], [0, 200]]


def test_a_tensor_of_zeros_has_scale_one():
    for bits, signed in ALL:
        message = ActivationCodec(bits, signed).encode(torch.zeros(2, 3))
        assert message["scale"] == 1.0
        assert torch.equal(ActivationCodec(bits, signed).decode(message, (2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize(("bits", "width", "bytes_of_a_row"), [(4, 4, 2), (4, 5, 3), (6, 4, 3), (6, 5, 6), (8, 5, 5), (2, 9, 3), (7, 8, 7)])
def test_packed_size(bits, width, bytes_of_a_row):
    """Rows are filled up to whole groups: 2 numbers of 4 bits a byte, 4 of 6 bits in 3 bytes, 8 of 7 bits in 7."""
    assert ActivationCodec(bits).encode(torch.randn(3, width))["codes"].shape == (3, bytes_of_a_row)


def test_paper_sizes():
    """An activation of 128 × 8 × 8 for 10 images: 327,680 bytes in float32."""
    x = torch.empty(10, 128, 8, 8)
    sizes = {bits: ActivationCodec(bits).encode(x.fill_(1.0))["codes"] for bits in (WHOLE, 8, 6, 4)}
    assert {bits: codes.numel() * codes.element_size() for bits, codes in sizes.items()} == {32: 327_680, 8: 81_920, 6: 61_440, 4: 40_960}


@given(st.integers(0, 2**31), st.sampled_from(ALL), st.integers(1, 3), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_packed_as_a_string_of_bits(seed, kind, rows, width):
    """A row read as one number from its lowest bit on holds q + 2ᵇ⁻¹ (signed) or q in each b bits; and nobody is off by more than s / 2."""
    bits, signed = kind
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    x = x if signed else x.abs()
    codec = ActivationCodec(bits, signed)
    message = codec.encode(x)
    scale = float(message["scale"])
    assert scale == pytest.approx(float(x.abs().max()) / (2 ** (bits - 1) - 1 if signed else 2**bits - 1))
    if bits < 8:
        for row, values in zip(message["codes"], x):
            number = int.from_bytes(bytes(row.tolist()), "little")
            read = [(number >> bits * place) % 2**bits - (2 ** (bits - 1) if signed else 0) for place in range(width)]
            assert read == (values / message["scale"]).round().int().tolist()
    decoded = codec.decode(message, (rows, width))
    assert (decoded - x).abs().max() <= scale * 0.5001
    codec.check_received(message, (rows, width))


def test_whole_floats_come_back_as_they_were():
    codec, x = ActivationCodec(WHOLE), torch.randn(4, 3, 2)
    assert torch.equal(codec.decode(codec.encode(x), (4, 3, 2)), x)


def test_what_must_not_be_sent():
    for bad in (float("nan"), float("inf")):
        for bits in (8, WHOLE):
            with pytest.raises(ValueError, match="activations are not finite"):
                ActivationCodec(bits).check(torch.tensor([[1.0, bad]]))
    for bits in (8, WHOLE):
        for huge in (1e30, -(2.0**22) - 1):
            with pytest.raises(ValueError, match=r"activations of a magnitude of .* are beyond 4194304"):
                ActivationCodec(bits).check(torch.tensor([[1.0, huge]]))
        with pytest.raises(ValueError, match=r"signed=False, and there are activations below 0 at the cut \(down to -0.5\)"):
            ActivationCodec(bits, signed=False).check_sign(torch.tensor([[1.0, -0.5]]))
    with pytest.raises(ValueError, match="bits=12: give 2 to 8, or 32"):
        ActivationCodec(12)


@pytest.mark.parametrize("bits", [4, 8, WHOLE])
def test_what_cannot_have_come_from_it_is_refused(bits):
    codec = ActivationCodec(bits)
    good = codec.encode(torch.randn(2, 3, 4))
    codec.check_received(good, (2, 3, 4))
    for wrong in ({}, {**good, "codes": good["codes"][:1]}, {**good, "codes": good["codes"].double()}):
        with pytest.raises(ValueError, match="codes of activations should be"):
            codec.check_received(wrong, (2, 3, 4))
    name = "codes" if bits == WHOLE else "scale"
    with pytest.raises(ValueError, match="not finite"):
        codec.check_received({**good, name: torch.full_like(good[name], float("nan"))}, (2, 3, 4))
    with pytest.raises(ValueError, match="beyond 4194304"):
        codec.check_received({**good, name: torch.full_like(good[name], 1e30)}, (2, 3, 4))


@pytest.mark.parametrize("kind", [*ALL, (WHOLE, True)], ids=str)
def test_the_largest_that_may_be_sent_may_be_received(kind):
    x = torch.tensor([[2.0**22, 1.0]])
    codec = ActivationCodec(*kind)
    codec.check(x)
    message = codec.encode(x)
    codec.check_received(message, (1, 2))
    assert codec.magnitude(message) == pytest.approx(2.0**22)
