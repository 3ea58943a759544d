"""Numbers in a few bits: by hand, by bounds, and in the mean."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featherlight.plugins import Quantization, Visit
from featherlight.plugins.quantization import pack, unpack

FIRST = Visit(0)


def through(message, visit=FIRST, **options):
    codec = Quantization(**options)
    return codec.decode(codec.encode(message, visit), visit)


# -- packing ----------------------------------------------------------------------------------------------------------
def packed_by_hand(values, bits):
    """Numbers written one behind the other, lowest bit first, zeros to a whole number of eights."""
    text = "".join(f"{value:0{bits}b}"[::-1] for value in values)
    text += "0" * (-len(values) % 8 * bits)
    return [int(text[start : start + 8][::-1], 2) for start in range(0, len(text), 8)]


@given(st.integers(2, 8).flatmap(lambda bits: st.tuples(st.just(bits), st.lists(st.integers(0, 2**bits - 1), max_size=40))))
def test_packing_is_bits_in_a_row(case):
    bits, values = case
    packed = pack(torch.tensor(values, dtype=torch.uint8), bits)
    assert packed.tolist() == packed_by_hand(values, bits)
    assert unpack(packed, bits, len(values)).tolist() == values


# -- rounding ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 3, 3, 3), (0, 4)])
@pytest.mark.parametrize("bits", range(2, 9))
def test_nearest_is_off_by_half_a_step_at_most(bits, shape, dtype):
    value = torch.randn(shape, generator=torch.Generator().manual_seed(bits)).to(dtype)
    back = through({"w": value}, bits=bits, rounding="nearest")["w"]
    assert back.shape == value.shape
    assert back.dtype == torch.float32
    if value.numel():
        step = value.double().abs().max() / (2 ** (bits - 1) - 1)
        assert (back.double() - value.double()).abs().max() <= step / 2 * (1 + 1e-5)  # of ties in float32


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_stochastic_is_off_by_a_step_and_right_in_the_mean(bits):
    value = torch.linspace(-1, 1, 41)
    step = 1 / (2 ** (bits - 1) - 1)
    draws = torch.stack([through({"w": value}, Visit(round), bits=bits)["w"] for round in range(2000)])
    assert (draws - value).abs().max() <= step * (1 + 1e-5)
    assert (draws.mean(0) - value).abs().max() <= 5 * step / 2 / 2000**0.5  # a draw's deviation is at most half a step
    assert (draws[:, 20] == 0).all()
    assert (draws[:, [0, 40]].abs() == 1).all()


def test_draws_are_the_visits_own():
    value = {"w": torch.randn(100, generator=torch.Generator().manual_seed(0))}
    first = through(value, Visit(3, 1, 7))["w"]
    assert torch.equal(first, through(value, Visit(3, 1, 7))["w"])
    for other in (Visit(4, 1, 7), Visit(3, 2, 7), Visit(3, 1, 8)):
        assert not torch.equal(first, through(value, other)["w"])


def test_each_tensor_has_a_scale_of_its_own_and_what_is_whole_stays():
    message = {"small": torch.tensor([1e-6, -2e-6]), "count": torch.tensor(7), "large": torch.tensor([[1e4, 5e3]]), "none": torch.zeros(3)}
    back = through(message, rounding="nearest")
    torch.testing.assert_close(back["small"], message["small"], rtol=0.01, atol=0)
    torch.testing.assert_close(back["large"], message["large"], rtol=0.01, atol=0)
    assert back["count"].dtype == torch.int64
    assert int(back["count"]) == 7
    assert torch.equal(back["none"], torch.zeros(3))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(bad, bits):
    back = through({"w": torch.tensor([1.0, bad, 0.0]), "other": torch.ones(2)}, bits=bits)
    assert not torch.isfinite(back["w"]).any()
    assert torch.equal(back["other"], torch.ones(2))


def test_numbers_too_small_for_a_scale_become_zero():
    assert torch.equal(through({"w": torch.full((3,), 1e-45)})["w"], torch.zeros(3))


# -- refusals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [1, 9, 32])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=f"bits={bits}: give 2 to 8"):
        Quantization(bits)


def test_rounding_by_another_name():
    with pytest.raises(ValueError, match="rounding='up' is not known; use 'stochastic' or 'nearest'"):
        Quantization(rounding="up")


def test_a_message_that_lost_its_scales():
    codec = Quantization()
    coded = codec.encode({"w": torch.ones(2)}, Visit(0))
    del coded["quantization.scales"]
    with pytest.raises(ValueError, match="1 quantized entries came with 0 scales"):
        codec.decode(coded, Visit(0))
